"""Two processes with a batch of n each against one process with 2n: equal numbers and decisions, and one writer.

Both get the same responses: `Forced` derives them from the prompt and the update. This file is also the program that each
of the two processes runs, once for all cases.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.processes import in_two_processes
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.errors import DataError
from trl_trustkl.policy.loading import trainable
from trl_trustkl.types import Measurement, Prompts, Rollout, UpdateStats

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]
EOS, UPDATES, LIMIT, STOP = 2, 3, 2e-3, 2e-3
EVERYTHING = {
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 50,
    "trust_controller": "pid",
    "trust_coef": 0.1,
    "trust_target": 0.01,
    "trust_lr_target": 0.003,
    "whiten_rewards": True,
}
WITHOUT_VALUE = {key: value for key, value in EVERYTHING.items() if key != "whiten_rewards"} | {"num_generations": 8}
"""One group, whose first half is on the first process."""
FULL = {"peft_config": None}
# What both sides of a comparison have in common: changes of the configuration, and further arguments.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA, shared head": (EVERYTHING | {"detach_value_head": False, "trust_max_kl": LIMIT}, {}),
    "LoRA, exact anchor in reward and loss": (EVERYTHING | {"kl_estimator": "exact", "kl_placement": "both"}, {}),
    "LoRA, early stop": ({"trust_stop": STOP, "num_ppo_epochs": 6}, {}),
    "LoRA, corrected for the sampler": (
        EVERYTHING | {"kl_estimator": "k3", "kl_placement": "both", "vllm_importance_sampling_clip_max": 1.0},
        {"corrects": True},
    ),
    "LoRA, response masks": (
        EVERYTHING | {"response_mask_kl": 5e-3, "num_ppo_epochs": 3, "detach_value_head": False},
        {},
    ),
    "full, projections": (
        {"clip_rule": "troll", "clip_kwargs": {"limit": 2e-3}, "num_ppo_epochs": 3, "response_mask_kl": 0.02},
        FULL,
    ),
    "LoRA, grpo": (WITHOUT_VALUE | {"advantage_estimator": "grpo", "trust_max_kl": LIMIT}, {}),
    "full, rloo": (
        WITHOUT_VALUE
        | {"advantage_estimator": "rloo", "whiten_advantages": True, "kl_placement": "both", "kl_estimator": "exact"},
        FULL,
    ),
    "full, value head": (EVERYTHING | {"trust_max_kl": LIMIT}, FULL),
    "full, value model": (EVERYTHING | {"trust_stop": STOP, "trust_max_kl": LIMIT}, FULL | {"value_model": True}),
}
ARITHMETIC = {
    1: {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    2: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


class Forced(TrustKLPPOTrainer):
    """A trainer whose responses are given, and which records what it did in each update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[dict[str, Any]] = []

    def rollout(self, prompts: Prompts) -> Rollout:
        """Short responses in the first half of a batch, which the first process has, and long ones in the second, of which one
        has a log-probability that is not finite in the second update, where the loss is corrected."""
        rows = [
            forced_response(row["number"], self.state.global_step, self.args.response_length) for row in prompts.rows
        ]
        ids = torch.tensor(rows)
        mask = ids != 0
        sampler_logp = torch.where(mask, -3.5, 0.0)
        if self.parts.scoring.corrects and self.state.global_step == 1:
            sampler_logp[[row["number"] == NUMBERS - 1 for row in prompts.rows], 0] = torch.nan
        return Rollout(prompts.ids, prompts.mask, ids, mask, sampler_logp, prompts.rows)

    def optimise(self, batch: Any) -> UpdateStats:
        stats = super().optimise(batch)
        self.kept.append(
            {"steps": stats.steps, "stopped": stats.stopped, "unrewarded": _count_nan(batch.scored.scores)}
        )
        return stats

    def enforce(self, batch: Any, proposed: Measurement) -> Measurement:
        measured = super().enforce(batch, proposed)
        lengths = batch.scored.rollout.response_mask.sum(1)
        coefs = [state["coef"] for state in self.parts.coefficients.state_dict().values() if state is not None]
        self.kept[-1] |= {"proposed": proposed.kl, "measured": measured.kl, "scale": batch.context.enforcement.scale}
        self.kept[-1] |= {"coefs": coefs, "longest": int(lengths.max())}
        return measured


