"""TrustRegionCallback where a run does not go through: interrupted within a step, without the callback from some step on, with
other weights at its end, or rejected again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.trl_trainers import trainer_of
from tests.weights import same, trained_weights
from tests.windows import LIMIT, ROUNDING, Weights, Witness, kls, limited, records_of, saved
from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records
from trl_trustkl.callbacks import trust_region
from trl_trustkl.callbacks.trust_region_saving import BeforeSave
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


class CtrlC(TrainerCallback):
    """Interrupts training once, after so many passes that end no step. Keeps which batches each later step uses."""

    def __init__(self, passes: int, witness: Witness) -> None:
        self.passes, self.witness = passes, witness
        self.uses: list[set[int]] = []
        self._now: set[int] = set()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes -= 1
        if self.passes == 0:
            raise KeyboardInterrupt
        self._now.add(len(self.witness.batches) - 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now.add(len(self.witness.batches) - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.uses.append(self._now)
        self._now = set()


def flat(weights: Weights) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


def interrupted(folder: Path, **limits: Any) -> tuple[Any, CtrlC]:
    """A trainer with TRL's default, one generation batch for the four passes of a step, after Ctrl-C in the second step."""
    trainer = limited("grpo", folder, witness=True, gradient_accumulation_steps=4, max_steps=9, **limits)
    ctrl_c = CtrlC(5, trainer.witness)
    trainer.add_callback(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._step % 4 == 2 and len(trainer.witness.kept) == 1
    ctrl_c.uses.clear()
    ctrl_c._now = set()
    return trainer, ctrl_c


def test_after_an_interruption_between_two_passes_the_limit_holds_and_steps_are_kept(tmp_path):
    """Every step then uses the end of one generation batch and the start of the next."""
    limit = LIMIT / 2
    trainer, ctrl_c = interrupted(tmp_path, max_kl=limit)
    start, leftover = trained_weights(trainer.model), len(trainer.witness.batches) - 1
    trainer.train()
    witness = trainer.witness
    kept = witness.kept[1:]
    assert len(kept) == 9 and all(len(used) == 2 for used in ctrl_c.uses)
    for used, after in zip(ctrl_c.uses, kept, strict=True):
        for number in used:
            old = start if number == leftover else witness.batches[number].old
            assert kls(witness.batches[number].rollout, old, after).mean() <= limit + ROUNDING
    shortened = 0
    for before, proposed, after in zip([start, *kept], witness.proposed[1:], kept, strict=False):
        step, made = flat(proposed) - flat(before), flat(after) - flat(before)
        scale = float(made @ step / step.square().sum())
        torch.testing.assert_close(
            made, scale * step, rtol=0, atol=1e-6
        )  # shortened towards the policy before the step
        assert scale > 0
        shortened += scale < 0.99
    assert shortened > 2, "the case tests nothing"


def test_after_an_interruption_between_two_passes_a_stop_is_an_error(tmp_path):
    trainer, _ = interrupted(tmp_path, stop=LIMIT, num_iterations=2)
    with pytest.raises(ConfigError, match="after 6 passes: an optimizer step then uses two generation batches"):
        trainer.train()


def test_a_callback_can_be_added_after_a_run_that_failed(tmp_path):
    trainer, _ = interrupted(tmp_path, max_kl=LIMIT)
    trainer.remove_callback(TrustRegionCallback)
    trainer.add_callback(TrustRegionCallback(trainer, max_kl=LIMIT / 2))
    trainer.train()
    assert all(row["trust"]["kl"] <= LIMIT / 2 for row in load_records(tmp_path))


def has_before_save(trainer: Any) -> bool:
    return any(isinstance(each, BeforeSave) for each in trainer.callback_handler.callbacks)


class Remove(TrainerCallback):
    """Removes the TrustRegionCallback after the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer.remove_callback(TrustRegionCallback)


def test_a_callback_that_is_removed_within_a_window_changes_nothing_after_it(tmp_path):
    settings = {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = limited("grpo", tmp_path, witness=True, max_kl=LIMIT / 50, **settings)
    trainer.add_callback(Remove(trainer))
    trainer.train()
    for step in (2, 4, 6):
        assert same(saved(tmp_path / f"checkpoint-{step}"), trainer.witness.kept[step - 1])
    assert not has_before_save(trainer)


def test_a_callback_that_is_removed_after_an_interruption_changes_nothing_after_it(tmp_path):
    trainer, _ = interrupted(tmp_path, max_kl=LIMIT / 50)
    trainer.remove_callback(TrustRegionCallback)
    trainer.train()
    assert all(same(*pair) for pair in zip(trainer.witness.proposed[1:], trainer.witness.kept[1:], strict=True))
    assert not has_before_save(trainer)


class EndEpoch(TrainerCallback):
    """Ends the epoch, and with it the run, in the middle of a window."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == 9


def test_the_best_model_is_loaded_as_it_was_saved(tmp_path, monkeypatch):
    trainer = limited(
        "grpo", tmp_path, max_kl=LIMIT / 20, num_iterations=2, num_train_epochs=1, max_steps=-1,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", greater_is_better=True, callbacks=[EndEpoch()],
    )  # fmt: skip
    scores = iter([1.0, 3.0, *[0.0] * 7])

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_reward": next(scores)}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    rows = records_of(trainer)
    assert trainer.state.global_step == 9 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(saved(tmp_path / "checkpoint-2"), trained_weights(trainer.model))
    assert [row["update"] for row in rows] == [2, 4, 6, 8, 9]
    assert rows[-1]["trust"]["epochs"] == 1 and 0 < rows[-1]["trust"]["kl"] <= LIMIT / 20


def test_a_learning_rate_that_is_far_too_high_is_lowered_by_rejected_updates(tmp_path, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(trust_region.logger, "warning", lambda text, *args: warned.append(text))
    trainer = limited("grpo", tmp_path, panic_kl=LIMIT / 10, lr_target=LIMIT / 20, max_steps=4)
    rows = records_of(trainer)
    assert [row["refused"] is None for row in rows[:2]] == [False, False], "the case tests nothing"
    assert [row["lr"] for row in rows] == pytest.approx([2e-2 / 1.5**step for step in range(4)])
    assert warned[0].startswith("update 1 is rejected: ") and warned[0].endswith("; the parameters were restored.")


def test_an_optimizer_that_finds_its_own_learning_rate(tmp_path):
    from transformers.optimization import Adafactor, AdafactorSchedule

    trainer = trainer_of("grpo", tmp_path, max_steps=2)
    trainer.optimizer = Adafactor([p for p in trainer.model.parameters() if p.requires_grad], lr=None)
    trainer.lr_scheduler = AdafactorSchedule(trainer.optimizer)
    trainer.add_callback(TrustRegionCallback(trainer, lr_target=LIMIT))
    trainer.add_callback(BoundReportCallback(report=False))
    with pytest.raises(ConfigError, match="`lr_target` adapts the learning rate .* Adafactor computes its own"):
        trainer.train()
