"""On a CPU and on a GPU: a limit that holds against divergences computed densely in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.tiny import FAST, LIMIT
from tests.watched import before_the_first_step

pytestmark = pytest.mark.filterwarnings("ignore")
ROUNDING = {False: 0.01, True: 0.06}
"""Of a KL, relative, in float32 and under bf16 autocast."""
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["LoRA", "full", "4-bit"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_limit_holds(device, kind, bf16, tmp_path):
    model = tiny.four_bit(tmp_path / "model") if kind == "4-bit" else tiny.llama()
    changes = FAST | {"bf16": bf16, "use_cpu": device == "cpu"}
    trainer = tiny.trainer(
        tmp_path / "run", model, changes=changes, **({"peft_config": None} if kind == "full" else {})
    )
    batch = before_the_first_step(trainer)
    policy = trainer.model.policy
    assert next(policy.parameters()).device.type == device

    def logps() -> list[Tensor]:
        """log π over the vocabulary of the tokens of each micro-batch."""
        temperature = trainer.args.temperature
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return [dense_logps(policy, each, temperature)[each.response_mask] for each in batch.scored.micro_batches]

    old = logps()
    assert trainer.optimise(batch).refused is None
    proposed = trainer.measure(batch)
    measured = trainer.enforce(batch, proposed)
    kls: list[Any] = [dense_kl(p, q) for p, q in zip(old, logps(), strict=True)]
    dense = float(torch.cat(kls).mean())
    assert 0 < measured.kl <= LIMIT < proposed.kl
    assert measured.kl == pytest.approx(dense, rel=ROUNDING[bf16])