def _count_nan(scores: torch.Tensor) -> int:
    return int(scores.isnan().sum())


def forced_response(number: int, update: int, width: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * update + number)
    length = int(torch.randint(1, width // 2 if number < NUMBERS / 2 else width + 1, (), generator=generator))
    tokens = torch.randint(3, tiny.VOCAB, (length,), generator=generator).tolist()
    if length < width:
        tokens[-1] = EOS
    return tokens + [0] * (width - length)


NUMBERS = 16


def even_but_some(prompts: list, completions: list, number: list[int], **_: Any) -> list[float | None]:
    """A reward for all rows of the first process, but not for all of the second."""
    scores = tiny.good_words(prompts, completions)
    return [None if n in UNREWARDED else score for n, score in zip(number, scores, strict=True)]


UNREWARDED = (13, 14)


class InOrder:
    """Batches of prompts in order; the first half of each batch comes from the first half of the prompts."""

    batches_per_pass = 2

    def rows(self, update: int) -> list[int]:
        first = [4 * (update % 2) + i for i in range(4)]
        return first + [NUMBERS // 2 + i for i in first]


def forced(folder: Path, processes: int, changes: dict[str, Any], arguments: dict[str, Any]) -> Forced:
    if arguments.get("value_model"):
        arguments = arguments | {"value_model": tiny.scalar_model(tiny.llama())}
    given = {"model": tiny.llama(), "processing_class": tiny.tokenizer(), "reward_funcs": even_but_some}
    dataset = tiny.prompts(NUMBERS).add_column("number", list(range(NUMBERS)))
    settings = ARITHMETIC[processes] | {"num_mini_batches": 1, "max_steps": UPDATES} | changes
    given |= {"train_dataset": dataset, "peft_config": tiny.lora()} | arguments
    corrects = given.pop("corrects", False)
    trainer = Forced(args=tiny.config(folder, **settings), **given)
    trainer.parts.scoring.corrects = corrects
    trainer.parts.order = InOrder()
    return trainer


def run(folder: Path, processes: int, case: str) -> Forced:
    """Train one case; each process saves its weights and what it recorded next to the folder of the run."""
    trainer = forced(folder, processes, *CASES[case])
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    rank = trainer.accelerator.process_index
    weights = {str(i): p.detach().contiguous() for i, p in enumerate(trainable(trainer.model))}
    save_file(weights, f"{folder}-rank{rank}.safetensors")
    Path(f"{folder}-rank{rank}.json").write_text(json.dumps(trainer.kept))
    return trainer


# -- the program of each of the two processes --------------------------------------------------------------------------


def program(root: Path) -> None:
    writes = watch_writes(root / "runs")
    for case in CASES:
        trainer = run(root / "runs" / case, 2, case)
    trainer.save_model(str(root / "runs" / "saved"))
    said: dict[str, Any] = {}
    for rows in (5, 1):
        kept = trainer.train_dataset.select(range(rows))
        said[f"evaluation of {rows}"] = [trainer.evaluate(kept), len(trainer.evaluate_completions(kept))]
    try:
        tiny.trainer(root / "runs" / "short", changes=ARITHMETIC[2], train_dataset=tiny.prompts(6))
    except DataError as error:
        said["short"] = str(error)
    said["writes"] = sorted(writes)
    (root / f"said-{trainer.accelerator.process_index}.json").write_text(json.dumps(said))


def watch_writes(folder: Path) -> set[str]:
    """What this process will open for writing, create, rename or remove under `folder`."""
    seen: set[str] = set()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) else False
        else:
            writing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if writing and str(args[0]).startswith(f"{folder}{os.sep}") and "-rank" not in str(args[0]):
            seen.add(f"{event} {args[0]}")

    sys.addaudithook(hook)
    return seen


# -- the comparison ----------------------------------------------------------------------------------------------------


def assert_near(one: Any, other: Any, where: str) -> None:
    """Equal up to rounding in numbers and exactly in everything else, except for `seconds`."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_near(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), where
    else:
        assert one == other, where


def compare(one: Path, two: Path, case: str) -> None:
    records, reference = load_records(two / case), load_records(one / case)
    assert len(records) == len(reference) == UPDATES, "more than one process wrote records"
    for record, wanted in zip(records, reference, strict=True):
        assert_near(record, wanted, f"{case}, update {wanted['update']}")
    mine, theirs = (json.loads((two / f"{case}-rank{rank}.json").read_text()) for rank in range(2))
    for here, there, record in zip(mine, theirs, records, strict=True):
        for key in ("steps", "stopped", "proposed", "measured", "scale", "coefs"):
            assert here[key] == there[key], f"{case}: the processes disagree on {key}"
        assert here["longest"] < there["longest"] and here["unrewarded"] == 0
        assert record["trust"]["kl"] == here["measured"], case
        limit = CASES[case][0].get("trust_max_kl")
        assert limit is None or here["measured"] <= limit == record["trust"]["guaranteed"]
    assert sum(there["unrewarded"] for there in theirs) == len(UNREWARDED)
    weights = load_file(f"{one / case}-rank0.safetensors")
    for rank in range(2):
        for name, weight in load_file(f"{two / case}-rank{rank}.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=lambda m: f"{case}: {m}")


def test_two_processes_equal_one_with_twice_the_batch_and_only_the_first_writes(tmp_path):
    two, one = tmp_path / "runs", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    in_two_processes("-m", "tests.end_to_end.test_two_processes_equal_one", str(tmp_path), cwd=tmp_path)
    for case in CASES:
        trainer = run(one / case, 1, case)
        compare(one, two, case)
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2)]
    for rows in (5, 1):
        (metrics, counted), (also, _) = (each[f"evaluation of {rows}"] for each in said)
        assert counted == rows, "an uneven share was padded or cut"
        wanted = trainer.evaluate(trainer.train_dataset.select(range(rows)))
        for key in wanted.keys() - {"eval_runtime"}:
            assert metrics[key] == also[key] == pytest.approx(wanted[key], rel=1e-4), key
    for each in said:
        assert "6 rows" in each["short"] and "one batch of 8" in each["short"] and "processes" in each["short"]
    assert said[1]["writes"] == [] and any("bounds.jsonl" in write for write in said[0]["writes"])
    stops = [json.loads((two / f"LoRA, early stop-rank{rank}.json").read_text()) for rank in range(2)]
    assert any(kept["stopped"] and kept["steps"] < 6 for kept in stops[0]), "no update stopped early"
    corrected = load_records(two / "LoRA, corrected for the sampler")
    assert [record["refused"] is None for record in corrected] == [True, False, True]
    assert all(0 < record["sampler"]["truncated"] < 1 for record in corrected), corrected
    for case in ("LoRA, response masks", "full, projections"):
        trusts = [record["trust"] for record in load_records(two / case)]
        assert any(0 < trust["masked_responses"] < 1 for trust in trusts), (
            f"{case}: no response was left out, or all were"
        )
    projected = load_records(two / "full, projections")
    assert all(record["trust"]["gated"] > 0 for record in projected), "no token was outside of the ball"
    scales = json.loads((two / "LoRA, shared head-rank0.json").read_text())
    assert any(kept["scale"] < 1 for kept in scales), "no update was scaled back"


if __name__ == "__main__":
    program(Path(sys.argv[1]))
