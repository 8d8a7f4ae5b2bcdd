"""PPO under FSDP2, ZeRO-2 and ZeRO-3 in two processes: equal to one process with twice the batch, within its limits,
resumable, saved as usual.

This file is also the program that each of the two processes runs, with an engine and some kinds of training.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests import sharded, tiny
from tests.dense import dense_kl, rollout_logps
from tests.processes import ROOT, in_two_processes
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.policy import exact_kl
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.quantization import is_quantized
from trl_trustkl.trust.limits import TrustRegion
from trl_trustkl.types import Batch, Measurement, UpdateStats

NEWEST = pytest.mark.skipif(Version(trl.__version__) < Version("1.13"), reason="PPO does not depend on TRL's trainers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.processes, NEWEST]
LIMIT, UPDATES, PANICS = 2e-3, 4, 3
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"peft_config": None}, "qlora": {}}
FAST = [("fsdp2", "lora"), ("fsdp2", "full"), ("zero3", "lora")]
SLOW = [
    ("fsdp2", "qlora"),
    ("zero3", "full"),
    ("zero3", "qlora"),
    ("zero2", "lora"),
    ("zero2", "full"),
    ("zero2", "qlora"),
]
EVERY = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
COUNTED = [case for case in EVERY if "qlora" not in getattr(case, "values", case)]
SETTINGS = {
    "num_mini_batches": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_steps": UPDATES,
    "trust_max_kl": LIMIT,
    "trust_coef": 0.1,
    "trust_estimator": "exact",
    "kl_estimator": "exact",
    "kl_placement": "both",
    "whiten_rewards": True,
    "attribution_every": 2,
    "clip_rule": "troll",
    "clip_kwargs": {"limit": 1e-3},
}
ROWS = {1: 4, 2: 2}
"""Rows of a micro-batch, by the number of processes."""


@functools.cache
def four_bit() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return tiny.four_bit(Path(folder), storage=torch.float32)


class Watched(TrustKLPPOTrainer):
    """Computes the KL of every update again: dense, in float64, from weights that are gathered before and after it.

    The update PANICS is rolled back for its KL. kept: what that must restore, from before the update.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dense: list[float] = []

    def optimise(self, batch: Batch) -> UpdateStats:
        if batch.scored.without is None:
            self.before = {
                name: sharded.whole(p) for name, p in self.model.policy.named_parameters() if p.requires_grad
            }
            self.kept = self.everything()
        return super().optimise(batch)

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        if self.state.global_step + 1 == PANICS:
            region = self.parts.trust_region
            self.parts.trust_region = TrustRegion(region.limits._replace(panic_kl=1e-12))
            measured = super().enforce(batch, proposed)
            self.parts.trust_region = region
            for one, other in zip(self.kept, self.everything(), strict=True):
                assert torch.equal(one, other), "the rollback changed something"
            assert measured.kl < 1e-12 and batch.context.rejected is not None
            return measured
        return super().enforce(batch, proposed)

    def everything(self) -> list[Tensor]:
        """This process's part of the trained weights and of the optimizer's state."""
        found = [sharded.own(p) for p in trainable(self.model)]
        for state in self.optimizer.state.values():
            found += [sharded.own(each) for each in state.values() if isinstance(each, Tensor)]
        return found

    def plain(self) -> nn.Module:
        """A plain model with the same frozen weights."""
        if is_quantized(self.model.policy):
            return get_peft_model(copy.deepcopy(four_bit()).dequantize(), tiny.lora())
        return tiny.adapted() if self.is_peft_model else tiny.llama()

    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> Any:
        after = {name: sharded.whole(p) for name, p in self.model.policy.named_parameters() if p.requires_grad}
        witness = self.plain().double()
        rollout = batch.scored.rollout
        rows = []
        for weights in (self.before, after):
            witness.load_state_dict({name: weight.double() for name, weight in weights.items()}, strict=False)
            with torch.no_grad():
                rows.append(rollout_logps(witness, rollout, self.args.temperature))
        kl = dense_kl(*rows)
        total = self.parts.processes.sum(torch.stack([kl.sum(), torch.tensor(float(len(kl)), dtype=torch.float64)]))
        self.dense.append(float(total[0] / total[1]))
        return super().record(batch, stats, measured)


def trained(folder: Path, kind: str, processes: int, *, resume: Any = None, **changes: Any) -> Watched:
    changes = SETTINGS | {"per_device_train_batch_size": ROWS[processes], "use_cpu": processes == 1} | changes
    model = copy.deepcopy(four_bit()) if kind == "qlora" else tiny.llama()
    trainer = tiny.trainer(folder, model, kind=Watched, changes=changes, **KINDS[kind])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def many_updates(folder: Path, engine: str, kind: str) -> None:
    """50 updates at a learning rate at which each of them proposes a KL beyond the limit."""
    sharded.on_cpus(engine)
    changes = {"learning_rate": 2e-2, "attribution_every": 0, "num_ppo_epochs": 1, "max_steps": 50, "max_refused": 50}
    trainer = trained(folder / kind, kind, 2, **changes)
    (folder / f"{kind}-rank{trainer.parts.processes.index}.json").write_text(json.dumps(trainer.dense))


