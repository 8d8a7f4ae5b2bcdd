"""The trainer's public methods."""

from __future__ import annotations

import pytest

from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_misspelt_argument_of_train_is_rejected_before_anything_is_moved(tmp_path):
    with pytest.raises(TypeError, match="resume_from_chekpoint"):
        tiny.trainer(tmp_path).train(resume_from_chekpoint=True)
