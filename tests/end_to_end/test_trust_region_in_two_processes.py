"""`TrustRegionCallback` in two processes (DDP, FSDP2) with a batch of n each, against one process with 2n: equal numbers and
decisions.

Both get the same completions: `Scripted` derives them from the prompt and the number of the generation. The first process
has short ones, and in one generation none that counts. This file is also the program of each of the two processes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from tests import sharded, tiny
from tests.end_to_end.dense_windows import Judge, Labelled, LabelledGRPO, LabelledRLOO, SetUp, Window, train
from tests.processes import in_two_processes
from tests.tiny import EOS, LIMIT
from trl_trustkl import load_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes]
LONGEST, SHORT = 9, 4
MASKED = 1  # the generation in which the completions of the first process are cut off


class Scripted(Labelled):
    """The completions of a prompt are given: with an even number it gets short ones, with an odd number long ones."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.numbers = [row["number"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def scripted(self) -> list[list[int]]:
        seen: Counter[int] = Counter()
        found = []
        for number in self.numbers:
            found.append(completion(number, len(self.generations), seen[number]))
            seen[number] += 1
        return found


def completion(number: int, generation: int, which: int) -> list[int]:
    generator = torch.Generator().manual_seed(10_000 * generation + 100 * number + which)
    length = int(torch.randint(2, LONGEST if number % 2 else SHORT, (), generator=generator))
    words = torch.randint(EOS + 1, tiny.VOCAB, (length,), generator=generator).tolist()
    return words if generation == MASKED and number % 2 == 0 else [*words, EOS]


class ScriptedGRPO(Scripted, LabelledGRPO):
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self.scripted(), None


class ScriptedRLOO(Scripted, LabelledRLOO):
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self.scripted()


def numbered_prompts() -> Any:
    """A generation batch has two of these prompts: the first process has that with the even number."""
    prompts = tiny.prompts()
    return prompts.add_column("number", list(range(len(prompts))))


def saved_llama(folder: Path) -> nn.Module:
    """A policy that TRL can load again as the reference."""
    if os.environ.get("RANK", "0") == "0":
        tiny.llama().save_pretrained(folder / "policy")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(folder / "policy")


COMMON = {
    "shuffle_dataset": False,
    "mask_truncated_completions": True,
    "max_completion_length": LONGEST,
    "max_steps": 2,
}
TWICE = COMMON | {"num_iterations": 2, "max_steps": 4}
GRPO = SetUp(TWICE, kind=ScriptedGRPO, data=numbered_prompts)
SET_UPS = {
    "GRPO, LoRA": GRPO,
    "GRPO, full": replace(GRPO, changes=COMMON | {"learning_rate": 5e-3}, adapter=None, reference=None),
    "GRPO, full, reference": replace(
        GRPO, changes=COMMON | {"learning_rate": 5e-3, "beta": 0.1}, adapter=None, model=saved_llama, reference="start"
    ),
    "RLOO, LoRA, limit after each step": replace(
        GRPO, changes=TWICE | {"beta": 0.1}, kind=ScriptedRLOO, options={"max_kl": LIMIT, "every": "step"}
    ),
    "GRPO, LoRA, every limit": replace(
        GRPO, options={"max_kl": LIMIT, "max_kl_token": 0.02, "max_kl_response": 0.03, "anchor_max_kl": 0.04}
    ),
}


OFTEN = COMMON | {"max_steps": 50}
FIFTY = {
    "GRPO, LoRA": replace(GRPO, changes=OFTEN | {"learning_rate": 5e-2}, model=saved_llama),
    "RLOO, full": replace(
        GRPO, changes=OFTEN | {"learning_rate": 1e-2, "beta": 0.0}, kind=ScriptedRLOO, adapter=None, reference=None
    ),
}


def program(root: Path, engine: str, setups: dict[str, SetUp]) -> None:
    """Train each set-up in this process and another; keep what the witness and the comparison need."""
    changes: dict[str, Any] = {"per_device_train_batch_size": 2}
    if engine != "ddp":
        # TRL shards a reference without the weights that only the first process has loaded.
        sharded.on_cpus(engine, FSDP_CPU_RAM_EFFICIENT_LOADING=str(setups is FIFTY))
        changes["use_cpu"] = False
    for name, setup in setups.items():
        trainer, keeps = train(replace(setup, changes=setup.changes | changes), root / name)
        assert trainer.accelerator.num_processes == 2
        parameters = list(trainer.model.parameters())
        assert engine != "fsdp2" or all(isinstance(p, DTensor) for p in parameters)
        assert engine != "zero3" or all(p.numel() == 0 < p.ds_numel for p in parameters)
        logged = [{key: entry[key] for key in entry if is_measured(key)} for entry in trainer.state.log_history]
        kept = {"generations": trainer.generations, "proposed": keeps.proposed, "kept": keeps.kept, "logged": logged}
        torch.save(kept, root / f"{name}-{trainer.accelerator.process_index}.pt")


def is_measured(key: str) -> bool:
    return key.startswith(("trust/", "anchor/"))