def weights(trainer: Watched) -> dict[str, Tensor]:
    return {name: sharded.whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}


def is_sharded(trainer: Watched, engine: str) -> bool:
    """Whether this process has a part of what the engine shards."""
    parameters = list(trainer.model.parameters())
    if engine == "fsdp2":
        return all(isinstance(p, DTensor) for p in parameters)
    if engine == "zero3":
        return all(p.shape == (0,) and p.ds_tensor.numel() == -(-p.ds_numel // 2) for p in parameters)
    moments = sum(entry["exp_avg"].numel() for entry in trainer.optimizer.state.values())
    count = sum(p.numel() for p in parameters if p.requires_grad)
    return len(trainer.optimizer.state) > 5 and moments < 0.6 * count


def bytes_held(trainer: Watched, engine: str) -> dict[str, int]:
    """Bytes of the policy's tensors on this process."""
    weights = list(trainer.model.policy.parameters())
    trained = [p for p in weights if p.requires_grad]
    local, state = trainer.parts.sharding.local, trainer.optimizer.state
    masters = 0 if engine == "fsdp2" else sum(local(p).nbytes for p in trained)
    reference = trainer.reference.model
    return {
        "weights": sum(sharded.own(p).nbytes for p in weights) + masters,
        "moments": sum(sharded.own(e).nbytes for p in trained for name, e in state[p].items() if name != "step"),
        "reference": 0 if reference is None else sum(sharded.own(p).nbytes for p in reference.parameters()),
    }


def program(folder: Path, engine: str, *kinds: str) -> None:
    if "qlora" in kinds:
        four_bit()  # without an engine: transformers saves and loads by other rules with one
    sharded.on_cpus(engine)
    differing_chunks()
    for kind in kinds:
        straight = trained(folder / kind, kind, 2, save_strategy="steps", save_steps=2)
        assert is_sharded(straight, engine), "nothing is sharded"
        assert straight.accelerator.num_processes == 2
        resumed = trained(folder / f"{kind}-resumed", kind, 2, resume=str(folder / kind / "checkpoint-2"))
        for one, other in zip(straight.everything(), resumed.everything(), strict=True):
            assert torch.equal(one, other), "the resumed run differs"
        found = weights(straight)
        straight.save_model(str(folder / f"{kind}-saved"))
        rank = straight.parts.processes.index
        save_file(found, folder / f"{kind}-rank{rank}.safetensors")
        (folder / f"{kind}-rank{rank}.json").write_text(json.dumps(straight.dense))
        (folder / f"{kind}-bytes{rank}.json").write_text(json.dumps(bytes_held(straight, engine)))


def differing_chunks() -> None:
    """Let the processes call the output head a different number of times, as for responses of different lengths and a
    vocabulary of the usual size."""
    exact_kl.CHUNK_ELEMENTS = tiny.VOCAB * (3 if os.environ["RANK"] == "0" else 7)


def resumed(folder: Path, engine: str, *kinds: str) -> None:
    """Continue runs of one process."""
    sharded.on_cpus(engine)
    for kind in kinds:
        trainer = trained(folder / f"{kind}-two", kind, 2, resume=str(folder / kind / "checkpoint-2"))
        save_file(weights(trainer), folder / f"{kind}-rank{trainer.parts.processes.index}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path | None]:
    """The folders of the runs that were made so far."""
    return {}


@pytest.fixture
def two(engine: str, kind: str, runs: dict[Any, Path | None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes, which is made once."""
    sharded.require(engine)
    if (engine, kind) not in runs:
        runs[engine, kind] = None  # if it fails, it is not tried again
        kinds = ["lora", "full"] if engine == "fsdp2" and kind != "qlora" else [kind]
        made = tmp_path_factory.mktemp(engine)
        in_two_processes("-m", "tests.end_to_end.test_sharded", str(made), engine, *kinds, cwd=made)
        runs.update({(engine, each): made for each in kinds})
    if (folder := runs[engine, kind]) is None:
        pytest.fail("the run failed")
    return folder


def known(counterfactual: dict[str, float | None] | None) -> dict[str, float]:
    return {name: kl for name, kl in (counterfactual or {}).items() if kl is not None}


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_two_processes_with_shards_equal_one_with_twice_the_batch(two: Path, tmp_path: Path, kind: str) -> None:
    one = trained(tmp_path, kind, 1)
    expected = weights(one)
    for rank in range(2):
        found = load_file(two / f"{kind}-rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5 if kind == "qlora" else 2e-6)
    for mine, theirs in zip(load_records(two / kind), load_records(tmp_path), strict=True):
        for key in ("kl", "kl_max", "kl_proposed", "scale"):
            assert mine["trust"][key] == pytest.approx(theirs["trust"][key], rel=1e-3), key
        assert mine["anchor"]["kl_exact"] == pytest.approx(theirs["anchor"]["kl_exact"], rel=1e-4, abs=1e-9)
        assert mine["gradient"]["norm"] == pytest.approx(theirs["gradient"]["norm"], rel=1e-4)
        without, expected_without = (known(each["counterfactual"]) for each in (mine, theirs))
        assert without.keys() == expected_without.keys()
        for name, kl in without.items():
            assert kl == pytest.approx(expected_without[name], rel=1e-3), name
    assert mine["counterfactual"]["clip"] is not None


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_one_process_resumes_a_run_of_two(two: Path, tmp_path: Path, kind: str) -> None:
    one = trained(tmp_path, kind, 1, resume=str(two / kind / "checkpoint-2"))
    expected = load_file(two / f"{kind}-rank0.safetensors")
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5 if kind == "qlora" else 2e-6)
    assert [record["update"] for record in load_records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_two_processes_resume_a_run_of_one(tmp_path: Path, engine: str) -> None:
    sharded.require(engine)
    kinds = ("lora", "full")
    expected = {kind: weights(trained(tmp_path / kind, kind, 1, save_strategy="steps", save_steps=2)) for kind in kinds}
    in_two_processes("-m", "tests.end_to_end.test_sharded", str(tmp_path), engine, *kinds, "resume", cwd=tmp_path)
    for kind, rank in itertools.product(kinds, range(2)):
        for name, weight in load_file(tmp_path / f"{kind}-rank{rank}.safetensors").items():
            torch.testing.assert_close(weight, expected[kind][name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("engine", "kind"), EVERY)
def test_the_limit_holds_and_the_recorded_kl_is_that_of_the_gathered_weights(two: Path, kind: str) -> None:
    dense, again = (json.loads((two / f"{kind}-rank{rank}.json").read_text()) for rank in range(2))
    records = load_records(two / kind)
    assert dense == again and len(dense) == len(records) == UPDATES
    for record, kl in zip(records, dense, strict=True):
        assert record["trust"]["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-8)
        assert kl <= LIMIT + 1e-7 and (record["update"] == PANICS) == (kl < 1e-12) == (record["refused"] is not None)
    assert any(0 < record["trust"]["scale"] < 1 for record in records), "no update was scaled back"


@pytest.mark.parametrize(("engine", "kind"), EVERY)
@pytest.mark.parametrize("saved", ["{}-saved", "{}/checkpoint-4"])
def test_saved_files_load_in_a_plain_process(two: Path, kind: str, saved: str) -> None:
    folder = two / saved.format(kind)
    if kind != "full":
        base = copy.deepcopy(four_bit()) if kind == "qlora" else tiny.llama()
        assert not list(folder.glob("model*.safetensors")), "the base model was saved too"
        model: nn.Module = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    expected = load_file(two / f"{kind}-rank0.safetensors")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) > 5
    for name, weight in found.items():
        assert torch.equal(weight, expected[f"policy.{name}"]), name


@pytest.mark.parametrize(("engine", "kind"), COUNTED)
def test_each_process_holds_what_the_example_counts(two: Path, engine: str, kind: str) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "sharded_memory.py"))
    shape = example["shapes"](tiny.llama().config, None if kind == "full" else tiny.lora().r)
    if kind == "lora":  # the tests adapt fewer layers than the example
        shape = shape._replace(trained=sum(p.numel() for p in tiny.tuned().parameters() if p.requires_grad))
    name = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[engine]
    expected = example["held"](name, shape, 2, full=kind == "full", low=4)
    both = [json.loads((two / f"{kind}-bytes{rank}.json").read_text()) for rank in range(2)]
    found = {key: sum(each[key] for each in both) / 2 for key in both[0]}
    assert found["weights"] == pytest.approx(expected["weights"], rel=0.05)
    assert found["moments"] == pytest.approx(expected["gradients and moments"] * 2 / 3, rel=0.05)
    assert found["reference"] == pytest.approx(expected["reference"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_no_update_of_50_exceeds_the_limit(tmp_path: Path, engine: str, kind: str) -> None:
    sharded.require(engine)
    in_two_processes("-m", "tests.end_to_end.test_sharded", str(tmp_path), engine, kind, "50", cwd=tmp_path)
    dense = json.loads((tmp_path / f"{kind}-rank0.json").read_text())
    records = load_records(tmp_path / kind)
    assert len(dense) == len(records) == 50
    assert max(dense) <= LIMIT + 1e-7 and max(record["trust"]["kl"] for record in records) <= LIMIT
    assert sum(record["trust"]["kl_proposed"] > LIMIT for record in records) > 40
    for record, kl in zip(records, dense, strict=True):
        assert record["trust"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)


if __name__ == "__main__":
    if sys.argv[-1] == "50":
        many_updates(Path(sys.argv[1]), *sys.argv[2:4])
    elif sys.argv[-1] == "resume":
        resumed(Path(sys.argv[1]), *sys.argv[2:-1])
    else:
        program(Path(sys.argv[1]), *sys.argv[2:])
