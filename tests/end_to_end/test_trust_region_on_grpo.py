"""`TrustRegionCallback` on TRL's GRPO and RLOO trainers, against a witness in float64 (see dense_windows.py).

In each set-up no generation batch ends beyond the limit by the witness, and the records agree with it. Without the limit,
some end far beyond it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from tests import tiny
from tests.end_to_end.dense_windows import LabelledRLOO, Run, SetUp, Window, WithTools, run
from tests.tiny import LIMIT
from trl_trustkl.callbacks import window as callback_window
from trl_trustkl.policy import dropout
from trl_trustkl.types import Measurement

pytestmark = pytest.mark.filterwarnings("ignore")
ROUNDING, SINGLE = 1e-6, 2e-5
"""How far a KL in float32 may be from that of the witness: in nats, and relative to it."""
HALF = 0.05
"""The same relative difference where a part of the pass that TRL trains is computed in bf16."""


FULL = SetUp({"learning_rate": 5e-3}, adapter=None, reference=None)
ADAPTER = SetUp(adapter=None, model=lambda folder: tiny.tuned())
THREE = {"num_iterations": 3, "max_steps": 11, "learning_rate": 0.01}  # the end cuts the last window off
EACH_STEP = {"max_kl": LIMIT, "every": "step"}
NOISY = {"num_iterations": 2, "max_steps": 8}

IN_FLOAT32 = {
    "one step for a batch": SetUp(),
    "full": FULL,
    "full, tied embeddings": replace(FULL, model=lambda folder: tiny.llama(tie_word_embeddings=True)),
    "full, beta": replace(FULL, changes=FULL.changes | {"beta": 0.1}, model=tiny.saved_llama, reference="start"),
    "an adapter trained further": ADAPTER,
    "an adapter trained further, beta": replace(ADAPTER, changes={"beta": 0.1}, reference="start"),
    "three iterations": SetUp(THREE),
    "three iterations, limit after each step": SetUp(THREE, options=EACH_STEP),
    "several steps for a batch": SetUp({"steps_per_generation": 4, "max_steps": 8}),
    "several batches for a step": SetUp({"gradient_accumulation_steps": 4, "steps_per_generation": 2}),
    "batches of 2 passes, steps of 3": SetUp({"gradient_accumulation_steps": 3, "steps_per_generation": 2}),
    "batches of 3 passes, steps of 2": SetUp({"steps_per_generation": 3, "max_steps": 7}),
    "RLOO": SetUp(kind=LabelledRLOO),
    "RLOO, two iterations": SetUp({"num_iterations": 2, "max_steps": 8}, kind=LabelledRLOO),
    "GSPO": SetUp(THREE | {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    "temperature, chat": SetUp({"temperature": 0.7}, data=partial(tiny.prompts, chat=True)),
    "truncated completions masked": SetUp({"mask_truncated_completions": True, "max_completion_length": 24}),
    "output of tools masked": SetUp(kind=WithTools),
    "dropout": SetUp(NOISY, adapter={"lora_dropout": 0.2}, model=lambda folder: tiny.llama(attention_dropout=0.2)),
    "gradient checkpointing": SetUp({"gradient_checkpointing": True}),
    "beta": SetUp({"beta": 0.1}),
    "soft-capped logits": SetUp({"learning_rate": 0.1}, model=lambda folder: tiny.gemma2()),
    "absolute positions": SetUp({"disable_dropout": True}, model=lambda folder: tiny.gpt2()),
}


LOSSES = re.search("Supported values are (.*?)\\. ", GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"])[1]
OF_LOSSES = {
    f"loss_type {name}": SetUp({"loss_type": name, "num_iterations": 2, "max_steps": 4})
    for name in re.findall(r"'(\w+)'", LOSSES)
}
IN_BF16 = {
    "bf16": SetUp({"bf16": True}, model=lambda folder: tiny.llama(hidden_size=64, initializer_range=0.1)),
    "QLoRA": SetUp(model=tiny.four_bit),
}
NEEDS = {"QLoRA": pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")}
SOME_DO_NOT_COUNT = {
    "truncated completions masked": lambda counts: counts.any(1),  # rows
    "output of tools masked": lambda counts: counts,
}
SET_UPS = IN_FLOAT32 | OF_LOSSES | IN_BF16


@pytest.fixture
def starts(monkeypatch) -> list[tuple[int, int, Measurement]]:
    """What a run of the callback adds for each window: its micro-batches, how many of them have the states of training's
    passes, and the measurement before the first step."""
    found: list[tuple[int, int, Measurement]] = []
    fix = callback_window.Window.fix_old_policy

    def watched(window: Any) -> None:
        reused = len(window.states)
        fix(window)
        found.append((len(window.micro_batches), reused, window.measure()))

    monkeypatch.setattr(callback_window.Window, "fix_old_policy", watched)
    return found


def assert_nothing_moved(starts: list[tuple[int, int, Measurement]], held: Run) -> None:
    """Before the first step KL(π_old‖π) is exactly 0, also where the states of π_old come from training's passes."""
    assert len(starts) == len(held.windows)
    accumulation = held.trainer.args.gradient_accumulation_steps
    for count, reused, found in starts:
        assert found.kl == found.kl_max == found.tv == 0.0 and found.max_ratio == 1.0
        if has_noise(held):
            assert reused == 0
        elif shares_steps(held.windows):
            assert reused > 0
        else:
            assert reused == min(count, accumulation)


