"""The demo's prompts."""

from __future__ import annotations

from trl_trustkl.demo.prompts import EVAL_PROMPTS, TRAIN_PROMPTS


def test_there_are_many_prompts_and_the_held_out_ones_are_different() -> None:
    assert len(set(TRAIN_PROMPTS)) == len(TRAIN_PROMPTS) == 96
    assert len(set(EVAL_PROMPTS)) == len(EVAL_PROMPTS) == 16
    assert not set(TRAIN_PROMPTS) & set(EVAL_PROMPTS)
