"""The trainer's loop on tiny models, on either line of TRL."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, IA3Config, PeftConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests import tiny
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.controllers import AdaptiveKL
from trl_trustkl.errors import DataError, ModelError
from trl_trustkl.masking import masked_mean
from trl_trustkl.policy import loading, split_lm
from trl_trustkl.policy import value_head as models
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.reference import REFERENCE_ADAPTER
from trl_trustkl.ppo import loop
from trl_trustkl.ppo.optimise import Optimisation
from trl_trustkl.rollout import rewards
from trl_trustkl.rollout.prompts import PromptOrder
from trl_trustkl.types import Batch, Prompts, Rollout, Scored, UpdateStats

pytestmark = pytest.mark.filterwarnings("ignore")
PAD, BOS, EOS = 0, 1, 2
FAMILIES = sorted(tiny.FAMILIES)
FIRST_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1, "max_steps": 1}


# -- helpers -----------------------------------------------------------------------------------------------------------


class Watched(TrustKLPPOTrainer):
    """Keeps what each phase returned, and samples from `script` (token ids and a length for each row) where it has one."""

    script: list[tuple[list[int], int]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[str, list[Any]] = {}
        super().__init__(*args, **kwargs)

    def _keep(self, name: str, value: Any) -> Any:
        self.seen.setdefault(name, []).append(value)
        return value

    def rollout(self, prompts: Prompts) -> Rollout:
        if self.script is None:
            return self._keep("rollout", super().rollout(prompts))
        count, length = len(prompts.ids), self.args.response_length
        rows = [self.script[i % len(self.script)] for i in range(count)]
        ids = torch.tensor([(tokens + [PAD] * length)[:length] for tokens, _ in rows])
        mask = torch.arange(length) < torch.tensor([n for _, n in rows]).unsqueeze(-1)
        return self._keep("rollout", Rollout(prompts.ids, prompts.mask, ids, mask, None, prompts.rows))

    def score(self, rollout: Rollout) -> Scored:
        return self._keep("score", super().score(rollout))

    def advantages(self, scored: Scored) -> Batch:
        return self._keep("advantages", super().advantages(scored))

    def optimise(self, batch: Batch) -> UpdateStats:
        return self._keep("optimise", super().optimise(batch))


def watched(folder: Any, model: Any = None, *, changes: dict[str, Any] | None = None, **arguments: Any) -> Watched:
    """As `tiny.trainer`, with `script` and what `Watched` keeps."""
    script = arguments.pop("script", None)
    trainer = tiny.trainer(folder, model, kind=Watched, changes=changes, **arguments)
    trainer.script = script
    return trainer


def run(folder: Any, *args: Any, **kwargs: Any) -> tuple[Watched, list[dict[str, Any]]]:
    trainer = watched(folder, *args, **kwargs)
    trainer.train()
    return trainer, load_records(folder)


def weights(module: nn.Module, *, trained: bool = True) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad or not trained}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def adapted(model: nn.Module | None = None, seed: int = 5, **changes: Any) -> PeftModel:
    """A model that comes with an adapter that does something: PEFT's own start has B = 0."""
    peft = get_peft_model(tiny.llama() if model is None else model, tiny.lora(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return peft


def count_calls(monkeypatch, target: Any, name: str) -> list[Any]:
    """Patch a method so that each call appends its arguments to the list returned."""
    calls, original = [], getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, counted)
    return calls


def optimizer_steps(monkeypatch, trainer: Watched) -> list[int]:
    """The update (from 1) in which each optimizer step is taken, as it is taken."""
    steps: list[int] = []
    create = trainer.create_optimizer

    def counted(*args: Any) -> Any:
        optimizer = create(*args)
        step = optimizer.step

        def counting(*a: Any, **k: Any) -> Any:
            steps.append(trainer.state.global_step + 1)
            return step(*a, **k)

        monkeypatch.setattr(optimizer, "step", counting)
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", counted)
    return steps


# -- before the first step, nothing has moved --------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_step_the_ratio_is_1_and_the_kl_is_0_bit_for_bit(tmp_path, family, bf16, checkpointing):
    changes = {"learning_rate": 0.0, "bf16": bf16, "gradient_checkpointing": checkpointing, "max_steps": 2}
    trainer, records = run(tmp_path, tiny.FAMILIES[family](), changes=changes)
    for record in records:
        trust = record["trust"]
        assert (trust["kl"], trust["kl_max"], trust["kl_proposed"], trust["tv"]) == (0.0, 0.0, 0.0, 0.0)
        assert trust["max_ratio"] == 1.0 and set(trust["ratio_quantiles"].values()) == {1.0}
        assert record["anchor"]["kl"] == record["anchor"]["kl_exact"] == 0.0
    for stats in trainer.seen["optimise"]:
        # In every epoch and mini-batch, not only in the measurement after the update.
        assert (stats.total.ratio, stats.total.ratio_var, stats.total.approx_kl) == (1.0, 0.0, 0.0)
        assert stats.total.gated == stats.total.clip_fraction == 0.0


def test_with_a_step_the_measurement_sees_it(tmp_path):
    _, records = run(tmp_path, changes={"learning_rate": 1e-2})
    for record in records:
        assert record["trust"]["kl_max"] >= record["trust"]["kl"] > 0 and record["trust"]["max_ratio"] > 1.0


def test_bf16_is_in_effect_in_every_forward_pass(tmp_path):
    trainer = watched(tmp_path, changes={"bf16": True, "max_steps": 1})
    dtypes = set()
    trainer.model.policy.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert trainer.accelerator.mixed_precision == "bf16"


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("epochs", "minis", "accumulation"), [(1, 1, 1), (2, 2, 2), (3, 4, 2), (1, 8, 2), (2, 2, 4)])
def test_every_mini_batch_of_every_epoch_makes_one_optimizer_step(
    tmp_path, monkeypatch, epochs, minis, accumulation, peft
):
    changes = {"num_ppo_epochs": epochs, "num_mini_batches": minis, "gradient_accumulation_steps": accumulation}
    # 16 prompts in batches of 4, 8 or 16: the last batch of a pass is among the updates.
    trainer = watched(tmp_path, changes=changes, peft_config=tiny.lora() if peft else None)
    steps = optimizer_steps(monkeypatch, trainer)
    trainer.train()
    assert Counter(steps) == dict.fromkeys((1, 2, 3), epochs * minis)
    assert [record["trust"]["epochs"] for record in load_records(tmp_path)] == [epochs] * 3
    assert [stats.steps for stats in trainer.seen["optimise"]] == [epochs * minis] * 3


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, 1e-5)],
)
def test_micro_batches_change_the_memory_and_not_the_step(tmp_path, changes, tolerance):
    ends = []
    for name, settings in (("split", {}), ("whole", changes)):
        settings = FIRST_STEP | {"optim": "sgd", "learning_rate": 0.1} | settings
        trainer, _ = run(tmp_path / name, changes=settings, script=[([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)])
        ends.append(weights(trainer.model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "by_length"), [({}, True), ({"num_mini_batches": 2}, False), ({"measure_fraction": 0.5}, False)]
)
def test_rows_of_like_length_share_a_micro_batch_where_every_pass_takes_all(tmp_path, changes, by_length):
    trainer = watched(tmp_path, changes={"num_mini_batches": 1, "measure_fraction": 1.0} | changes)
    trainer.train()
    in_order = []
    for scored in trainer.seen["score"]:
        length = scored.rollout.prompt_mask.sum(-1) + scored.rollout.response_mask.sum(-1)
        rows = torch.cat([micro.rows for micro in scored.micro_batches])
        assert sorted(rows.tolist()) == list(range(len(length)))
        in_order.append(length[rows].tolist() == sorted(length.tolist(), reverse=True))
    assert all(in_order) == by_length


@pytest.mark.parametrize("limit", [0.05, 0.0, None, 1e9])
def test_max_grad_norm_limits_the_gradient_that_is_stepped(tmp_path, monkeypatch, limit):
    trainer = watched(tmp_path, changes={"max_grad_norm": limit, "max_steps": 1, "vf_coef": 10.0})
    norms: dict[str, list[float]] = {"policy": [], "value": []}
    create = trainer.create_optimizer

    def watching(*args: Any) -> Any:
        optimizer = create(*args)
        step = optimizer.step

        def norm_and_step(*a: Any, **k: Any) -> Any:
            for part, found in norms.items():
                grads = [p.grad for p in getattr(trainer.model, part).parameters() if p.grad is not None]
                found.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return step(*a, **k)

        monkeypatch.setattr(optimizer, "step", norm_and_step)
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", watching)
    trainer.train()
    gradient = load_records(tmp_path)[0]["gradient"]
    assert gradient["max_norm"] == (limit or None)
    if limit == 0.05:
        assert norms["policy"] == pytest.approx([0.05] * 4, rel=1e-4) == norms["value"]
        assert gradient["norm"] > 0.05 and 0 < gradient["scale"] < 1
    else:
        assert max(norms["policy"]) > 1.0
        assert gradient["norm"] == pytest.approx(sum(norms["policy"]) / 4, rel=1e-5) and gradient["scale"] == 1.0


@pytest.mark.parametrize(("limit", "stopped"), [(1e-9, True), (1e9, False), (None, False)])
def test_trust_stop_ends_the_update_after_the_step_that_went_too_far(tmp_path, monkeypatch, limit, stopped):
    trainer = watched(tmp_path, changes={"trust_stop": limit, "num_ppo_epochs": 3})
    steps = optimizer_steps(monkeypatch, trainer)
    trainer.train()
    assert Counter(steps) == dict.fromkeys((1, 2, 3), 1 if stopped else 6)
    for record in load_records(tmp_path):
        assert record["trust"]["stopped"] is stopped
        assert record["trust"]["epochs"] == (0.5 if stopped else 3.0)
        assert (record["binding"] == "stop") == stopped


def test_trust_stop_looks_at_the_mini_batch_just_stepped(tmp_path):
    trainer = watched(tmp_path, changes={"trust_stop": 1e9, "max_steps": 1})
    measured, measure = [], trainer._measure
    trainer._measure = lambda batch, indices: (measured.append(sorted(indices)), measure(batch, indices))[1]
    trainer.train()
    *within, after = measured
    assert len(within) == 3 and all(len(mini) == 1 for mini in within)  # the last step has nothing after it to stop
    assert after == [0, 1]


def test_statistics_are_pooled_over_tokens_and_epochs(tmp_path):
    """With lr = 0 every ratio is 1 and nothing is clipped, whatever the mini-batches."""
    for minis in (1, 2, 4):
        changes = {"num_mini_batches": minis, "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
        trainer, _ = run(tmp_path / str(minis), changes=changes)
        log = trainer.state.log_history[0]
        assert log["val/ratio"] == 1.0 and log["val/ratio_var"] == 0.0 and log["policy/approxkl_avg"] == 0.0
        assert len(trainer.seen["optimise"][0].epochs) == 2


def test_statistics_leave_padding_out(tmp_path):
    script = [([5, EOS], 2), ([9, 8, 7, 6, 5, 4], 6)]
    trainer, (record,) = run(tmp_path, changes={"max_steps": 1}, script=script)
    scored = trainer.seen["score"][0]
    log = trainer.state.log_history[0]
    assert scored.loss_mask.sum() == 4 * 2 + 4 * 6
    expected = float(masked_mean(scored.entropy, scored.loss_mask))
    assert record["entropy"] == log["policy/entropy_avg"] == pytest.approx(expected)
    assert expected > 1.1 * float(scored.entropy.mean())  # what a mean over the padding would give
    assert record["length"] == 4.0 and record["eos_rate"] == 0.5 and log["val/num_eos_tokens"] == 4
    weight = trainer.seen["optimise"][0].total
    assert 0 < weight.ratio < 2


def test_eps_is_a_number_of_episodes_per_second_and_every_stop_token_is_counted(tmp_path):
    trainer, records = run(tmp_path)
    for record, log, rollout in zip(records, trainer.state.log_history[:3], trainer.seen["rollout"], strict=True):
        assert isinstance(log["eps"], float) and log["eps"] != int(log["eps"])
        assert log["val/num_eos_tokens"] == int((rollout.response_ids == EOS).sum()) == round(8 * record["eos_rate"])


# -- callbacks ---------------------------------------------------------------------------------------------------------


class Control(TrainerCallback):
    """Sets a field of the control at the end of an update, and counts what came of it."""

    def __init__(self, field: str = "", at: int = 2) -> None:
        self.field, self.at = field, at
        self.events: Counter = Counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.events["step"] += 1
        if self.field and state.global_step == self.at:
            setattr(control, self.field, True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events["log"] += 1
        self.events[f"log at {state.global_step}"] += 1

    def on_save(self, args, state, control, **kwargs):
        self.events[f"save at {state.global_step}"] += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.events[f"evaluate at {state.global_step}"] += 1


QUIET = {"logging_strategy": "no", "logging_steps": 500}


def test_a_callback_stops_the_run(tmp_path):
    watch = Control("should_training_stop")
    _, records = run(tmp_path, changes={"max_steps": 5}, callbacks=[watch])
    assert watch.events["step"] == len(records) == 2


def test_a_callback_saves_a_checkpoint(tmp_path):
    watch = Control("should_save")
    run(tmp_path, callbacks=[watch])
    assert watch.events["save at 2"] == 1
    assert [folder.name for folder in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]


def test_a_callback_evaluates(tmp_path):
    watch = Control("should_evaluate")
    run(tmp_path, callbacks=[watch], eval_dataset=tiny.prompts(4))
    assert watch.events["evaluate at 2"] == 1
    assert sum(count for event, count in watch.events.items() if event.startswith("evaluate")) == 1


def test_a_callback_logs(tmp_path):
    watch = Control("should_log")
    run(tmp_path, changes=QUIET, callbacks=[watch])
    assert watch.events["log at 2"] == 1 and watch.events["log at 1"] == 0


def test_strategies_by_steps_are_honoured(tmp_path):
    watch = Control()
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"logging_steps": 2, "per_device_eval_batch_size": 3}
    trainer, _ = run(tmp_path, changes=changes, callbacks=[watch], eval_dataset=tiny.prompts(4))
    happened = {event for event in watch.events if event.startswith(("save", "evaluate"))}
    assert happened == {"save at 4", "evaluate at 2", "evaluate at 4"}
    assert {int(event.split()[-1]) for event in watch.events if event.startswith("log at")} == {2, 4}
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert [entry["update"] for entry in logged] == [2, 4]


@pytest.mark.parametrize(
    ("steps", "stop_at", "expected"), [(1, None, {1}), (3, None, {2, 3}), (4, None, {2, 4}), (5, 3, {2, 3})]
)
def test_strategies_by_epochs_see_the_end_of_a_run_within_a_pass(tmp_path, steps, stop_at, expected):
    watch = Control("should_training_stop", stop_at) if stop_at else Control()
    changes = {f"{what}_strategy": "epoch" for what in ("save", "eval", "logging")} | {"max_steps": steps}
    run(tmp_path, changes=changes, callbacks=[watch], eval_dataset=tiny.prompts(4))
    for what in ("save", "evaluate"):
        assert {e: n for e, n in watch.events.items() if e.startswith(what)} == {f"{what} at {u}": 1 for u in expected}
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == expected


def test_an_evaluation_at_the_start_comes_first_and_not_again_after_a_resume(tmp_path):
    data = {"eval_dataset": tiny.prompts(4)}
    changes = {"eval_on_start": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    one, other = Control(), Control()
    run(tmp_path, changes=changes, callbacks=[one], **data)
    assert one.events["evaluate at 0"] == 1
    resumed = watched(tmp_path, changes=changes, callbacks=[other], **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.events["step"] == 1 and not any(event.startswith("evaluate") for event in other.events)


def test_the_cache_is_emptied_as_often_as_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "clear_device_cache", lambda: calls.append(1))
    run(tmp_path, changes={"torch_empty_cache_steps": 2, "max_steps": 4})
    assert len(calls) == 2


def test_what_is_logged_is_the_mean_since_the_last_log(tmp_path):
    trainer, records = run(tmp_path, changes={"max_steps": 2, "logging_steps": 2})
    (log,) = (entry for entry in trainer.state.log_history if "objective/kl" in entry)
    assert log["trust/kl"] == pytest.approx(sum(r["trust"]["kl"] for r in records) / 2)
    assert log["score"] == pytest.approx(sum(r["score"] for r in records) / 2)


def test_on_step_end_comes_after_the_record(tmp_path):
    class Order(TrainerCallback):
        events: list[str] = []

        def on_record(self, args, state, control, record, completions):
            self.events.append(f"record {record.update}")

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(f"step {state.global_step} with {len(load_records(tmp_path))} records")

    run(tmp_path, callbacks=[order := Order()], changes={"max_steps": 2})
    assert order.events == ["record 1", "step 1 with 1 records", "record 2", "step 2 with 2 records"]


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_records_and_another_seed_others(tmp_path):
    def go(name: str, seed: int, noise: int) -> list[dict[str, Any]]:
        def judge(prompts, completions):
            torch.manual_seed(noise)  # whatever else the program draws: nothing depends on it
            return tiny.good_words(prompts, completions)

        torch.manual_seed(noise)
        return without_seconds(run(tmp_path / name, changes={"seed": seed}, reward_funcs=judge)[1])

    assert go("one", 3, noise=1) == go("again", 3, noise=2) != go("other", 4, noise=1)


def test_every_update_and_every_row_draws_responses_of_its_own(tmp_path):
    changes = {"learning_rate": 0.0, "max_steps": 2}
    trainer, _ = run(tmp_path, changes=changes, train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}))
    first, second = (rollout.response_ids.tolist() for rollout in trainer.seen["rollout"])
    assert first != second and len(set(map(tuple, first))) > 4


@pytest.mark.parametrize("which", ["responses", "order of prompts", "mini-batches", "adapter"])
def test_everything_random_follows_the_seed(tmp_path, which):
    def go(seed: int) -> Any:
        trainer = watched(tmp_path / str(seed), changes={"seed": seed, "max_steps": 1})
        adapter = weights(trainer.model)
        trainer.train()
        rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
        return {
            "responses": rollout.response_ids.tolist(),
            "order of prompts": [row["prompt"] for row in rollout.rows],
            "mini-batches": [micro.rows.tolist() for micro in scored.micro_batches],
            "adapter": [weight.tolist() for weight in adapter.values()],
        }[which]

    assert go(1) == go(1) != go(2)


def test_every_pass_over_the_dataset_has_an_order_of_its_own(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 4})
    prompts = [[row["wanted"] for row in rollout.rows] for rollout in trainer.seen["rollout"]]
    first, second = prompts[0] + prompts[1], prompts[2] + prompts[3]
    assert sorted(first) == sorted(second) == sorted(trainer.train_dataset["wanted"])
    assert first != second