def has_noise(run: Run) -> bool:
    return dropout.has_noise(run.trainer.model)


def shares_steps(windows: list[Window]) -> bool:
    """Whether a step uses two generation batches of which one is used by another step."""
    users = Counter(step for window in windows for step in window.steps)
    return any(len(window.steps) > 1 and max(users[step] for step in window.steps) > 1 for window in windows)


def assert_within_the_limit(windows: list[Window], *, every_step: bool, precision: float) -> None:
    for number, window in enumerate(windows, 1):
        kls = window.kls if every_step else [window.kl]
        assert max(kls) <= LIMIT * (1 + precision) + ROUNDING, f"batch {number} is beyond the limit"
        trust = window.record["trust"]
        assert trust["kl"] <= LIMIT == trust["limit"] == trust["guaranteed"], number


def assert_used(windows: list[Window]) -> None:
    """Most of the shortened steps leave a batch near the limit. Another batch of the same step may be far from it."""

    def largest(step: int) -> float:
        return max(window.kls[window.steps.index(step)] for window in windows if step in window.steps)

    shortened = [largest(window.steps[-1]) for window in windows if window.record["trust"]["scale"] < 1]
    assert len(shortened) >= 2, "fewer than two windows exceeded the limit"
    assert sum(kl > 0.3 * LIMIT for kl in shortened) > len(shortened) / 2, "steps were shortened more than necessary"


def assert_records_agree(windows: list[Window], precision: float) -> None:
    def near(value: float) -> Any:
        return pytest.approx(value, rel=precision, abs=ROUNDING)

    for window in windows:
        trust, anchor = window.record["trust"], window.record["anchor"]
        assert window.record["update"] == window.steps[-1] + 1
        assert trust["kl"] == near(window.kl) and trust["kl_proposed"] == near(window.proposed)
        if window.anchor is None:
            assert anchor["kl_exact"] is None and anchor["kl"] is None
        else:
            assert anchor["kl_exact"] == near(window.anchor[0])
            assert anchor["kl"] == pytest.approx(window.anchor[1], rel=precision, abs=precision / 4)  # its terms cancel


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in SET_UPS])
def test_no_generation_batch_ends_beyond_the_limit(name, tmp_path, starts):
    setup, precision = SET_UPS[name], HALF if name in IN_BF16 else SINGLE
    held = run(setup, tmp_path / "held")
    every_step = setup.options.get("every") == "step" or shares_steps(held.windows)
    assert_nothing_moved(starts, held)
    assert_within_the_limit(held.windows, every_step=every_step, precision=precision)
    assert_used(held.windows)
    assert_records_agree(held.windows, precision)
    if not has_noise(held):
        assert max(window.difference for window in held.windows) < 1e-5 * (precision / SINGLE)
    if name in SOME_DO_NOT_COUNT:
        for window in held.windows:
            assert window.counts.any() and not SOME_DO_NOT_COUNT[name](window.counts).all()
    free = run(half_as_long(setup), tmp_path / "free", limited=False)
    assert max(window.kl for window in free.windows) > 2 * LIMIT
    assert all(map(torch.equal, held.keeps.proposed[0], free.keeps.kept[0])), "the first update proposed is another one"
    if not every_step or held.windows[0].steps == [0]:
        assert held.windows[0].record["trust"]["kl_proposed"] == pytest.approx(free.windows[0].kl, rel=precision)


def half_as_long(setup: SetUp) -> SetUp:
    return replace(setup, changes=setup.changes | {"max_steps": setup.changes.get("max_steps", 4) // 2})
