"""TrustRegionCallback on TRL's trainers: what it enforces, against dense computations, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.trl_trainers import KINDS, logged, trainer_of
from tests.weights import same, trained_weights
from tests.windows import LIMIT, ROUNDING, kls, limited, records_of, same_moments
from trl_trustkl import TrustRegionCallback
from trl_trustkl.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = {"lr_scheduler_type": "linear"}


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logs without what this package adds, and without times."""
    return [
        {k: v for k, v in log.items() if not k.startswith(("trust/", "anchor/")) and not k.endswith(("time", "second"))}
        for log in history
    ]


@KINDS
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "beta": 0.0}], ids=["defaults", "iterations"])
def test_without_a_limit_nothing_changes_bit_for_bit(kind, settings, tmp_path):
    """Also with dropout, whose random numbers measuring must not take."""
    runs = []
    for name in ("without", "with"):
        model, adapter = tiny.llama(attention_dropout=0.2), tiny.lora(lora_dropout=0.2)
        trainer = trainer_of(kind, tmp_path / name, model=model, peft_config=adapter, max_steps=4, **LINEAR, **settings)
        if name == "with":
            trainer.add_callback(TrustRegionCallback(trainer))
        trainer.train()
        runs.append(
            (trained_weights(trainer.model), timeless(trainer.state.log_history), trainer.optimizer.state_dict())
        )
    (weights, history, optimizer), (other_weights, other_history, other_optimizer) = runs
    assert same(weights, other_weights) and history == other_history
    assert same_moments(optimizer["state"], other_optimizer["state"])
    assert len(logged(trainer, "trust/kl")) == 4 // settings.get("num_iterations", 1)


HELD = {
    "defaults": {},
    "iterations": {"num_iterations": 3},
    "each step": {"num_iterations": 3, "every": "step"},
    "several batches a step": {"steps_per_generation": 1},
    "shared steps": {"steps_per_generation": 3, "num_generations": 2},
    "temperature": {"temperature": 0.7},
}


def dense(trainer: Any) -> list[list[float]]:
    """KL(π_old‖π) on each generation batch after each step on it."""
    witness = trainer.witness
    states = [*witness.kept[:-1], trained_weights(trainer.model)]
    return [
        [
            float(kls(batch.rollout, batch.old, states[step], trainer.temperature).mean())
            for step in witness.steps_of(number)
        ]
        for number, batch in enumerate(witness.batches)
    ]


@KINDS
@pytest.mark.parametrize("case", HELD)
def test_every_window_ends_within_the_limit(kind, case, tmp_path):
    trainer = limited(kind, tmp_path, witness=True, max_kl=LIMIT, max_steps=6, **HELD[case])
    rows = records_of(trainer)
    found = dense(trainer)
    ends = [steps[-1] for steps in found]
    assert max(ends) <= LIMIT + ROUNDING
    assert [row["trust"]["kl"] for row in rows] == pytest.approx(ends, rel=1e-3, abs=ROUNDING)
    assert max(row["trust"]["kl_proposed"] for row in rows) > 2 * LIMIT
    shortened = [row["trust"]["kl"] for row in rows if row["trust"]["scale"] < 1]
    assert sum(kl > 0.3 * LIMIT for kl in shortened) > len(shortened) / 2, "the limit is respected, but not used"
    if case in ("each step", "shared steps"):
        assert max(max(steps) for steps in found) <= LIMIT + ROUNDING
    if case == "iterations":
        assert max(max(steps) for steps in found) > LIMIT, "nothing exceeded the limit within a window"


# -- the other mechanisms ----------------------------------------------------------------------------------------------


def test_after_a_stop_nothing_changes_until_the_window_ends(tmp_path):
    trainer = limited("grpo", tmp_path, witness=True, stop=LIMIT, num_iterations=3, max_steps=6, **LINEAR)
    rows, witness = records_of(trainer), trainer.witness
    moved = 0
    for row, batch in zip(rows, witness.batches, strict=True):
        steps = range(batch.first - 1, batch.first + 2)
        beyond = [float(kls(batch.rollout, batch.old, witness.kept[i]).mean()) > LIMIT for i in steps]
        made = beyond.index(True) + 1 if True in beyond else 3
        for i in list(steps)[made:]:
            assert same(witness.kept[i], witness.kept[i - 1]) and same_moments(
                witness.kept_moments[i], witness.kept_moments[i - 1]
            )
        for i in list(steps)[1:made]:
            assert not same(witness.kept[i], witness.kept[i - 1])
        assert row["trust"]["stopped"] == (made < 3) and row["trust"]["epochs"] == made
        moved += made
    assert moved < 6 and not same(witness.kept[2], witness.kept[3]), "the stop ended more than its window"
    assert logged(trainer, "learning_rate") == pytest.approx([2e-2 * left / 6 for left in range(6, 0, -1)])


