"""The records of a run with a TrustRegionCallback: how many, what they hold, and the same in TRL's logs."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.certificates import by_definition
from tests.dense import dense_kl
from tests.trl_trainers import DUAL, KINDS, TARGET, TRAINERS, logged, trainer_of
from tests.watched import without_seconds
from tests.windows import LIMIT, Witness, generated, kls, limited, logps, records_of
from trl_trustkl import AdaptiveKLCallback, BoundReportCallback, TrustRegionCallback, load_records
from trl_trustkl.cli import main
from trl_trustkl.errors import ConfigError
from trl_trustkl.records import flatten

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES: dict[str, tuple[str, dict[str, Any], list[int], list[int]]] = {
    "defaults": ("grpo", {}, [1, 2, 3, 4], [1, 1, 1, 1]),
    "defaults of RLOO": ("rloo", {}, [1, 2, 3, 4], [1, 1, 1, 1]),
    "iterations": ("rloo", {"num_iterations": 2}, [2, 4], [2, 2]),
    "iterations, cut": ("grpo", {"num_iterations": 3}, [3, 4], [3, 1]),
    "several steps": ("rloo", {"steps_per_generation": 4}, [2, 4], [2, 2]),
    "several batches a step": ("grpo", {"steps_per_generation": 1}, [1, 1, 2, 2, 3, 3, 4, 4], [1] * 8),
    "shared steps": ("grpo", {"steps_per_generation": 3, "num_generations": 2}, [2, 3, 4], [2, 2, 1]),
}
"""By case: the trainer, its settings, and of each generation batch the last step on it and the number of steps."""


@pytest.mark.parametrize("case", BATCHES)
def test_one_line_for_each_generation_batch_whatever_is_logged(case, tmp_path):
    kind, settings, updates, steps = BATCHES[case]
    found = []
    for number, (logging_steps, first) in enumerate([(1, True), (2, False), (100, True)]):
        trainer = trainer_of(kind, tmp_path / str(number), max_steps=4, logging_steps=logging_steps, **settings)
        callbacks = [BoundReportCallback(report=False), TrustRegionCallback(trainer, max_kl=LIMIT)]
        for callback in callbacks if first else reversed(callbacks):
            trainer.add_callback(callback)
        rows = without_seconds(records_of(trainer))
        assert [row["update"] for row in rows] == updates, logging_steps
        norms = {log["step"]: log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log}
        wanted = [norms.get(update) if count == 1 else None for update, count in zip(updates, steps, strict=True)]
        assert [row.pop("gradient")["norm"] for row in rows] == wanted and len(norms) == 4 // logging_steps
        found.append([row | {"binding": None, "shares": None} for row in rows])
    assert found[0] == found[1] == found[2]
    completions = [(tmp_path / str(number) / "completions.jsonl").read_text() for number in range(3)]
    assert completions[0] == completions[1] == completions[2]
    batch = trainer.args.generation_batch_size
    assert len(completions[0].splitlines()) == batch * len(updates)
    # TRL's logs know only of the step, so that two batches of one step have the same number of episodes.
    assert [row["episode"] for row in rows][-1] == batch * len(updates)


def test_every_log_of_a_run_without_windows_is_still_a_record(tmp_path):
    """The report callback reads logs again in a run without a TrustRegionCallback."""
    report = BoundReportCallback(report=False)
    trainer = limited("grpo", tmp_path / "one", report=False, max_steps=2, num_iterations=2)
    trainer.add_callback(report)
    assert [row["update"] for row in records_of(trainer)] == [2]
    other = trainer_of("grpo", tmp_path / "other", max_steps=2, num_iterations=2, callbacks=[report])
    assert [row["update"] for row in records_of(other)] == [1, 2]


# -- what a record holds -----------------------------------------------------------------------------------------------


class Rewards:
    """Two reward functions of which the second gives none for some rows, with weights; keeps what each gave."""

    def __init__(self) -> None:
        self.given: list[tuple[list[float], list[float | None]]] = []
        self.weights = [1.0, 0.5]

    def first(self, prompts: list, completions: list, **_: Any) -> list[float]:
        self.given.append((tiny.good_words(prompts, completions), []))
        return self.given[-1][0]

    def second(self, prompts: list, completions: list, **_: Any) -> list[float | None]:
        found = [None if len(text.split()) % 2 else float(len(text)) / 30 for text in completions]
        self.given[-1] = (self.given[-1][0], found)
        return found


@pytest.fixture(scope="module", params=list(TRAINERS))
def observed(request, tmp_path_factory) -> Any:
    """A run of each trainer with all numbers of its batches: (trainer, rows, completions, rewards)."""
    folder, rewards = tmp_path_factory.mktemp(request.param), Rewards()
    trainer = limited(
        request.param, folder, witness=True, max_kl=LIMIT, max_steps=3, temperature=0.8, max_grad_norm=0.5,
        reward_funcs=[rewards.first, rewards.second], reward_weights=rewards.weights,
    )  # fmt: skip
    rows = records_of(trainer)
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return trainer, rows, completions, rewards


def test_divergences_are_those_of_the_generation_batch(observed):
    trainer, rows, _, _ = observed
    witness, kind = trainer.witness, type(trainer).__name__
    start = witness.batches[0].old
    for row, batch, kept, proposed in zip(rows, witness.batches, witness.kept, witness.proposed, strict=True):
        anchor, trust, rollout = row["anchor"], row["trust"], batch.rollout
        p, q, ref = (logps(rollout, weights, trainer.temperature) for weights in (batch.old, kept, start))
        lengths = rollout.response_mask.sum(1)
        kl, ids = dense_kl(p, q), rollout.response_ids[rollout.response_mask].unsqueeze(1)
        ratios = (q - p).gather(1, ids).squeeze(1).exp()
        log_ratio = (p - ref).gather(1, ids).squeeze(1)
        estimate = log_ratio if "RLOO" in kind else (-log_ratio).exp() - 1 + log_ratio
        exact = torch.stack([each.sum() for each in dense_kl(p, ref).split(lengths.tolist())])
        wanted = {
            "kl": kl.mean(), "kl_max": kl.max(), "tv": (p.exp() - q.exp()).abs().sum(1).mean() / 2,
            "kl_response_max": max(each.sum() for each in kl.split(lengths.tolist())), "max_ratio": ratios.max(),
            "kl_proposed": kls(rollout, batch.old, proposed, trainer.temperature).mean(),
        }  # fmt: skip
        assert {name: trust[name] for name in wanted} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, rel=2e-3, abs=1e-6
        )
        assert trust["ratio_quantiles"]["0.95"] == pytest.approx(float(ratios.log().quantile(0.95).exp()), rel=1e-3)
        assert (trust["limit"], trust["guaranteed"], trust["stopped"]) == (LIMIT, LIMIT, False)
        wanted = {
            "kl_exact": exact.mean(), "kl_stderr": exact.std() / math.sqrt(len(exact)), "kl_per_token": estimate.mean(),
            "kl": estimate.sum() / len(lengths),
        }  # fmt: skip
        assert {name: anchor[name] for name in wanted} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, rel=2e-3, abs=2e-6
        )
        assert row["length"] == pytest.approx(float(lengths.float().mean()))
    assert rows[0]["anchor"]["kl_exact"] == 0.0 and rows[2]["anchor"]["kl_exact"] > 1e-3


def test_certificates_are_those_of_the_definition(observed):
    """The rewards are computed again from each row's text: TRL shuffles the rows after it has logged them."""
    trainer, rows, _, rewards = observed
    decode = tiny.tokenizer().batch_decode
    for row, batch, kept in zip(rows, trainer.witness.batches, trainer.witness.kept, strict=True):
        rollout = batch.rollout
        texts = decode(rollout.response_ids, skip_special_tokens=True)
        given = zip(rewards.first([], texts), rewards.second([], texts), strict=True)
        rewards.given.pop()
        scores = torch.tensor([a + 0.5 * (b or 0.0) for a, b in given], dtype=torch.float64)
        p, q = (logps(rollout, weights, trainer.temperature) for weights in (batch.old, kept))
        wanted = by_definition(scores, p, q, rollout, horizon=trainer.args.max_completion_length)
        found = dict(row["trust"]["certificate"])
        assert found.pop("smallest") == wanted.pop("smallest")
        needed, wanted_needed = found.pop("kl_needed"), wanted.pop("kl_needed")
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-6)
        assert (needed is None) == (wanted_needed is None)
        assert needed is None or needed == pytest.approx(wanted_needed, rel=1e-2, abs=1e-6)


