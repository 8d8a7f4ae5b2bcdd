"""What two processes do with shards, for each engine: shards are read, written, gathered, clipped and stepped as complete
tensors would be. The tests of the engines start it and look at what it says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests import sharded, tiny
from tests.processes import in_two_processes
from trl_trustkl.parallel.engines import build_sharding, load_everywhere
from trl_trustkl.parallel.sharding import Replicated
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.merged_weights import merged_weights
from trl_trustkl.policy.value_head import PolicyAndValue

IDS = torch.tensor([[5, 6, 7, 8]])
ANSWERS = [
    "sharded", "shards", "gathered", "streamed", "run", "reference", "optimizer", "complete", "part", "remade", "copied",
    "written", "stepped", "cleared", "observed", "loaded",
]  # fmt: skip
"""What is True on both processes."""


def trained_model() -> PolicyAndValue:
    """A policy with an adapter and a value head, of whose single row the second process has none."""
    model = PolicyAndValue(tiny.tuned(), None, temperature=1.0)
    with torch.no_grad():
        model.value.linear.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    return model


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def are_shards(module: nn.Module) -> bool:
    """Whether this process has a part of each weight; ZeRO-2 leaves them complete."""
    parameters = list(module.parameters())
    if sharded.engine() == "zero2":
        return all(p.numel() for p in parameters)
    if sharded.engine() == "zero3":
        return all(p.shape == (0,) and p.ds_tensor.numel() == -(-p.ds_numel // 2) for p in parameters)
    return all(isinstance(p, DTensor) for p in parameters)


def gradient(parameter: Tensor) -> Tensor:
    """The complete gradient, by functions of the engine itself."""
    if sharded.engine() == "fsdp2":
        return parameter.grad.full_tensor()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the tensors are plain, and equal bit for bit."""
    same = found.keys() == expected.keys() and not any(isinstance(t, DTensor) for t in found.values())
    return same and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def program(folder: Path, engine: str) -> None:
    sharded.on_cpus(engine)
    accelerator = Accelerator()
    rank = accelerator.process_index
    model, reference = trained_model(), tiny.llama(seed=9)
    before, of_reference = values(model), values(reference)
    expected = reference(input_ids=IDS).logits.detach()
    sharding = build_sharding(accelerator, saves=rank == 0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
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
    said["streamed"] = streamed(sharding, model)
    head = sharding.run(lambda: values(model.policy.get_output_embeddings()))
    said["run"] = torch.equal(head["weight"], before["policy.base_model.model.lm_head.weight"]) and are_shards(model)
    found = sharding.run_reference(lambda: reference(input_ids=IDS).logits.detach())
    head = sharding.run(lambda: values(reference.get_output_embeddings()))  # a pass of the policy uses it too
    said["reference"] = torch.equal(found, expected) and torch.equal(head["weight"], of_reference["lm_head.weight"])
    said["optimizer"] = {*map(id, trainable(model))} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    complete = {name: sharding.complete(p, p) for name, p in parameters.items()}
    said["complete"] = equal(complete, before) if rank == 0 else all(t.numel() == 0 for t in complete.values())
    parts = {name: sharding.part(tensor, parameters[name]) for name, tensor in before.items()}
    said["part"] = all(
        torch.equal(sharding.local(part), sharding.local(parameters[name]))
        for name, part in parts.items()
        if parameters[name].requires_grad
    )
    said["unlike"] = sharding.part(torch.tensor(3.0), parameters["value.linear.bias"]).item()
    said |= of_steps(sharding, accelerator, root, optimizer, model)
    said["loaded"] = loaded_everywhere(rank) if engine == "fsdp2" else completed()
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def is_complete(parameter: Tensor) -> bool:
    """Whether this process has the whole weight."""
    return not isinstance(parameter, DTensor) and parameter.numel() == getattr(parameter, "ds_numel", parameter.numel())


def streamed(sharding: Replicated, model: PolicyAndValue) -> bool:
    """Whether the weights for another engine are those of the complete model, one layer is gathered at a time, and none stays
    so, also where they are not read to the end."""
    expected = dict(merged_weights(trained_model().policy))
    layers = model.policy.get_base_model().model.layers
    gathered, most = [], []
    for _ in range(2):
        found = {}
        weights = merged_weights(model.policy, sharding=sharding)
        for name, weight in weights:
            found[name] = weight
            gathered.append([all(map(is_complete, layer.parameters())) for layer in layers])
            if "layers.1.self_attn" in name and not most:
                break
        weights.close()
        most.append(len(found))
        if not are_shards(model):
            return False
    one_at_a_time = all(sum(each) <= 1 for each in gathered) and any(any(each) for each in gathered)
    return equal(found, expected) and most[0] < most[1] and (one_at_a_time or sharded.engine() == "zero2")


def of_steps(
    sharding: Replicated, accelerator: Accelerator, root: nn.Module, optimizer: Any, model: PolicyAndValue
) -> dict[str, Any]:
    """Gradients, clipping, steps and writing: with the expected numbers from a complete model."""
    said: dict[str, Any] = {}
    alone = trained_model()
    trained, complete = trainable(model.policy), trainable(alone.policy)
    expected = torch.optim.AdamW(trainable(alone), lr=0.1)
    before = values(alone)
    for step in range(2):
        for micro in range(2):
            for rank in range(2):
                loss_of(alone, step, micro, rank).div(2).backward()
            with sharding.accumulating(accelerator, root, last=micro == 1):
                loss = root(call=lambda: loss_of(model, step, micro, accelerator.process_index))  # noqa: B023
                sharding.backward(accelerator, loss)
        said["dtype"] = str(loss.dtype)
        clipped = [sharding.clip(trained, 0.5), nn.utils.clip_grad_norm_(complete, 0.5)]
        said["norm"] = [float(norm) for norm in clipped]
        for scaled in (model, alone):
            scale = sharding.scale_gradients if scaled is model else Replicated().scale_gradients
            scale(trainable(scaled.policy), 0.5)
        said["clipped"] = max(float((gradient(p) - q.grad).abs().max()) for p, q in zip(trained, complete, strict=True))
        sharding.step(optimizer)
        optimizer.zero_grad()
        expected.step()
        expected.zero_grad()
    found = sharding.gathered(lambda: values(model))
    said["difference"] = max(float((found[name] - p.detach()).abs().max()) for name, p in alone.named_parameters())
    said["stepped"] = sum(not torch.equal(found[name], before[name]) for name in found) == len(trainable(alone))
    said["moments"] = max(
        float((whole_moment(sharding, entry, p, accelerator) - expected.state[q][name]).abs().max())
        for p, q in zip(trainable(model), trainable(alone), strict=True)
        for name, entry in optimizer.state[p].items()
    )
    said["cleared"] = abandoned(sharding, accelerator, root, optimizer, model)
    said["observed"] = observed(sharding, accelerator, root, optimizer, model)
    said |= of_writing(sharding, root, model, found)
    return said


def observed(
    sharding: Replicated, accelerator: Accelerator, root: nn.Module, optimizer: Any, model: PolicyAndValue
) -> bool:
    """Whether the engine of another trainer, which is only observed, has the same parts, moments and groups."""
    other = build_sharding(accelerator, saves=True)
    with other.loaded(root):
        complete = is_complete(model.policy.get_input_embeddings().weight)
    found = other.observe(root, optimizer)
    for parameter in trainable(model):
        mine, theirs = sharding.local(parameter), other.local(parameter)
        if not torch.equal(mine, theirs) or mine.data_ptr() != theirs.data_ptr():
            return False
        for name, entry in optimizer.state[parameter].items():
            if not torch.equal(sharding.local(entry), other.local(found.state[parameter][name])):
                return False
    lengths = [[len(group["params"]) for group in each.param_groups] for each in (optimizer, found)]
    return lengths[0] == lengths[1] and complete and other.steps_in_backward == (sharded.engine() != "fsdp2")


def loss_of(model: PolicyAndValue, step: int, micro: int, rank: int) -> Tensor:
    """A loss of policy and value, large enough for gradients that are clipped."""
    ids = IDS + rank + 2 * micro + 4 * step
    out = model.policy(input_ids=ids, output_hidden_states=True)
    return 100 * out.logits.square().mean() + model.value(out.hidden_states[-1]).square().mean()


def whole_moment(sharding: Replicated, entry: Tensor, parameter: nn.Parameter, accelerator: Accelerator) -> Tensor:
    """A complete moment; the first process saves, and sends it to the other."""
    found = [sharding.complete(entry, parameter)]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def abandoned(
    sharding: Replicated, accelerator: Accelerator, root: nn.Module, optimizer: Any, model: PolicyAndValue
) -> bool:
    """Whether a gradient that is not finite leaves nothing behind once it is removed."""
    norms = []
    for factor in (1.0, float("nan"), 1.0):
        with sharding.accumulating(accelerator, root, last=True):
            sharding.backward(accelerator, root(call=lambda: loss_of(model, 0, 0, 0) * factor))  # noqa: B023
        norms.append(float(sharding.clip(trainable(model), float("inf"))))
        optimizer.zero_grad()
    return norms[0] == norms[2] and norms[1] != norms[1]


def of_writing(sharding: Replicated, root: nn.Module, model: PolicyAndValue, now: dict[str, Tensor]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    trained = trainable(model)
    weight = next(p for p in trained if sharding.local(p).abs().sum() > 0)
    other = sharding.remake(weight.detach())(sharding.local(weight))
    said["remade"] = torch.equal(sharding.local(other), sharding.local(weight))
    sharding.local(other).zero_()
    said["copied"] = bool(sharding.local(weight).abs().sum() > 0)
    root(call=lambda: None)  # what is in no layer is gathered again, until it is given up
    with torch.no_grad():
        for p in trained:
            sharding.local(p).fill_(0.25)
    sharding.written()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: torch.full_like(t, 0.25) if name in names else t for name, t in now.items()}
    said["written"] = equal(sharding.gathered(lambda: values(model)), wanted)
    return said


def completed() -> bool:
    """Whether a model of tied weights that was sharded while loading is complete, and tied, on both processes."""
    from deepspeed.runtime.zero import Init

    model = tiny.llama(seed=4, tie_word_embeddings=True)
    expected = values(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    Init(module=model)
    was_sharded = all(p.numel() == 0 for p in model.parameters())
    load_everywhere(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    plain = not any(hasattr(p, "ds_id") for p in model.parameters())
    return was_sharded and plain and equal(values(model), expected) and tied and frozen == ["model.embed_tokens.weight"]


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


def answers(folder: Path, engine: str) -> list[dict[str, Any]]:
    """What both processes say."""
    in_two_processes("-m", "tests.shards", str(folder), engine, cwd=folder)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


def check_steps(said: list[dict[str, Any]]) -> None:
    for each in said:
        norm, expected = each["norm"]
        assert abs(norm - expected) < 1e-5 * expected and expected > 0.5
        assert each["clipped"] < 1e-6 and each["difference"] < 1e-4 and each["moments"] < 1e-5
    assert said[0]["norm"] == said[1]["norm"]


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2])
