"""The demo's prompts."""

from __future__ import annotations

from trl_trustkl.demo.prompts import EVAL_PROMPTS, TRAIN_PROMPTS


def test_prompts_are_many_and_held_out_ones_apart() -> None:
    assert len(set(TRAIN_PROMPTS)) == len(TRAIN_PROMPTS) == 96
    assert len(set(EVAL_PROMPTS)) == len(EVAL_PROMPTS) == 16
    assert not set(TRAIN_PROMPTS) & set(EVAL_PROMPTS)