@KINDS
def test_the_learning_rate_follows_the_rule_and_the_schedule_does_not_notice(kind, tmp_path):
    trainer = limited(kind, tmp_path, witness=True, lr_target=LIMIT, max_steps=6, num_iterations=2, **LINEAR)
    rows, witness = records_of(trainer), trainer.witness
    scheduled = [2e-2 * left / 6 for left in range(6, 0, -1)]
    factor, factors = 1.0, []
    for batch in witness.batches:
        factors += [factor, factor]
        kl = float(kls(batch.rollout, batch.old, witness.kept[batch.first]).mean())
        factor = factor / 1.5 if kl > 2 * LIMIT else factor * 1.5 if kl < LIMIT / 2 else factor
    assert len(set(factors)) > 1
    used = [rate * factor for rate, factor in zip(scheduled, factors, strict=True)]
    assert witness.rates == pytest.approx(used), "the optimizer used another learning rate"
    assert [row["lr"] for row in rows] == pytest.approx(used[::2])
    assert logged(trainer, "learning_rate") == pytest.approx(scheduled)
    assert same_after(trainer)


def same_after(trainer: Any) -> bool:
    """Whether the optimizer has the scheduled learning rate when the run has ended."""
    return trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]


@pytest.mark.parametrize(
    "limits", [{"panic_kl": 1e-3}, {"panic_kl": 1e-3, "max_kl": LIMIT}], ids=["alone", "with max_kl"]
)
def test_panic_rolls_a_window_back_bit_for_bit(limits, tmp_path):
    settings = {"num_iterations": 2, "max_steps": 6, "learning_rate": 5e-3, **LINEAR}
    trainer = limited("grpo", tmp_path, witness=True, **settings, **limits)
    rows, witness = records_of(trainer), trainer.witness
    starts = [batch.old for batch in witness.batches]
    refused = [row["refused"] is not None for row in rows]
    assert True in refused
    for number, (row, batch) in enumerate(zip(rows, witness.batches, strict=True)):
        end = witness.kept[batch.first]
        assert float(kls(batch.rollout, batch.old, witness.proposed[batch.first]).mean()) == pytest.approx(
            row["trust"]["kl_proposed"], rel=1e-3
        )
        assert refused[number] == (row["trust"]["kl_proposed"] > 1e-3)
        assert same(end, starts[number]) == refused[number]
        if refused[number]:
            before = {} if number == 0 else witness.kept_moments[batch.first - 2]
            assert same_moments(witness.kept_moments[batch.first], before)
            assert "above panic_kl = 0.001" in row["refused"] and row["trust"]["kl"] == 0.0
            assert row["trust"]["scale"] == (0.0 if "max_kl" in limits else None) and row["binding"] == "none"
    assert logged(trainer, "learning_rate") == pytest.approx([5e-3 * left / 6 for left in range(6, 0, -1)])


class Poisons(TrainerCallback):
    """Makes the gradient of a step NaN."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad.fill_(math.nan)


@pytest.mark.parametrize("limits", [{"max_kl": LIMIT}, {"panic_kl": 1e3}, {"lr_target": LIMIT}, {}], ids=str)
def test_an_update_of_nan_is_rolled_back_where_a_limit_is_set(limits, tmp_path):
    held = bool({"max_kl", "panic_kl"} & limits.keys())
    trainer = limited("grpo", tmp_path, witness=True, max_steps=3 if held else 2, **limits)
    trainer.callback_handler.callbacks.insert(0, Poisons(2))
    rows = records_of(trainer)
    weights = trained_weights(trainer.model)
    assert all(weight.isfinite().all() for weight in weights.values()) == held
    assert rows[1]["trust"]["kl_proposed"] is None
    if held:
        assert "not finite" in rows[1]["refused"] and rows[1]["trust"]["kl"] == 0.0
        assert same(trainer.witness.kept[1], trainer.witness.kept[0])
        assert same_moments(trainer.witness.kept_moments[1], trainer.witness.kept_moments[0])
        assert rows[2]["refused"] is None and not same(weights, trainer.witness.kept[0])
    else:
        assert rows[1]["refused"] is None and rows[1]["trust"]["kl"] is None


# -- a batch in which no token counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"max_kl": LIMIT}, {}], ids=str)
def test_a_batch_that_is_masked_completely(limits, tmp_path):
    """Every completion is cut off before its stop token, which is never sampled; the loss of TRL is then 0 or NaN."""
    trainer = limited(
        "grpo", tmp_path, witness=True, max_steps=3, mask_truncated_completions=True, lr_target=LIMIT,
        generation_kwargs={"suppress_tokens": [tiny.EOS]}, **limits,
    )  # fmt: skip
    start = trained_weights(trainer.model)
    rows = records_of(trainer)
    assert len(rows) == 3
    for row in rows:
        assert {row["trust"][name] for name in ("kl", "kl_max", "kl_proposed", "tv", "guaranteed")} == {None}
        assert {row["anchor"][name] for name in ("kl", "kl_exact", "kl_per_token")} == {None}
        assert (row["refused"] is not None) == bool(limits) and row["lr"] == 2e-2
        assert row["refused"] is None or "no token of the generation batch counts" in row["refused"]
    assert "NaN" not in (tmp_path / "bounds.jsonl").read_text()
    ours = [
        value for log in trainer.state.log_history for key, value in log.items() if key.startswith(("trust/", "anch"))
    ]
    assert ours and all(math.isfinite(value) for value in ours)
    if limits:
        assert same(trained_weights(trainer.model), start)


def test_training_goes_on_after_a_batch_that_is_masked_completely(tmp_path):
    trainer = limited("grpo", tmp_path, witness=True, max_steps=4, max_kl=LIMIT)
    generate = trainer._generate_and_score_completions

    def masked(inputs: Any) -> Any:
        found = generate(inputs)
        if trainer.state.global_step == 1:
            found["completion_mask"].zero_()
        return found

    trainer._generate_and_score_completions = masked
    rows, witness = records_of(trainer), trainer.witness
    assert [row["refused"] is None for row in rows] == [True, False, True, True]
    assert same(witness.kept[1], witness.kept[0]) and not same(witness.kept[2], witness.kept[1])
    assert all(0 < row["trust"]["kl"] <= LIMIT for row in rows if row["refused"] is None)


# -- what cannot work --------------------------------------------------------------------------------------------------


class Calls(TrainerCallback):
    """Calls a function at the end of the first step."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.function()