def windows_of(judge: Judge, kept: dict[str, Any], records: list[dict[str, Any]]) -> list[Window]:
    """One process's parts of the generation batches."""
    keeps = SimpleNamespace(proposed=kept["proposed"], kept=kept["kept"])
    return [judge.window(each, keeps, record) for each, record in zip(kept["generations"], records, strict=True)]


def pooled(parts: list[Window], values: list[float]) -> float:
    """The mean over the tokens of both parts of a batch."""
    counts = [int(part.counts.sum()) for part in parts]
    return sum(count * value for count, value in zip(counts, values, strict=True) if count) / sum(counts)


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the rows of a micro-batch, over which TRL averages some of its metrics."""
    names = ("update", "episode", "score", "length", "eos_rate", "lr", "refused", "rewards", "anchor")
    trust = {name: value for name, value in record["trust"].items() if not name.startswith("gated")}
    return {name: record[name] for name in names} | {"trust": trust}


def assert_near(one: Any, other: Any, where: str) -> None:
    """Equal up to rounding in numbers, and exactly in everything else."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_near(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5), where
    else:
        assert one == other, where


def assert_equal_to_each_other(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["logged"] == ranks[1]["logged"] and any(ranks[0]["logged"]), (
        "the processes measured different numbers"
    )
    for key in ("proposed", "kept"):
        for mine, theirs in zip(ranks[0][key], ranks[1][key], strict=True):
            assert all(map(torch.equal, mine, theirs)), f"the processes differ in the weights {key}"


def assert_limit_over_both_parts(parts: list[Window], every_step: bool) -> None:
    trust = parts[0].record["trust"]
    kls = [pooled(parts, list(each)) for each in zip(*(part.kls for part in parts), strict=True)]
    assert max(kls if every_step else kls[-1:]) <= LIMIT + 1e-6
    assert trust["kl"] == pytest.approx(kls[-1], rel=2e-5) and trust["kl"] <= LIMIT == trust["guaranteed"]
    assert trust["kl_proposed"] == pytest.approx(pooled(parts, [part.proposed for part in parts]), rel=2e-5)


def assert_every_limit_over_both_parts(parts: list[Window], limits: dict[str, float]) -> None:
    """Each process has as many completions; an anchor of one in which no token counts is 0."""
    trust, anchor = parts[0].record["trust"], parts[0].record["anchor"]
    token, response = max(part.token for part in parts), max(part.response for part in parts)
    before, after = (
        sum(each) / 2 for each in zip(*((part.anchor[0], part.anchor_after) for part in parts), strict=True)
    )
    assert trust["kl_max"] == pytest.approx(token, rel=1e-4, abs=1e-6) and token <= limits["max_kl_token"] + 1e-6
    assert trust["kl_response_max"] == pytest.approx(response, rel=1e-4, abs=1e-6)
    assert response <= limits["max_kl_response"] + 1e-6
    assert anchor["kl_after"] == pytest.approx(after, rel=1e-4, abs=1e-6)
    assert after <= max(limits["anchor_max_kl"], before) + 1e-6


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))]
)
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, engine):
    sharded.require(engine)
    in_two_processes("-m", "tests.end_to_end.test_trust_region_in_two_processes", str(tmp_path), engine, cwd=tmp_path)
    for name, setup in SET_UPS.items():
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        assert_equal_to_each_other(ranks)
        one, keeps = train(setup, tmp_path / "one" / name)
        records, wanted = load_records(tmp_path / name), load_records(tmp_path / "one" / name)
        assert len(records) == len(wanted) == 2
        for record, other in zip(records, wanted, strict=True):
            assert_near(compared(record), compared(other), f"{name}, update {record['update']}")
        assert largest_difference(keeps.kept[-1], ranks[0]["kept"][-1]) < 1e-4, name
        judge = Judge(setup, tmp_path, one)
        for index, parts in enumerate(zip(*(windows_of(judge, kept, records) for kept in ranks), strict=True)):
            assert parts[0].counts.shape[1] < parts[1].counts.shape[1], "both processes have the same padding"
            assert parts[0].counts.any() == (index != MASKED) and parts[1].counts.any()
            assert_limit_over_both_parts(parts, setup.options.get("every") == "step")
            if "anchor_max_kl" in setup.options:
                assert_every_limit_over_both_parts(parts, setup.options)
        assert all(0 < record["trust"]["scale"] < 1 for record in records), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_no_update_of_50_exceeds_the_limit(tmp_path, engine):
    sharded.require(engine)
    in_two_processes(
        "-m", "tests.end_to_end.test_trust_region_in_two_processes", str(tmp_path), engine, "50", cwd=tmp_path
    )
    for name, setup in FIFTY.items():
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        records = load_records(tmp_path / name)
        assert len(records) == 50 and sum(record["trust"]["scale"] < 1 for record in records) > 30
        judge = Judge(setup, tmp_path, setup.trainer(tmp_path / "judge"))
        for parts in zip(*(windows_of(judge, kept, records) for kept in ranks), strict=True):
            assert_limit_over_both_parts(parts, every_step=False)


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2], FIFTY if sys.argv[-1] == "50" else SET_UPS)
