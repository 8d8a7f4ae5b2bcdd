"""Checkpoints of toy parts: they are restored bit for bit, leave nothing if they fail, and are found to resume from."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.processes import single_process
from trl_trustkl.errors import CheckpointError, SaveError
from trl_trustkl.run import checkpoint_folder, checkpointer
from trl_trustkl.run.checkpointer import POLICY_FILE, RNG_FILE, RUN_FILE, VALUE_FILE, Checkpointer
from trl_trustkl.run.weights import TrainedWeights


class Toy:
    """A part whose state is one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


NUMBERS = {
    "resumable": True,
    "third": 1 / 3,
    "tiny": 5e-324,
    "big": 2**80,
    "text": "π",
    "none": None,
    "list": [1.5, True],
}
BITS = torch.tensor([1e-40, -0.0, math.pi, math.inf])


def model(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


class Run:
    """A run of toy parts, the policy in full precision and a value in bf16 of which one weight is not trained."""

    def __init__(self, seed: int, *, fresh: bool = False) -> None:
        self.policy, self.value = model(seed), model(seed + 100, torch.bfloat16)
        self.value[0].bias.requires_grad_(False)
        self.run = Toy(None if fresh else NUMBERS)
        self.optimizer = Toy(None if fresh else {"state": {0: {"step": torch.tensor(3.0), "bits": BITS}}, "lr": 0.1})
        self.rng = Toy(None if fresh else [[1, 2], [3, 4]])
        self.files: dict[str, torch.Tensor] | None = None
        self.checkpointer = Checkpointer(self.parts(), single_process(), self.write_model, writes=True)

    def parts(self) -> dict[str, Any]:
        return {
            POLICY_FILE: TrainedWeights(self.policy),
            VALUE_FILE: TrainedWeights(self.value),
            RUN_FILE: self.run,
            "optimizer.pt": self.optimizer,
            RNG_FILE: self.rng,
        }

    def write_model(self, folder: Path, gathered: Any) -> None:
        """The model's own files: nothing of the policy, or some of its weights."""
        (folder / "config.json").write_text("{}")
        if self.files:
            save_file(self.files, folder / "model-00001-of-00002.safetensors")


NAMES = (POLICY_FILE, VALUE_FILE, RUN_FILE, "optimizer.pt", RNG_FILE)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name


def contents(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- saving and loading ------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved, loaded = Run(1), Run(2, fresh=True)
    frozen = loaded.value[0].bias.detach().clone()
    saved.checkpointer.save(tmp_path / "checkpoint-1")
    loaded.checkpointer.load(tmp_path / "checkpoint-1", *NAMES)
    assert_same_weights(loaded.policy, saved.policy)
    assert torch.equal(loaded.value[0].bias, frozen), "a weight that is not trained was loaded"
    loaded.value[0].bias.data.copy_(saved.value[0].bias)
    assert_same_weights(loaded.value, saved.value)
    assert loaded.run.value == NUMBERS and loaded.rng.value == [[1, 2], [3, 4]]
    state = loaded.optimizer.value
    assert state["lr"] == 0.1 and torch.equal(state["state"][0]["bits"].view(torch.int32), BITS.view(torch.int32))
    assert checkpoint_folder.damage(tmp_path / "checkpoint-1") is None


def test_only_the_parts_that_are_named_are_loaded(tmp_path):
    saved, loaded = Run(1), Run(2, fresh=True)
    saved.checkpointer.save(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "unheard_of.json").write_text("1")
    before = weights(loaded.policy)
    loaded.checkpointer.load(tmp_path / "checkpoint-1", RUN_FILE, "unheard_of.json", "not_there.json")
    assert loaded.run.value == NUMBERS and loaded.rng.value is None and loaded.optimizer.value is None
    assert all(map(torch.equal, weights(loaded.policy), before))


def test_loading_does_not_tie_a_part_to_the_file(tmp_path):
    """The folder may be deleted while the run continues."""
    saved, loaded = Run(1), Run(2, fresh=True)
    saved.checkpointer.save(tmp_path / "checkpoint-1")
    loaded.checkpointer.load(tmp_path / "checkpoint-1", *NAMES)
    checkpoint_folder.discard(tmp_path / "checkpoint-1")
    assert_same_weights(loaded.policy, saved.policy)


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_weights_in_the_models_own_files_are_not_written_twice(shared, tmp_path):
    saved, loaded = Run(1), Run(2, fresh=True)
    named = dict(saved.policy.named_parameters())
    saved.files = {name: named[name].detach() for name in list(named)[:shared]}
    saved.files["of.the.model"] = torch.zeros(1)
    saved.checkpointer.save(tmp_path / "checkpoint-1")
    folder = tmp_path / "checkpoint-1"
    rest = set(load_file(folder / POLICY_FILE)) if (folder / POLICY_FILE).exists() else set()
    assert rest == set(list(named)[shared:])
    loaded.checkpointer.load(folder, POLICY_FILE)
    assert_same_weights(loaded.policy, saved.policy)


def test_weights_of_the_value_are_written_whatever_the_model_has_by_their_names(tmp_path):
    """Policy and value may be models of the same kind."""
    saved, loaded = Run(1), Run(2, fresh=True)
    saved.files = {name: p.detach() for name, p in saved.policy.named_parameters()}
    saved.checkpointer.save(tmp_path / "checkpoint-1")
    loaded.checkpointer.load(tmp_path / "checkpoint-1", VALUE_FILE)
    assert torch.equal(loaded.value[1].weight, saved.value[1].weight)


def test_parts_may_be_left_out(tmp_path):
    saved, loaded = Run(1), Run(2, fresh=True)
    saved.checkpointer.save(tmp_path / "checkpoint-1", without=("optimizer.pt", RNG_FILE))
    assert set(contents(tmp_path / "checkpoint-1")) == {
        POLICY_FILE,
        VALUE_FILE,
        RUN_FILE,
        "config.json",
        "manifest.json",
    }
    loaded.checkpointer.load(tmp_path / "checkpoint-1", *NAMES)
    assert loaded.run.value == NUMBERS and loaded.optimizer.value is None and loaded.rng.value is None


def test_a_process_that_does_not_write_takes_part_and_leaves_nothing(tmp_path):
    asked = []

    class Asked(Toy):
        def state_dict(self) -> Any:
            asked.append(True)  # where several processes gather their states
            return super().state_dict()

    silent = Checkpointer({RNG_FILE: Asked([])}, single_process(), lambda *given: asked.append(given), writes=False)
    silent.save(tmp_path / "checkpoint-1")
    assert asked == [True] and contents(tmp_path) == {}


@pytest.mark.parametrize("fails", [False, True])
def test_one_part_after_the_other_is_gathered_and_all_are_also_where_writing_fails(tmp_path, monkeypatch, fails):
    """Other processes would wait in the gathering of a part that the writing process skipped."""
    done = []

    class Gathered(Toy):
        def state_dict(self) -> Any:
            done.append(f"gathered {self.value}")
            return super().state_dict()

    def write(path: Path, state: Any) -> None:
        done.append(f"wrote {state}")
        if fails:
            raise OSError(28, "No space left on device")
        path.write_text(json.dumps(state))

    def gather_model() -> str:
        done.append("gathered model")
        return "model"

    parts = {"1.json": Gathered(1), "2.json": Gathered(2)}
    monkeypatch.setattr(checkpointer, "_write", write)
    saver = Checkpointer(
        parts, single_process(), lambda folder, model: done.append(f"wrote {model}"), writes=True,
        gather_model=gather_model,
    )  # fmt: skip
    with pytest.raises(SaveError) if fails else nullcontext():
        saver.save(tmp_path / "checkpoint-1")
    each = ["gathered model", "wrote model", "gathered 1", "wrote 1", "gathered 2", "wrote 2"]
    assert done == (each[:-1] if fails else each)


# -- failures ----------------------------------------------------------------------------------------------------------


class Broken(Toy):
    """A state that its format cannot hold."""


def failing(kind: str, tmp_path: Path) -> Checkpointer:
    def fail(folder: Path, gathered: Any) -> None:
        (folder / "half").write_text("of it")
        raise OSError(28, "No space left on device")

    run = Run(3)
    parts = run.parts()
    if kind == "json":
        parts[RUN_FILE] = Broken({"no": object()})
    elif kind == "torch":
        parts["optimizer.pt"] = Broken(lambda: None)
    elif kind == "safetensors":
        parts[VALUE_FILE] = Broken({"no": torch.eye(3).to_sparse()})
    return Checkpointer(parts, single_process(), fail if kind == "model" else run.write_model, writes=True)


@pytest.mark.parametrize("kind", ["model", "json", "torch", "safetensors"])
def test_a_checkpoint_that_fails_leaves_no_files(kind, tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    Run(2).checkpointer.save(tmp_path / "checkpoint-2")
    before = contents(tmp_path)
    for folder in ("checkpoint-2", "checkpoint-3"):
        with pytest.raises(SaveError, match=f"{folder} could not be written .*checkpoint-2 is complete"):
            failing(kind, tmp_path).save(tmp_path / folder)
        assert contents(tmp_path) == before, "an earlier checkpoint was changed, or files of the new one are left"


def test_a_checkpoint_takes_the_place_of_one_of_the_same_update(tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "of the old one").touch()
    again, loaded = Run(5), Run(2, fresh=True)
    again.checkpointer.save(tmp_path / "checkpoint-1")
    loaded.checkpointer.load(tmp_path / "checkpoint-1", *NAMES)
    assert_same_weights(loaded.policy, again.policy)
    assert not (tmp_path / "checkpoint-1" / "of the old one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("1.bias"), "lacks trained weights.*'1.bias'"),
        (lambda weights: weights.update({"1.bias": torch.zeros(3)}), r"'1.bias' as torch.float32 \[3\].*\[2\]"),
        (lambda weights: weights.update({"1.bias": torch.zeros(2).half()}), "float16.*float32"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_and_their_file_named(change, message, tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    file = tmp_path / "checkpoint-1" / POLICY_FILE
    found = load_file(file)
    change(found)
    save_file(found, file)
    with pytest.raises(CheckpointError, match=f"checkpoint-1/{POLICY_FILE}: it (lacks|has).*") as error:
        Run(2).checkpointer.load(tmp_path / "checkpoint-1", POLICY_FILE)
    assert error.match(message)


def test_a_missing_file_of_weights_is_an_error(tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / VALUE_FILE).unlink()
    with pytest.raises(CheckpointError, match="lacks trained weights"):
        Run(2).checkpointer.load(tmp_path / "checkpoint-1", VALUE_FILE)


def test_a_file_that_is_not_json_is_rejected(tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / RUN_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=f"{RUN_FILE} cannot be read"):
        Run(2).checkpointer.load(tmp_path / "checkpoint-1", RUN_FILE)


@pytest.mark.parametrize("name", [POLICY_FILE, VALUE_FILE, checkpointer.OPTIMIZER_NAME])
def test_a_damaged_file_is_rejected_and_named(name, tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        Run(2).checkpointer.load(tmp_path / "checkpoint-1", name)


def test_a_state_that_its_part_cannot_load_is_rejected_and_its_file_named(tmp_path):
    Run(1).checkpointer.save(tmp_path / "checkpoint-1")
    run = Run(2)
    run.run.load_state_dict = lambda state: state["missing"]
    with pytest.raises(CheckpointError, match=f"{RUN_FILE} cannot be read.*KeyError"):
        run.checkpointer.load(tmp_path / "checkpoint-1", RUN_FILE)


def test_a_run_state_that_is_not_a_json_object_is_rejected(tmp_path):
    folder = tmp_path / "checkpoint-1"
    checkpoint = Run(1)
    checkpoint.run.value = [1]
    checkpoint.checkpointer.save(folder)
    with pytest.raises(CheckpointError, match=f"{RUN_FILE} cannot be read.*a list instead of an object"):
        checkpoint.checkpointer.find(str(folder), tmp_path)


# -- which checkpoint to resume from -----------------------------------------------------------------------------------


def test_none_and_false_start_a_new_run(tmp_path):
    run = Run(1)
    run.checkpointer.save(tmp_path / "checkpoint-1")
    assert run.checkpointer.find(None, tmp_path) is None and run.checkpointer.find(False, tmp_path) is None


def test_true_finds_the_last_complete_checkpoint_by_its_number(tmp_path):
    run = Run(1)
    for number in (9, 10, 11):
        run.checkpointer.save(tmp_path / f"checkpoint-{number}")
    assert run.checkpointer.find(True, tmp_path) == tmp_path / "checkpoint-11"
    (tmp_path / "checkpoint-11" / RNG_FILE).write_text("[]")
    assert run.checkpointer.find(True, tmp_path) == tmp_path / "checkpoint-10"
    assert run.checkpointer.find(True, tmp_path / "elsewhere") is None


def test_a_path_is_used_or_the_error_says_what_is_missing(tmp_path):
    run = Run(1)
    run.checkpointer.save(tmp_path / "checkpoint-1")
    for wanted in (tmp_path / "checkpoint-1", str(tmp_path / "checkpoint-1")):
        assert run.checkpointer.find(wanted, tmp_path / "elsewhere") == tmp_path / "checkpoint-1"
    (tmp_path / "checkpoint-1" / VALUE_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"not a complete checkpoint of this trainer: it lacks {VALUE_FILE}"):
        run.checkpointer.find(tmp_path / "checkpoint-1", tmp_path)
    with pytest.raises(CheckpointError, match="it has no manifest"):
        run.checkpointer.find(tmp_path, tmp_path)


def test_a_checkpoint_of_only_the_model_cannot_be_resumed_from(tmp_path):
    run = Run(1)
    run.run.value = copy.copy(NUMBERS) | {"resumable": False}
    run.checkpointer.save(tmp_path / "checkpoint-1")
    for wanted in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(CheckpointError, match="only the model"):
            run.checkpointer.find(wanted, tmp_path)


# -- the folder of a run -----------------------------------------------------------------------------------------------


def populated(tmp_path: Path) -> Run:
    run = Run(1)
    for number in (1, 2, 3):
        run.checkpointer.save(tmp_path / f"checkpoint-{number}")
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    (tmp_path / ".unfinished-checkpoint-4").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    return run


@pytest.mark.parametrize(("resumed", "stay"), [(None, []), (2, [1, 2]), (3, [1, 2, 3])])
def test_checkpoints_that_a_run_does_not_resume_from_are_moved_aside(resumed, stay, tmp_path):
    run = populated(tmp_path)
    before = contents(tmp_path)
    run.checkpointer.prepare_output(tmp_path, None if resumed is None else tmp_path / f"checkpoint-{resumed}")
    aside = [number for number in (1, 2, 3) if number not in stay]
    names = {*(f"checkpoint-{number}" for number in stay), "notes.txt", *(["earlier.1"] if aside else [])}
    assert {path.name for path in tmp_path.iterdir()} == names
    if aside:
        assert {path.name for path in (tmp_path / "earlier.1").iterdir()} == {f"checkpoint-{n}" for n in aside}
    moved = {name.removeprefix("earlier.1/"): data for name, data in contents(tmp_path).items()}
    assert moved == before


def test_checkpoints_that_are_moved_aside_have_the_records_up_to_then(tmp_path):
    """A run that resumes from one of them later finds there what it continues."""
    run = populated(tmp_path)
    lines = "".join(json.dumps({"update": number}) + "\n" for number in (1, 2, 3))
    (tmp_path / "bounds.jsonl").write_text(lines)
    run.checkpointer.prepare_output(tmp_path, tmp_path / "checkpoint-1")
    (tmp_path / "bounds.jsonl").write_text('{"update": 1}\n')
    run.checkpointer.prepare_output(tmp_path, tmp_path / "earlier.1" / "checkpoint-2")
    assert (tmp_path / "bounds.jsonl").read_text() == lines
    assert (tmp_path / "bounds.jsonl.1").read_text() == '{"update": 1}\n'


def test_a_run_resumed_in_another_folder_copies_the_records(tmp_path):
    run, output = populated(tmp_path / "old"), tmp_path / "new"
    lines = "".join(json.dumps({"update": number}) + "\n" for number in (1, 2, 3))
    (tmp_path / "old" / "bounds.jsonl").write_text(lines)
    Run(7).checkpointer.save(output / "checkpoint-1")
    run.checkpointer.prepare_output(output, tmp_path / "old" / "checkpoint-2")
    assert (output / "bounds.jsonl").read_text() == lines
    assert {path.name for path in output.iterdir()} == {"bounds.jsonl", "earlier.1"}
    assert (tmp_path / "old" / "checkpoint-3").exists()


def test_a_full_disk_is_detected_immediately(tmp_path, monkeypatch):
    def fail(dir: Path) -> None:
        raise OSError(28, "No space left on device", str(dir))

    run = populated(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(checkpointer, "TemporaryFile", fail)
    with pytest.raises(SaveError, match="cannot be written into .*No space left"):
        run.checkpointer.prepare_output(tmp_path, None)
    assert contents(tmp_path) == before and (tmp_path / ".unfinished-checkpoint-4").exists()


def test_an_unwritable_folder_is_detected_immediately(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="cannot be written into"):
        Run(1).checkpointer.prepare_output(tmp_path / "file", None)