def test_two_callbacks_and_one_that_is_added_twice(tmp_path):
    trainer = trainer_of("grpo", tmp_path)
    one, other = TrustRegionCallback(trainer, max_kl=0.1), TrustRegionCallback(trainer)
    trainer.add_callback(one)
    with pytest.raises(
        ConfigError, match="got two TrustRegionCallbacks; both would enforce limits. Add one with all limits"
    ):
        TrustRegionCallback(trainer)
    for second in (other, one):
        trainer.callback_handler.callbacks[-1:] = [one, second]
        with pytest.raises(ConfigError, match="got two TrustRegionCallbacks"):
            trainer.train()
        trainer.callback_handler.callbacks.remove(second)
        trainer.is_in_train = False
    trainer.train()  # with one


def test_a_callback_of_another_trainer(tmp_path):
    trainer, other = trainer_of("grpo", tmp_path), trainer_of("grpo", tmp_path)
    trainer.add_callback(TrustRegionCallback(other))
    with pytest.raises(ConfigError, match="`trainer` is not the trainer that this TrustRegionCallback was added to"):
        trainer.train()


@pytest.mark.parametrize("made", ["before", "in the middle"])
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=str)
def test_a_callback_that_is_added_in_the_middle_of_training(made, settings, tmp_path):
    trainer = trainer_of("grpo", tmp_path, max_steps=3, **settings)
    ready = TrustRegionCallback(trainer, max_kl=0.1)
    trainer.add_callback(
        Calls(lambda: trainer.add_callback(ready if made == "before" else TrustRegionCallback(trainer)))
    )
    with pytest.raises(ConfigError, match="added after training began"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_whose_passes_are_random_without_dropout(tmp_path):
    """The noise begins after the first probes, as with a rate that a schedule raises."""

    class Noisy(torch.nn.Module):
        on = False

        def forward(self, states: Any) -> Any:
            return states + self.on * torch.rand_like(states)

    model = tiny.llama()
    model.model.norm = torch.nn.Sequential(model.model.norm, noisy := Noisy())
    trainer = limited("grpo", tmp_path, model=model, max_kl=LIMIT)
    Noisy.on = True
    start = trained_weights(trainer.model)
    with pytest.raises(ModelError, match="two forward passes of LlamaForCausalLM .* although its dropout is off"):
        trainer.train()
    assert same(trained_weights(trainer.model), start) and noisy.training
    with pytest.raises(ModelError, match="two passes over the same tokens differ"):
        TrustRegionCallback(trainer_of("grpo", tmp_path, model=model))


def test_a_batch_with_images(tmp_path):
    trainer = limited("grpo", tmp_path)
    prepare = trainer._prepare_inputs

    def with_images(batch: Any) -> Any:
        inputs = prepare(batch)
        for part in trainer._buffered_inputs:
            part["pixel_values"] = torch.zeros(1)
        return {key: value for key, value in inputs.items() if key != "pixel_values"}

    trainer._prepare_inputs = with_images
    with pytest.raises(ModelError, match="the generation batch has images"):
        trainer.train()


def test_the_learning_rate_of_a_step_that_failed_is_restored(tmp_path):
    trainer = limited("grpo", tmp_path, witness=True, lr_target=1e-9, max_steps=3)
    steps = []

    def fails() -> None:
        (hook,) = steps
        hook.remove()
        raise RuntimeError("out of memory")

    def break_the_next_step() -> None:
        steps.append(trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: fails()))

    trainer.add_callback(Calls(break_the_next_step))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.remove_callback(Calls)
    count = len(trainer.witness.rates)
    rows = records_of(trainer)
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert trainer.witness.rates[count:] == pytest.approx([row["lr"] for row in rows])
    assert rows[0]["lr"] == pytest.approx(2e-2 / 1.5) and same_after(trainer)