@pytest.mark.parametrize("name", ["steps", "between"])
def test_evaluation_does_not_change_the_training_run(tmp_path, name):
    plain = run(tmp_path / "plain", eval_dataset=tiny.prompts(6))[1]
    if name == "steps":
        changes = {"eval_strategy": "steps", "eval_steps": 1, "num_sample_generations": 3}
        trainer, records = run(tmp_path / "evaluated", changes=changes, eval_dataset=tiny.prompts(6))
        assert sum("eval_score" in entry for entry in trainer.state.log_history) == 3
    else:
        trainer = watched(tmp_path / "evaluated", eval_dataset=tiny.prompts(6))
        trainer.evaluate()
        trainer.train()
        records = load_records(tmp_path / "evaluated")
    assert without_seconds(plain) == without_seconds(records)


def test_an_evaluation_can_be_repeated(tmp_path):
    trainer = watched(tmp_path, eval_dataset={"few": tiny.prompts(3), "more": tiny.prompts(6)})
    one, other = ({k: v for k, v in trainer.evaluate().items() if "runtime" not in k} for _ in range(2))
    names = {f"eval_{part}_{key}" for part in ("few", "more") for key in ("score", "kl", "length", "eos_rate")}
    assert one == other and set(one) == names
    assert one["eval_few_kl"] == 0.0 and 1 <= one["eval_few_length"] <= 6