def test_rewards_and_what_trl_logs(observed):
    trainer, rows, _, rewards = observed
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for row, log, (first, second) in zip(rows, logs, rewards.given, strict=True):
        known = [reward for reward in second if reward is not None]
        assert 0 < len(known) < len(second)
        expected = {"first": sum(first) / len(first), "second": sum(known) / len(known)}
        assert row["rewards"] == pytest.approx(expected, rel=1e-5)
        totals = [a + 0.5 * (b or 0.0) for a, b in zip(first, second, strict=True)]
        assert row["score"] == pytest.approx(sum(totals) / len(totals), rel=1e-5)
        assert row["entropy"] == log["entropy"] and row["eos_rate"] == 1 - log["completions/clipped_ratio"]
        assert row["trust"]["gated"] == log["clip_ratio/region_mean"] and row["lr"] == log["learning_rate"]
        norm = row["gradient"]["norm"]
        assert norm == log["grad_norm"] and row["gradient"]["scale"] == pytest.approx(min(1, 0.5 / norm), rel=1e-5)
        assert 0 < row["seconds"]["measure"] < row["seconds"]["total"]
        assert row["seconds"]["total"] == pytest.approx(log["step_time"] + row["seconds"]["measure"])


def test_completions_are_rows_with_their_weighted_rewards(observed):
    trainer, rows, completions, rewards = observed
    assert [row["update"] for row in completions] == [row["update"] for row in rows for _ in range(8)]
    scores = [a + 0.5 * (b or 0.0) for given in rewards.given for a, b in zip(*given, strict=True)]
    assert [row["score"] for row in completions] == pytest.approx(scores)
    tokenizer, texts = tiny.tokenizer(), []
    for batch in trainer.witness.batches:
        rollout = batch.rollout
        ids = [row[mask] for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        texts += [[str(batch.first), text] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert sorted([str(row["update"]), row["completion"]] for row in completions) == sorted(texts)
    prompts = {tiny.without_special(prompt) for prompt in tiny.prompts()["prompt"]}
    assert {tiny.without_special(row["prompt"]) for row in completions} <= prompts
    assert completions[0]["ref_logp"] is None


def test_the_numbers_are_in_trls_logs(observed):
    trainer, rows, _, _ = observed
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for row, log in zip(rows, logs, strict=True):
        flat = flatten(row)
        # `gradient.norm` is known only with the log, of which trust and anchor have no part.
        wanted = {
            key: float(value)
            for key, value in flat.items()
            if key.startswith(("trust/", "anchor/")) and type(value) in (int, float)
        }
        assert {key: log[key] for key in log if key.startswith(("trust/", "anchor/"))} == pytest.approx(wanted)
        assert {"trust/kl", "trust/scale", "trust/kl_response_max", "anchor/kl_exact", "anchor/kl_per_token"} <= set(
            log
        )


def test_the_numbers_of_several_windows_are_averaged_in_a_log(tmp_path):
    trainer = limited("grpo", tmp_path, max_kl=LIMIT, logging_steps=2, max_steps=4)
    rows = records_of(trainer)
    means = [sum(row["trust"]["kl"] for row in rows[i : i + 2]) / 2 for i in (0, 2)]
    assert logged(trainer, "trust/kl") == pytest.approx(means) and len(rows) == 4


class Tracker(TrainerCallback):
    """Keeps what a tracker is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_trackers_get_the_numbers_whatever_their_place(tmp_path):
    trainer = trainer_of("grpo", tmp_path, max_steps=2)
    before, after = Tracker(), Tracker()
    for callback in (before, TrustRegionCallback(trainer, max_kl=LIMIT), after):
        trainer.add_callback(callback)
    trainer.train()
    for tracker in (before, after):
        assert [log["trust/kl"] for log in tracker.logs if "trust/kl" in log] == logged(trainer, "trust/kl")
    assert len(logged(trainer, "trust/kl")) == 2


# -- the anchor --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_the_exact_anchor_is_known_where_a_reference_can_be_had(kind, lora, beta, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    model = type(tiny.llama()).from_pretrained(tmp_path / "model")
    trainer = limited(
        kind, tmp_path / "run", model=model, peft_config=tiny.lora() if lora else None, beta=beta, max_steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    rows = records_of(trainer)
    known = lora or beta > 0
    for name in ("kl_exact", "kl_stderr"):
        assert [row["anchor"][name] is not None for row in rows] == [known] * 2, name
    assert [row["anchor"]["kl"] is not None for row in rows] == [known] * 2
    if known:
        assert rows[0]["anchor"]["kl_exact"] == pytest.approx(0.0, abs=1e-6) and rows[1]["anchor"]["kl_exact"] > 1e-4
    assert rows[0]["anchor"]["coef"] == beta


def test_the_anchor_can_be_left_out(tmp_path):
    rows = records_of(limited("grpo", tmp_path, anchor=False, max_steps=2))
    assert {row["anchor"]["kl_exact"] for row in rows} == {None}
    assert rows[1]["anchor"]["kl_per_token"] is not None, "TRL's own KL is on record"


@KINDS
@pytest.mark.parametrize("first", [True, False])
def test_an_adaptive_coefficient_and_its_target_are_those_of_the_window(kind, first, tmp_path):
    trainer = trainer_of(kind, tmp_path, max_steps=4)
    callbacks = [
        AdaptiveKLCallback(DUAL, trainer=trainer), TrustRegionCallback(trainer, max_kl=LIMIT),
        BoundReportCallback(report=False),
    ]  # fmt: skip
    for callback in callbacks if first else reversed(callbacks):
        trainer.add_callback(callback)
    rows = records_of(trainer)
    used = [{beta for beta, _ in trainer.seen[step]} for step in range(4)]
    assert [{row["anchor"]["coef"]} for row in rows] == used and len({*itertools.chain(*used)}) > 1
    assert [row["anchor"]["coef"] for row in rows] == logged(trainer, "kl/coef") == logged(trainer, "anchor/coef")
    for row in rows:
        assert row["anchor"]["target_per_token"] == TARGET
        assert row["anchor"]["target"] == pytest.approx(TARGET * row["length"])
    assert logged(trainer, "anchor/target_per_token") == [TARGET] * 4


# -- together with a report --------------------------------------------------------------------------------------------


def test_two_report_callbacks_are_an_error(tmp_path):
    trainer = limited("grpo", tmp_path)
    trainer.add_callback(BoundReportCallback(report=False))
    with pytest.raises(ConfigError, match="got 2 BoundReportCallbacks; each would write every record. Give yours in"):
        trainer.train()
    trainer.remove_callback(BoundReportCallback)
    assert len(records_of(trainer)) == 5


@KINDS
def test_a_report_can_be_made(kind, tmp_path, capsys):
    records_of(limited(kind, tmp_path, max_kl=LIMIT, lr_target=LIMIT, max_steps=3))
    assert main(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    assert next(tmp_path.rglob("report.html")).stat().st_size > 10_000
    assert all(row["trust"]["guaranteed"] == LIMIT for row in load_records(tmp_path))


def test_tool_outputs_do_not_count(tmp_path):
    """TRL masks them out by `tool_mask`."""
    trainer = limited("grpo", tmp_path, max_kl=LIMIT, max_steps=2)
    trainer.callback_handler.callbacks.insert(0, witness := Witness(trainer))
    generate = trainer._generate_and_score_completions

    def with_tools(inputs: Any) -> Any:
        found = generate(inputs)
        found["tool_mask"] = (
            (torch.arange(found["completion_mask"].shape[1]) != 1).long().expand_as(found["completion_mask"])
        )
        return found

    trainer._generate_and_score_completions = with_tools
    rows = records_of(trainer)
    for row, batch, kept in zip(rows, witness.batches, witness.kept, strict=True):
        mask = batch.rollout.response_mask
        counts = mask.clone()
        counts[:, 1] = False
        values = torch.zeros(mask.shape, dtype=torch.float64)
        values[mask] = kls(batch.rollout, batch.old, kept)
        assert row["trust"]["kl"] == pytest.approx(float(values[counts].mean()), rel=1e-3)
        assert row["trust"]["kl"] != pytest.approx(float(values[mask].mean()), rel=1e-3)
    assert generated(trainer._buffered_inputs).response_mask.any()
