"""Shards are read, written, gathered and clipped as complete tensors would be.

This file is also the program that each of two processes runs, for FSDP2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests import sharded, tiny
from tests.processes import in_two_processes
from trl_trustkl.parallel.engines import build_sharding, load_everywhere
from trl_trustkl.parallel.sharding import REPLICATED, Replicated
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.value_head import PolicyAndValue


def test_one_process_has_complete_parameters(tmp_path: Path) -> None:
    assert build_sharding(Accelerator(cpu=True), saves=True) is REPLICATED
    assert tiny.trainer(tmp_path).parts.sharding.sharded is False


def test_a_model_that_every_process_loads_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2, device="meta")
    load_everywhere(layer)
    for name, value in sharded.EXAMPLE.items():
        monkeypatch.setenv(name, value)
    load_everywhere(layer)  # one process: there is nobody to ask
    load_everywhere(lambda: None)
    assert layer.weight.is_meta


# -- shards ------------------------------------------------------------------------------------------------------------


def trained_model() -> PolicyAndValue:
    """A policy with an adapter and a value head, of whose single row the second process has none."""
    model = PolicyAndValue(tiny.tuned(), None, temperature=1.0)
    with torch.no_grad():
        model.value.linear.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    return model


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def are_shards(module: nn.Module) -> bool:
    return all(isinstance(p, DTensor) for p in module.parameters())


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the tensors are plain, and equal bit for bit."""
    same = found.keys() == expected.keys() and not any(isinstance(t, DTensor) for t in found.values())
    return same and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def program(folder: Path) -> None:
    sharded.on_cpus(ACCELERATE_MIXED_PRECISION="bf16")
    accelerator = Accelerator()
    rank = accelerator.process_index
    model, reference = trained_model(), tiny.llama(seed=9)
    before, of_reference = values(model), values(reference)
    sharding = build_sharding(accelerator, saves=rank == 0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    root, optimizer = sharding.prepare(accelerator, model, optimizer, reference)
    said: dict[str, Any] = {
        "rank": rank,
        "sharded": sharding.sharded,
        "shards": are_shards(model) and are_shards(reference),
    }
    parameters = dict(model.named_parameters())
    said["local"] = {name: sharding.local(p).tolist() for name, p in parameters.items()}
    gathered = sharding.gathered(lambda: values(model))
    said["gathered"] = equal(gathered, before) and are_shards(model)
    head = sharding.run(lambda: values(model.policy.get_output_embeddings()))
    said["run"] = torch.equal(head["weight"], before["policy.base_model.model.lm_head.weight"]) and are_shards(model)
    head = sharding.run_reference(lambda: values(reference.get_output_embeddings()))
    said["reference"] = torch.equal(head["weight"], of_reference["lm_head.weight"])
    said["optimizer"] = {*map(id, trainable(model))} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    complete = {name: sharding.complete(p.detach()) for name, p in parameters.items()}
    said["complete"] = equal(complete, before) if rank == 0 else all(t.numel() == 0 for t in complete.values())
    parts = {name: sharding.part(tensor, parameters[name]) for name, tensor in before.items()}
    said["part"] = all(torch.equal(sharding.local(part), sharding.local(parameters[n])) for n, part in parts.items())
    said["unlike"] = sharding.part(torch.tensor(3.0), parameters["value.linear.bias"]).item()
    said |= of_steps(sharding, root, model, before)
    said["loaded"] = loaded_everywhere(rank)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def of_steps(sharding: Replicated, root: nn.Module, model: PolicyAndValue, before: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients, clipping, and writing: with the expected numbers from a complete model."""
    said: dict[str, Any] = {}
    ids = torch.tensor([[5, 6, 7, 8]]) + torch.distributed.get_rank()
    loss = root.run(lambda: model.policy(input_ids=ids).logits.square().mean())
    said["dtype"] = str(loss.dtype)
    loss.backward()
    alone = trained_model()
    for each in (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[6, 7, 8, 9]])):
        (alone.policy(input_ids=each).logits.square().mean() / 2).backward()
    trained, complete = trainable(model.policy), trainable(alone.policy)
    norm = sharding.clip(trained, 0.5)
    expected = nn.utils.clip_grad_norm_(complete, 0.5)
    said["norm"] = [float(norm), float(expected)]
    said["clipped"] = max(
        float((p.grad.full_tensor() - q.grad).abs().max()) for p, q in zip(trained, complete, strict=True)
    )
    weight = trained[0]
    other = sharding.remake(weight.detach())(sharding.local(weight))
    said["remade"] = torch.equal(other.full_tensor(), weight.full_tensor()) and other.placements == weight.placements
    sharding.local(other).zero_()
    said["copied"] = bool(sharding.local(weight).abs().sum() > 0)
    root.run(lambda: None)  # what is in no layer is gathered again, until it is given up
    with torch.no_grad():
        for p in [*trained, *trainable(model.value)]:
            sharding.local(p).fill_(0.25)
    sharding.written()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: torch.full_like(t, 0.25) if name in names else t for name, t in before.items()}
    said["written"] = equal(sharding.gathered(lambda: values(model)), wanted)
    return said


def loaded_everywhere(rank: int) -> bool:
    """Whether a model of tied weights that only the first process has is complete, and tied, on the second."""
    model = tiny.llama(seed=4, tie_word_embeddings=True)
    expected = values(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    if rank == 1:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        model.to("meta")
        for name, value in buffers.items():
            model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = value
        model.tie_weights()
    load_everywhere(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return equal(values(model), expected) and tied and frozen == ["model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    in_two_processes("-m", "tests.parallel.test_engines", str(folder), cwd=folder)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize(
    "what",
    [
        "sharded", "shards", "gathered", "run", "reference", "optimizer", "complete", "part", "remade",
        "copied", "written", "loaded",
    ],
)  # fmt: skip
def test_shards_are_read_written_and_gathered(said: list[dict[str, Any]], what: str) -> None:
    assert [each[what] for each in said] == [True, True]


@pytest.mark.processes
def test_each_process_has_a_part_of_each_parameter(said: list[dict[str, Any]]) -> None:
    for name, weight in values(trained_model()).items():
        parts = [each["local"][name] for each in said]
        assert parts[0] + parts[1] == weight.tolist(), name
        assert len(parts[0]) == -(-len(weight) // 2)


@pytest.mark.processes
def test_a_tensor_that_is_not_like_the_parameter_is_no_part_of_it(said: list[dict[str, Any]]) -> None:
    assert [each["unlike"] for each in said] == [3.0, 3.0]


@pytest.mark.processes
def test_gradients_are_clipped_by_the_norm_of_the_parts_of_both(said: list[dict[str, Any]]) -> None:
    for each in said:
        norm, expected = each["norm"]
        assert norm == pytest.approx(expected, rel=1e-5) and expected > 1
        assert each["clipped"] < 1e-6
    assert said[0]["norm"] == said[1]["norm"]


@pytest.mark.processes
def test_losses_are_not_rounded_to_the_dtype_of_mixed_precision(said: list[dict[str, Any]]) -> None:
    assert [each["dtype"] for each in said] == ["torch.float32", "torch.float32"]


if __name__ == "__main__":
    program(Path(sys.argv[1]))