# -- records -----------------------------------------------------------------------------------------------------------

RECORD = {
    "": "update episode score length eos_rate entropy lr refused seconds anchor trust value gradient sampler binding shares",
    "seconds": "generate score optimise measure total",
    "anchor": "estimator placement gradient coef target kl kl_exact kl_stderr share",
    "trust": (
        "rule low high gated gated_low gated_high coef epochs stopped kl kl_max kl_proposed tv max_ratio "
        "ratio_quantiles scale tries limit guaranteed"
    ),
    "value": "clip gated explained_variance",
    "gradient": "norm max_norm scale",
    "sampler": "kl",
    "shares": "anchor clip penalty stop backtrack grad_norm lr",
}
"""The keys of a record, by group."""

BINDING = {"anchor", "clip", "penalty", "stop", "backtrack", "grad_norm", "lr", "none"}


def test_a_record_has_exactly_the_keys_of_the_design(tmp_path):
    _, records = run(tmp_path)
    assert len(records) == 3
    for record in records:
        for group, keys in RECORD.items():
            assert sorted(record[group] if group else record) == sorted(keys.split()), group


def test_a_record_holds_what_it_says(tmp_path):
    changes = {"kl_controller": "adaptive", "kl_target": 3.0, "cliprange": 0.1, "cliprange_high": 0.3}
    trainer, records = run(tmp_path, changes=changes)
    assert [record["update"] for record in records] == [1, 2, 3]
    assert [record["episode"] for record in records] == [8, 16, 24]
    rates = [1e-3 * left / 3 for left in (3, 2, 1)]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    for record, scored in zip(records, trainer.seen["score"], strict=True):
        anchor, trust = record["anchor"], record["trust"]
        assert (anchor["estimator"], anchor["placement"], anchor["gradient"]) == ("k1", "reward", "exact")
        assert anchor["target"] == 3.0
        exact = torch.where(scored.loss_mask, scored.ref_kl, 0.0).sum(1)
        assert anchor["kl_exact"] == pytest.approx(float(exact.mean()), abs=1e-6)
        assert anchor["kl_stderr"] == pytest.approx(float(exact.std()) / math.sqrt(8), abs=1e-6)
        k1 = torch.where(scored.loss_mask, scored.logp - scored.ref_logp, 0.0).sum(1)
        assert anchor["kl"] == pytest.approx(float(k1.mean()), abs=1e-6)
        assert (trust["rule"], trust["low"], trust["high"], trust["coef"]) == ("ppo", 0.1, 0.3, 0.0)
        assert (trust["scale"], trust["tries"], trust["limit"], trust["guaranteed"]) == (None, 0, None, None)
        assert trust["gated"] == pytest.approx(trust["gated_low"] + trust["gated_high"])
        assert record["score"] == pytest.approx(float(scored.scores.mean()))
        assert record["binding"] in BINDING and record["refused"] is None
        assert record["shares"]["clip"] == trust["gated"] and record["shares"]["anchor"] == anchor["share"]
        assert record["value"]["clip"] == 0.2 and record["sampler"]["kl"] < 1e-9


