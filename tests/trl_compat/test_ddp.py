"""The options of DDP on a transformers that leaves them to its training loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedDataParallelKwargs

from tests import tiny
from trl_trustkl.trl_compat.ddp import set_ddp_options

pytestmark = pytest.mark.filterwarnings("ignore")


def test_options_that_were_given_are_set_unless_transformers_set_them(tmp_path):
    accelerator, plain = SimpleNamespace(ddp_handler=None), tiny.config(tmp_path)
    set_ddp_options(accelerator, plain)
    assert accelerator.ddp_handler is None
    set_ddp_options(accelerator, tiny.config(tmp_path, ddp_find_unused_parameters=False, ddp_bucket_cap_mb=3))
    assert accelerator.ddp_handler == DistributedDataParallelKwargs(find_unused_parameters=False, bucket_cap_mb=3)
    set_ddp_options(accelerator, tiny.config(tmp_path, ddp_bucket_cap_mb=4))
    assert accelerator.ddp_handler.bucket_cap_mb == 3