def test_the_records_reach_the_logs_under_flat_names(tmp_path):
    trainer, records = run(tmp_path)
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    for record, log in zip(records, logs, strict=True):
        assert log["trust/kl"] == record["trust"]["kl"] and log["anchor/kl_exact"] == record["anchor"]["kl_exact"]
        assert log["binding"] == record["binding"] and log["trust/rule"] == "ppo" and log["trust/scale"] is None
        assert log["objective/kl"] == record["anchor"]["kl"] and log["objective/scores"] == record["score"]
        penalty = -record["anchor"]["coef"] * record["anchor"]["kl"]
        assert log["objective/rlhf_reward"] == pytest.approx(record["score"] + penalty)


def test_records_are_read_back_as_they_were_written(tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_record(self, args, state, control, record, completions):
            seen.append(record)

    run(tmp_path, callbacks=[Keep()])
    read = load_records(tmp_path)
    assert read == load_records(tmp_path / "bounds.jsonl") == load_records(str(tmp_path))
    assert [record["trust"] for record in read] == [record.trust._asdict() for record in seen]
    assert [record["seconds"] for record in read] == [record.seconds for record in seen]


def test_records_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no records at .*bounds.jsonl"):
        load_records(tmp_path)
    (tmp_path / "bounds.jsonl").write_text('{"update": 1}\n{"upd')
    assert load_records(tmp_path) == [{"update": 1}]  # a last line cut short by a kill
    (tmp_path / "bounds.jsonl").write_text('{"upd\n{"update": 2}\n')
    with pytest.raises(DataError, match="line 1: not a JSON record"):
        load_records(tmp_path)


def test_a_fresh_run_moves_the_records_of_an_old_one_aside(tmp_path):
    first = run(tmp_path, changes={"max_steps": 2})[1]
    second = run(tmp_path, changes={"max_steps": 1})[1]
    third = run(tmp_path, changes={"max_steps": 1})[1]
    assert (len(first), len(second), len(third)) == (2, 1, 1)
    assert load_records(tmp_path / "bounds.jsonl.1") == first
    assert load_records(tmp_path / "bounds.jsonl.2") == second
    assert (tmp_path / "completions.jsonl.2").exists()


def test_completions_are_kept_with_their_score_and_their_likelihood_under_the_reference(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 2})
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(
        sorted(row) == ["completion", "prompt", "ref_logp", "score", "update"] for row in rows
    )
    assert [row["update"] for row in rows] == [1] * 8 + [2] * 8
    scored, rollout = trainer.seen["score"][1], trainer.seen["rollout"][1]
    assert [row["prompt"] for row in rows[8:]] == [row["prompt"] for row in rollout.rows]
    assert [row["completion"] for row in rows[8:]] == scored.completions
    assert [row["score"] for row in rows[8:]] == scored.scores.tolist()
    likelihood = torch.where(rollout.response_mask, scored.ref_logp, 0.0).sum(1)
    assert [row["ref_logp"] for row in rows[8:]] == pytest.approx(likelihood.tolist())


# -- prompts -----------------------------------------------------------------------------------------------------------


def id_prompts() -> Dataset:
    return Dataset.from_dict({"input_ids": [[5 + i % 20, *range(8, 8 + i % 3)] for i in range(16)]})


def test_text_prompts_are_left_padded_and_stop_at_eos(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 1})
    rollout = trainer.seen["rollout"][0]
    tokenizer = tiny.tokenizer()
    for ids, mask, row in zip(rollout.prompt_ids, rollout.prompt_mask, rollout.rows, strict=True):
        assert ids[mask].tolist() == tokenizer(row["prompt"])["input_ids"]
        assert mask.tolist() == sorted(mask.tolist()) and (ids[~mask] == PAD).all()
    for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True):
        tokens = ids.tolist()
        end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert mask.tolist() == [i < end for i in range(len(tokens))] and set(tokens[end:]) <= {PAD}


def test_chat_prompts_go_through_the_template_and_come_back_as_messages(tmp_path):
    seen = {}

    def judge(prompts, completions, **_):
        seen["prompts"], seen["completions"] = prompts, completions
        return [1.0] * len(prompts)

    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=judge, train_dataset=tiny.prompts(chat=True))
    rollout = trainer.seen["rollout"][0]
    tokenizer = tiny.tokenizer()
    for ids, mask, prompt in zip(rollout.prompt_ids, rollout.prompt_mask, seen["prompts"], strict=True):
        assert prompt == [{"role": "user", "content": prompt[0]["content"]}]
        expected = f"<bos> user {prompt[0]['content']} <eos> <bos> assistant"
        assert tokenizer.decode(ids[mask]) == expected
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in seen["completions"])
    assert [c[0]["content"] for c in seen["completions"]] == trainer.seen["score"][0].completions


@pytest.mark.parametrize(("settings", "stops"), [({}, False), ({"stop_token": "eos"}, True)])
def test_prompts_of_token_ids_stop_only_where_asked_to(tmp_path, settings, stops):
    changes = {"max_steps": 2, "response_length": 12} | settings
    trainer, records = run(tmp_path, changes=changes, train_dataset=id_prompts())
    rollout = trainer.seen["rollout"][0]
    assert [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)] == [
        row["input_ids"] for row in rollout.rows
    ]
    if stops:
        assert min(record["length"] for record in records) < 12 and records[0]["eos_rate"] > 0
    else:
        assert [record["length"] for record in records] == [12, 12]
        assert [record["eos_rate"] for record in records] == [0, 0]


@pytest.mark.parametrize("stop_token_id", [7, 9])
def test_a_stop_token_of_ones_own_ends_responses(tmp_path, stop_token_id):
    trainer, records = run(tmp_path, changes={"stop_token_id": stop_token_id, "response_length": 20})
    rollout = trainer.seen["rollout"][0]
    ended = (rollout.response_ids == stop_token_id) & rollout.response_mask
    assert sum(record["eos_rate"] for record in records) > 0
    assert records[0]["eos_rate"] == ended.any(1).float().mean()
    last = rollout.response_mask.sum(1) - 1
    assert (ended.any(1) == (rollout.response_ids[torch.arange(8), last] == stop_token_id)).all()


def test_the_collator_of_trl_works(tmp_path):
    from transformers import DataCollatorWithPadding

    collator = DataCollatorWithPadding(tiny.tokenizer())
    collator.tokenizer.padding_side = "left"
    one = run(tmp_path / "one", train_dataset=id_prompts(), data_collator=collator)[1]
    other = run(tmp_path / "other", train_dataset=id_prompts())[1]
    assert without_seconds(one) == without_seconds(other)


def test_a_collator_that_pads_has_to_say_where(tmp_path):
    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {"input_ids": torch.tensor([[PAD] * (longest - len(r["input_ids"])) + r["input_ids"] for r in rows])}

    with pytest.raises(DataError, match="`data_collator` .* no `attention_mask`"):
        run(tmp_path / "lengths", train_dataset=id_prompts(), data_collator=collator)
    even = Dataset.from_dict({"input_ids": [[3 + i, 4, 5] for i in range(16)]})
    one = run(tmp_path / "one", train_dataset=even, data_collator=collator)[1]
    assert without_seconds(one) == without_seconds(run(tmp_path / "other", train_dataset=even)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_does_not_depend_on_the_padding_beside_it(tmp_path, family):
    """Log-probabilities of the same responses to the same prompt, alone and beside a longer one."""
    dataset = Dataset.from_dict({"prompt": ["w3 w4"] * 8 + ["w3 w4", "w1 " * 30] * 4})
    trainer = watched(
        tmp_path,
        tiny.FAMILIES[family](),
        changes={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        train_dataset=dataset,
        script=[([9, 8, 7, 6, 5, 4], 6)],
    )
    alone, beside = (
        trainer.score(trainer.rollout(trainer.parts.collate([trainer.train_dataset[i] for i in rows])))
        for rows in (range(8), range(8, 16))
    )
    torch.testing.assert_close(alone.logp[::2], beside.logp[::2], rtol=0, atol=1e-4)
    assert not torch.allclose(alone.logp[1], beside.logp[1], atol=1e-2)


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_columns_reach_the_reward_function_as_in_grpo(tmp_path, kind):
    seen = []

    def judge(prompts, completions, wanted, completion_ids, trainer_state):
        seen.append((prompts, completions, wanted, completion_ids, trainer_state.global_step))
        return [float(len(ids)) for ids in completion_ids]

    async def judge_later(prompts, completions, wanted, completion_ids, trainer_state):
        await asyncio.sleep(0)
        return judge(prompts, completions, wanted, completion_ids, trainer_state)

    trainer, records = run(tmp_path, reward_funcs=judge if kind == "plain" else judge_later)
    assert [step for *_, step in seen] == [0, 1, 2]
    for (prompts, completions, wanted, ids, _), rollout, record in zip(
        seen, trainer.seen["rollout"], records, strict=True
    ):
        assert prompts == [row["prompt"] for row in rollout.rows]
        assert wanted == [row["wanted"] for row in rollout.rows]
        assert ids == [r[m].tolist() for r, m in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        assert completions == tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
        assert record["score"] == record["length"]


def test_a_function_with_keywords_gets_every_column(tmp_path):
    names = set()

    def judge(prompts, completions, **columns):
        names.update(columns)
        return [0.0] * len(prompts)

    run(tmp_path, reward_funcs=judge, changes={"max_steps": 1})
    assert names == {"wanted", "completion_ids", "trainer_state"}


def test_a_list_of_rewards_is_weighted_and_added_up(tmp_path):
    def one(prompts, completions):
        return [1.0] * len(prompts)

    async def index(prompts, completions):
        return [float(i) for i in range(len(prompts))]

    model = tiny.scalar_model(tiny.llama())
    changes = {"reward_weights": [10.0, 0.5, 2.0], "max_steps": 1}
    script = [([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)]
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=[one, index, model], script=script)
    plain, _ = run(tmp_path / "model", changes={"max_steps": 1}, reward_funcs=copy.deepcopy(model), script=script)
    expected = 10 + 0.5 * torch.arange(8.0) + 2 * plain.seen["score"][0].scores
    torch.testing.assert_close(trainer.seen["score"][0].scores, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_reads_the_policys_tokens_up_to_the_last_one_that_counts(tmp_path, family):
    reward = tiny.scalar_model(tiny.FAMILIES[family]())
    script = [([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)]
    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=copy.deepcopy(reward), script=script)
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    reward.eval()
    for i in range(8):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        with torch.no_grad():
            states = getattr(reward, reward.base_model_prefix)(input_ids=ids).last_hidden_state
            expected = reward.score(states[0, -1])
        assert float(scored.scores[i]) == pytest.approx(float(expected), abs=1e-4)


def test_a_reward_model_with_a_tokenizer_of_its_own_gets_the_text(tmp_path):
    """Its vocabulary is ours in another order: only encoding the text again gives its scores."""
    own = tiny.tokenizer()
    texts = []
    encode = type(own).__call__

    class Other(type(own)):
        def __call__(self, text, **kwargs):
            texts.append(text)
            out = encode(self, text, **kwargs)
            out["input_ids"] = torch.where(out["input_ids"] > 2, 45 - out["input_ids"], out["input_ids"])
            return out

    own.__class__ = Other
    reward = tiny.scalar_model(tiny.llama())
    script = [([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)]
    trainer, _ = run(
        tmp_path, changes={"max_steps": 1}, reward_funcs=copy.deepcopy(reward),
        reward_processing_classes=own, script=script,
    )  # fmt: skip
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    expected_texts = [row["prompt"] + c for row, c in zip(rollout.rows, scored.completions, strict=True)]
    assert [text for batch in texts for text in batch] == expected_texts
    reward.eval()
    for text, score in zip(expected_texts, scored.scores.tolist(), strict=True):
        ids = torch.tensor([[45 - i if i > 2 else i for i in tiny.tokenizer()(text)["input_ids"]]])
        with torch.no_grad():
            assert score == pytest.approx(float(reward(input_ids=ids).logits), abs=1e-4)


def test_a_reward_model_of_a_chat_gets_the_whole_conversation(tmp_path):
    tokenizer, calls = tiny.tokenizer(), []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **k: (calls.append(messages), apply(messages, **k))[1]
    run(
        tmp_path, changes={"max_steps": 1}, reward_funcs=tiny.scalar_model(tiny.llama()),
        reward_processing_classes=tokenizer, train_dataset=tiny.prompts(chat=True),
    )  # fmt: skip
    assert len(calls) == 8 and all([m["role"] for m in messages] == ["user", "assistant"] for messages in calls)


def test_a_chat_template_alone_writes_the_special_tokens_of_a_conversation():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    reward = rewards.RewardModel(tiny.scalar_model(tiny.llama()), tokenizer)
    prompt, completion = ([{"role": role, "content": "w1 w2"}] for role in ("user", "assistant"))
    for messages, ids in (
        (
            (prompt, completion),
            tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False))["input_ids"][1:],
        ),
        (("w1 ", "w2"), tokenizer("w1 w2")["input_ids"]),
    ):
        assert ids.count(1) == (2 if len(ids) > 3 else 1)
        expected = reward.model(input_ids=torch.tensor([ids])).logits[:, 0]
        torch.testing.assert_close(reward.score_text(*([each] for each in messages)), expected)


def test_a_reward_model_with_an_adapter_reads_the_policys_tokens(tmp_path):
    classifier = get_peft_model(tiny.scalar_model(tiny.llama()), tiny.lora(task_type="SEQ_CLS"))
    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=classifier)
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    for i, score in enumerate(scored.scores.tolist()):
        ids = torch.cat(
            [rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.response_ids[i][rollout.response_mask[i]]]
        )
        with torch.no_grad():
            assert score == pytest.approx(float(classifier(input_ids=ids[None]).logits), abs=1e-4)


def test_the_constructor_of_trl_works_by_position(tmp_path):
    policy = tiny.llama()
    trainer = Watched(
        tiny.config(tmp_path),
        tiny.tokenizer(),
        policy,
        tiny.llama(),
        tiny.scalar_model(policy, seed=2),
        id_prompts(),
        tiny.scalar_model(policy, seed=1),
        None,
        id_prompts(),
        (None, None),
        [watch := Control()],
        tiny.lora(),
    )
    trainer.train()
    assert watch.events["step"] == 3 and len(load_records(tmp_path)) == 3
    assert isinstance(trainer.model.value, models.ValueModel) and trainer.reference.model is not None
    assert trainer.reward_weights == [1.0] and set(trainer.evaluate()) >= {"eval_score", "eval_kl"}


def test_a_model_by_name_is_loaded_with_its_tokenizer(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.scalar_model(tiny.llama()).save_pretrained(tmp_path / "reward")
    tiny.tokenizer().save_pretrained(tmp_path / "reward")
    trainer, records = run(
        tmp_path / "run",
        str(tmp_path / "model"),
        processing_class=None,
        ref_model=str(tmp_path / "model"),
        reward_funcs=str(tmp_path / "reward"),
        changes={"model_init_kwargs": {"dtype": "float32"}, "max_steps": 1},
    )
    assert records[0]["anchor"]["kl_exact"] == 0.0
    assert (
        type(trainer.processing_class).__name__.endswith("TokenizerFast") or trainer.processing_class.eos_token_id == 2
    )


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_that_comes_with_an_adapter_starts_at_a_frozen_clone_of_it(tmp_path):
    model = adapted(lora_dropout=0.3)  # as it was tuned with; neither policy nor reference has any
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".default." in name}
    trainer, records = run(tmp_path, model, peft_config=None, changes={"learning_rate": 1e-2})
    clone, policy = (
        {n.replace(f".{adapter}.", ".default."): p for n, p in model.named_parameters() if f".{adapter}." in n}
        for adapter in (REFERENCE_ADAPTER, "default")
    )
    assert records[0]["anchor"]["kl_exact"] == records[0]["anchor"]["kl"] == 0.0
    assert records[2]["anchor"]["kl_exact"] > 0.0
    assert same(clone, start) and not any(p.requires_grad for p in clone.values())
    assert not same(policy, start) and all(p.requires_grad for p in policy.values())
    assert trainer.model.policy.active_adapter == "default"


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": tiny.lora,
    "LoRA of embeddings": lambda: tiny.lora(target_modules=["embed_tokens", "q_proj"]),
    "DoRA, the head in full": lambda: tiny.lora(
        target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]
    ),
    "token deltas": lambda: tiny.lora(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_clone_that_is_the_reference_is_whole_whatever_the_adapter(tmp_path, kind):
    model = get_peft_model(tiny.llama(), ADAPTERS[kind]())
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _, records = run(tmp_path, model, peft_config=None, changes={"max_steps": 2, "learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] == 0.0 < records[1]["anchor"]["kl_exact"]
    clone = {name: p for name, p in model.named_parameters() if REFERENCE_ADAPTER in name.split(".")}
    assert {name.replace(REFERENCE_ADAPTER, "default") for name in clone} == trained
    assert not any(p.requires_grad or p.grad is not None for p in clone.values())


def test_a_named_reference_adapter_is_used_frozen(tmp_path):
    model = adapted()
    model.add_adapter("sft", tiny.lora())
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".sft." in name}
    _, records = run(tmp_path, model, peft_config=None, changes={"ref_adapter_name": "sft", "learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] > 0.1  # "sft" is at PEFT's start, that is, the plain model
    after = {name: weight for name, weight in model.named_parameters() if ".sft." in name}
    assert same(start, after) and not any(weight.requires_grad for weight in after.values())


def test_an_adapter_by_another_name_is_trained_and_an_unknown_name_is_answered_with_those_that_exist(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.lora(), adapter_name="sft")
    trainer, records = run(tmp_path / "run", model, peft_config=None, changes={"max_steps": 1})
    assert trainer.model.policy.active_adapter == "sft" and records[0]["anchor"]["kl_exact"] == 0.0
    assert trainable(model) and all(".sft." in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ModelError, match=r"`model_adapter_name` got 'stf'; the model's adapters are \['sft'"):
        watched(tmp_path / "unknown", model, peft_config=None, changes={"model_adapter_name": "stf"})


def test_an_error_in_the_references_pass_leaves_the_policy_active(tmp_path):
    model = adapted()
    trainer = watched(tmp_path, model, peft_config=None)
    with pytest.raises(RuntimeError, match="out of memory"), trainer.reference.active():
        assert model.active_adapter == REFERENCE_ADAPTER
        raise RuntimeError("out of memory")
    assert model.active_adapter == "default"
    assert all(p.requires_grad == (".default." in n) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_of_a_new_adapter_is_the_model_without_it(tmp_path, family):
    model = tiny.FAMILIES[family]()
    plain = copy.deepcopy(model).eval()
    trainer, records = run(tmp_path, model, changes={"learning_rate": 1e-2, "temperature": 0.7})
    scored, rollout = trainer.seen["score"][2], trainer.seen["rollout"][2]
    assert records[2]["anchor"]["kl_exact"] > 0
    for i in range(8):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        with torch.no_grad():
            logits = plain(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, response.unsqueeze(-1))[:, 0]
        torch.testing.assert_close(scored.ref_logp[i, : len(response)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_moves_the_model_and_not_the_reference(tmp_path, family):
    model = tiny.FAMILIES[family]()
    before = weights(model)
    trainer, records = run(tmp_path, model, peft_config=None, changes={"learning_rate": 1e-3})
    assert records[0]["anchor"]["kl_exact"] == 0.0 and records[2]["anchor"]["kl_exact"] > 0.0
    assert not same(before, weights(model))
    assert same(before, weights(trainer.reference.model, trained=False))


def test_a_reference_model_of_its_own_is_used_and_stays(tmp_path):
    reference = tiny.llama(seed=7)
    before = weights(reference)
    _, records = run(tmp_path, ref_model=reference, changes={"learning_rate": 1e-2})
    assert records[0]["anchor"]["kl_exact"] > 0.1
    assert same(before, weights(reference, trained=False)) and not loading.trainable(reference)


def value_model(kind: str) -> Any:
    model = tiny.scalar_model(tiny.llama())
    return get_peft_model(model, tiny.lora(task_type="SEQ_CLS")) if kind == "peft" else model


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_a_value_model_of_its_own_learns_and_leaves_the_policy_alone(tmp_path, kind):
    value = value_model(kind)
    before = weights(value)
    trainer = watched(tmp_path, value_model=value, changes={"vf_coef": 1.0, "learning_rate": 1e-2})
    policy = weights(trainer.model.policy)
    trainer.advantages = no_advantages(trainer.advantages)
    trainer.train()
    assert not same(before, weights(value)) and same(policy, weights(trainer.model.policy))
    frozen = [n for n, p in value.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (kind == "peft")


def no_advantages(advantages: Any) -> Any:
    """The advantage phase with nothing left for the policy: only the value has something to learn."""

    def phase(scored: Scored) -> Batch:
        batch = advantages(scored)
        return batch._replace(advantages=torch.zeros_like(batch.advantages))

    return phase


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_value_loss_moves_the_policy_only_where_the_head_is_attached(tmp_path, detach, peft):
    changes = {"detach_value_head": detach, "vf_coef": 10.0, "learning_rate": 1e-2, "kl_coef": 0.0}
    trainer = watched(tmp_path, changes=changes, peft_config=tiny.lora() if peft else None)
    policy, value = weights(trainer.model.policy), weights(trainer.model.value)
    trainer.advantages = no_advantages(trainer.advantages)
    trainer.train()
    assert same(policy, weights(trainer.model.policy)) == detach
    assert not same(value, weights(trainer.model.value))
    assert (load_records(tmp_path)[2]["trust"]["kl"] == 0.0) == detach


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_the_value_has_a_learning_rate_of_its_own(tmp_path, rate):
    trainer = watched(tmp_path, changes={"value_learning_rate": rate, "max_steps": 1})
    before = weights(trainer.model.value)
    trainer.train()
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in loading.trainable(trainer.model.value)} == {1e-3 if rate is None else rate}
    assert {rates[id(p)] for p in loading.trainable(trainer.model.policy)} == {1e-3}
    assert same(before, weights(trainer.model.value)) == (rate == 0.0)


def test_gradient_checkpointing_is_switched_on_and_changes_no_number(tmp_path):
    runs = {}
    for on in (False, True):
        trainer, records = run(tmp_path / str(on), changes={"gradient_checkpointing": on})
        assert trainer.model.policy.get_base_model().is_gradient_checkpointing == on
        runs[on] = without_seconds(records)
    for one, other in zip(runs[False], runs[True], strict=True):
        assert one["score"] == other["score"]
        assert one["trust"]["kl"] == pytest.approx(other["trust"]["kl"], rel=1e-3)


def test_a_quantised_model_is_prepared_for_training(tmp_path):
    """The adapter alone is trained, in float32; norms, embeddings and head keep the dtype they were loaded in."""
    model = tiny.llama().to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    policy = loading.prepare_policy(model, tiny.lora(), tiny.config(tmp_path, gradient_checkpointing=True))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for name, p in policy.named_parameters() if name not in trained} == {torch.bfloat16}
    assert split_lm.checkpointed(policy)


def test_no_forward_pass_keeps_all_hidden_states_or_logits_of_the_whole_rollout(tmp_path, monkeypatch):
    trainer = watched(tmp_path, changes={"max_steps": 1})
    asked = set()
    for module in (trainer.model.split_lm.backbone, trainer.model.split_lm.causal):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: asked.add(bool(kwargs.get("output_hidden_states"))), with_kwargs=True
        )
    trainer.train()
    assert asked == {False}
    assert not any(tiny.VOCAB in tensor.shape for tensor in tensors(trainer.seen["advantages"][0]))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor that a phase hands to the next."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def test_there_are_tensors_to_find(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 1})
    assert len(tensors(trainer.seen["advantages"][0])) > 20


# -- the score, the end and the padding --------------------------------------------------------------------------------

ENDED, CUT = ([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_response_is_trained_where_it_is_the_padding_too(tmp_path, family):
    """PAD = EOS: the end counts, what follows it does not, and an EOS inside a prompt is read."""
    tokenizer = tiny.tokenizer(pad=False)
    prompts = Dataset.from_dict({"input_ids": [[5, EOS, 9], [9]] * 8})
    logps = {}
    for name, processing in (("same", tokenizer), ("own", tiny.tokenizer())):
        trainer, records = run(
            tmp_path / name, tiny.FAMILIES[family](), processing_class=processing, train_dataset=prompts,
            changes={"max_steps": 1, "stop_token": "eos"}, script=[ENDED, CUT],
        )  # fmt: skip
        scored = trainer.seen["score"][0]
        logps[name] = scored.logp
        assert scored.loss_mask.sum(1).tolist() == [3, 6] * 4
        assert (scored.logp[0, :3] < 0).all() and records[0]["eos_rate"] == 0.5
        assert scored.rollout.prompt_mask.sum(1).tolist() == [len(r["input_ids"]) for r in scored.rollout.rows]
    assert torch.equal(logps["same"], logps["own"])


def test_a_response_that_starts_with_padding_is_a_response(tmp_path):
    trainer, (record,) = run(tmp_path, changes={"max_steps": 1}, script=[([PAD, 7, 8], 6), ([PAD] * 6, 6)])
    assert trainer.seen["score"][0].loss_mask.all() and record["refused"] is None
    logs = trainer.state.log_history[0]
    assert all(math.isfinite(logs[name]) for name in logs if name.startswith(("loss/", "policy/", "val/", "trust/k")))


@pytest.mark.parametrize(("position", "expected"), [("after_eos", [3, 5]), ("eos", [2, 5])])
def test_the_score_lands_where_it_is_asked_to(tmp_path, position, expected):
    changes = {"max_steps": 1, "score_position": position, "kl_coef": 0.0, "gamma": 1.0, "lam": 0.0}
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=lambda prompts, completions: [5.0] * 8,
                     script=[ENDED, CUT])  # fmt: skip
    # Values are 0 at the start and λ = 0: a return is the reward at its own position.
    batch = trainer.seen["advantages"][0]
    assert [row.nonzero().flatten().tolist() for row in batch.returns[:2]] == [[index] for index in expected]
    assert batch.returns.max() == 5.0


@pytest.mark.parametrize(("stop", "penalised"), [(EOS, [False, True]), (4, [True, False])])
def test_the_missing_eos_penalty_looks_for_the_stop_token(tmp_path, stop, penalised):
    script = [([5, 7, EOS], 3 if stop == EOS else 6), ([9, 8, 7, 6, 5, 4], 6)]
    changes = {"max_steps": 1, "missing_eos_penalty": 2.0, "stop_token_id": stop}
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=lambda prompts, completions: [5.0] * 8, script=script)
    assert trainer.seen["score"][0].scores[:2].tolist() == [3.0 if missing else 5.0 for missing in penalised]


@pytest.mark.parametrize("whiten", [False, True])
def test_whitened_rewards_have_variance_1_and_keep_their_mean(tmp_path, whiten):
    # λ = γ = 1 and values of 0: rewards are the differences of returns.
    changes = {"max_steps": 1, "whiten_rewards": whiten, "lam": 1.0, "score_position": "eos", "kl_coef": 0.0}
    script = [ENDED, CUT]
    trainer, _ = run(tmp_path, changes=changes, script=script,
                     reward_funcs=lambda prompts, completions: [float(i) for i in range(8)])  # fmt: skip
    batch = trainer.seen["advantages"][0]
    rewards = batch.returns - torch.cat([batch.returns[:, 1:], torch.zeros(8, 1)], dim=1)
    found = rewards[batch.scored.loss_mask]
    plain = torch.zeros_like(rewards)
    for i in range(8):
        plain[i, script[i % 2][1] - 1] = float(i)
    expected = plain[batch.scored.loss_mask]
    if whiten:
        expected = (expected - expected.mean()) / expected.std() + expected.mean()
        assert float(found.std()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_whitened_over_the_tokens_that_count(tmp_path, whiten):
    trainer, _ = run(tmp_path, changes={"max_steps": 1, "whiten_advantages": whiten}, script=[ENDED, CUT])
    batch = trainer.seen["advantages"][0]
    found = batch.advantages[batch.scored.loss_mask]
    plain = (batch.returns - batch.scored.values)[batch.scored.loss_mask]
    expected = (plain - plain.mean()) / plain.std() if whiten else plain
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (batch.advantages[~batch.scored.loss_mask] == 0).all()


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_processed_sampling_shows_in_the_sampler_and_nowhere_else(tmp_path, family):
    changes = {"learning_rate": 0.0, "max_steps": 1, "generation_kwargs": {"repetition_penalty": 1.5}}
    _, (record,) = run(tmp_path, tiny.FAMILIES[family](), changes=changes)
    assert record["sampler"]["kl"] > 1e-3
    assert record["trust"]["kl"] == 0.0 and record["trust"]["max_ratio"] == 1.0 and record["trust"]["gated"] == 0.0
    assert record["anchor"]["kl"] == record["anchor"]["kl_exact"] == 0.0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_plain_sampling_is_the_tempered_policy(tmp_path, temperature):
    trainer, (record,) = run(tmp_path, changes={"temperature": temperature, "max_steps": 1})
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    assert record["sampler"]["kl"] < 1e-9
    torch.testing.assert_close(rollout.sampler_logp, scored.logp, rtol=0, atol=1e-4)


def test_the_models_own_generation_config_is_neither_used_nor_changed(tmp_path):
    model = tiny.llama()
    model.generation_config.update(repetition_penalty=1.7, eos_token_id=2, do_sample=True, top_k=3)
    before = model.generation_config.to_dict()
    trainer, (record, *_) = run(tmp_path, model, peft_config=None, changes={"learning_rate": 0.0, "stop_token": "none"})
    assert record["sampler"]["kl"] < 1e-9 and record["length"] == 6
    assert model.generation_config.to_dict() == before
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["repetition_penalty"], saved["top_k"]) == (2, 1.7, 3)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_prompts_are_generated_from_a_few_at_a_time(tmp_path, size, monkeypatch):
    from trl_trustkl.rollout import transformers_engine as generation

    calls = count_calls(monkeypatch, generation.TransformersEngine, "_generate")
    _, records = run(tmp_path, changes={"local_rollout_forward_batch_size": size, "max_steps": 1})
    assert [len(args[1]) for args, _ in calls] == {1: [1] * 8, 3: [3, 3, 2], 64: [8]}[size]
    assert records[0]["trust"]["kl"] > 0


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came_with_adapter", [False, True])
def test_the_saved_adapter_loads_and_holds_no_reference(tmp_path, came_with_adapter):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, peft_config = (adapted(base), None) if came_with_adapter else (base, tiny.lora())
    trainer, _ = run(tmp_path / "run", model, peft_config=peft_config, changes={"learning_rate": 1e-2})
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    assert not [path for path in saved.rglob("*") if REFERENCE_ADAPTER in path.name]
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not any("value" in name for name in names)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.policy(input_ids=ids).logits
        one = AutoPeftModelForCausalLM.from_pretrained(str(saved))
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(saved))
        for loaded in (one, other):
            assert list(loaded.peft_config) == ["default"]
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(str(saved)).eos_token_id == EOS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_tuned_model_is_saved_as_a_model(tmp_path, family):
    trainer, _ = run(tmp_path, tiny.FAMILIES[family](), peft_config=None)
    trainer.model_wrapped = nn.Sequential(trainer.model)  # whatever the processes wrapped it in
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    assert same(weights(loaded), {n: w.to(loaded.dtype) for n, w in weights(trainer.model.policy).items()})


@pytest.mark.parametrize("value", ["head", "model"])
def test_a_checkpoint_holds_the_value_and_the_controller_beside_the_policy(tmp_path, value):
    from safetensors.torch import load_file

    changes = {"save_strategy": "steps", "save_steps": 2, "kl_controller": "adaptive", "kl_target": 1.0}
    arguments = {"value_model": value_model("full")} if value == "model" else {}
    trainer, _ = run(tmp_path, changes=changes | {"max_steps": 2}, **arguments)
    folder = tmp_path / "checkpoint-2"
    assert same(load_file(folder / "value.safetensors"), weights(trainer.model.value))
    assert (folder / "adapter_model.safetensors").exists() and (folder / "optimizer.pt").exists()
    state = json.loads((folder / "trustkl_state.json").read_text())
    assert state["kl_controller"]["coef"] == trainer.parts.coefficients.kl_state.coef


# -- controllers and learning ------------------------------------------------------------------------------------------


def test_the_adaptive_controller_follows_ziegler_from_the_exact_kl(tmp_path):
    changes = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100, "kl_coef": 0.2}
    changes |= {"kl_controller_kwargs": {"clip": 2.0}, "learning_rate": 1e-2, "max_steps": 6}
    trainer, records = run(tmp_path, changes=changes)
    expected = [0.2]
    for record in records:
        error = min(max(record["anchor"]["kl_exact"] / 0.5 - 1, -2.0), 2.0)
        expected.append(expected[-1] * (1 + error * 8 / 100))
    coefs = [*(record["anchor"]["coef"] for record in records), trainer.parts.coefficients.kl_state.coef]
    assert coefs == pytest.approx(expected, rel=1e-9)
    assert trainer.parts.coefficients.kl_controller == AdaptiveKL(0.2, 0.5, horizon=100, clip=2.0)
    assert coefs[1] < coefs[0] and coefs[-1] > min(coefs)  # down from a KL of 0, and up again later
    assert any(abs(record["anchor"]["kl"] - record["anchor"]["kl_exact"]) > 0.05 for record in records)


def test_a_fixed_coefficient_stays_and_may_be_changed_by_a_callback(tmp_path):
    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.kl_coef /= 2

    assert [r["anchor"]["coef"] for r in run(tmp_path / "one")[1]] == [0.05] * 3
    assert [r["anchor"]["coef"] for r in run(tmp_path / "two", callbacks=[Halve()])[1]] == [0.05, 0.025, 0.0125]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_anchor_holds_the_policy_near_the_reference(tmp_path, estimator):
    kl = {}
    for coef in (0.0, 1.0):
        changes = {"kl_estimator": estimator, "kl_coef": coef, "learning_rate": 1e-2, "max_steps": 12, "seed": 3}
        _, records = run(tmp_path / str(coef), changes=changes | {"lr_scheduler_type": "constant"})
        kl[coef] = sum(record["anchor"]["kl_exact"] for record in records[-3:]) / 3
        assert [record["anchor"]["share"] > 0 for record in records] == [False] + [coef > 0] * 11
    assert kl[1.0] < 0.75 * kl[0.0]


def test_what_can_be_learnt_is_learnt(tmp_path):
    changes = {"learning_rate": 1e-2, "max_steps": 40, "kl_coef": 0.01, "lr_scheduler_type": "constant"}
    _, records = run(tmp_path, changes=changes)
    scores = [record["score"] for record in records]
    assert sum(scores[-5:]) / 5 > sum(scores[:3]) / 3 + 0.15  # from 0.51 to 0.78
    assert records[-1]["anchor"]["kl_exact"] > 1.0


# -- the table of defects ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_table_of_defects_names_exists():
    table = (ROOT / "docs" / "upstream_defects.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)$", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for number, row in rows:
        named = re.findall(r"(\w+\.py)::(\w+)", row)
        assert named, f"defect {number} names no test"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_an_override_of_enforce_needs_nothing_of_the_one_above(tmp_path):
    class Unenforced(TrustKLPPOTrainer):
        def enforce(self, batch: Batch, proposed: Any) -> Any:
            return proposed

    tiny.trainer(tmp_path, kind=Unenforced, changes={"max_steps": 1, "trust_max_kl": 1e-9}).train()
    (record,) = load_records(tmp_path)
    assert record["trust"]["kl"] == record["trust"]["kl_proposed"] > 1e-9
    assert record["trust"]["scale"] is record["trust"]["limit"] is record["trust"]["guaranteed"] is None


def test_a_step_that_the_loss_scaler_skipped_is_not_counted(tmp_path, monkeypatch):
    """fp16: the scaler starts high, and its first steps overflow: their norm is infinite, and nothing moves."""
    trainer = tiny.trainer(tmp_path, changes={"max_steps": 1, "num_ppo_epochs": 2, "num_mini_batches": 1})
    skipped = iter([True, False])
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    norms = iter([math.inf, math.inf, 2.0, 2.0])  # of policy and value, twice
    monkeypatch.setattr(Optimisation, "_clip", lambda self, parameters: next(norms))
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu", enabled=False))
    trainer.train()
    (record,) = load_records(tmp_path)
    assert record["gradient"] == {"norm": 2.0, "max_norm": 1.0, "scale": pytest.approx(0.5, rel=1e-5)}
    assert record["trust"]["epochs"] == 1 and record["refused"] is None


def test_every_pass_of_every_seed_has_an_order_of_its_own():
    orders = [tuple(PromptOrder(64, 64, seed).rows(update)) for seed in (42, 43, 44) for update in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(64)) for order in orders)
    assert PromptOrder(64, 16, 42).rows(5) == PromptOrder(64, 64, 42).rows(1)[16:32]
