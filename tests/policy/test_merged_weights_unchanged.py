"""`merged_weights` leaves the policy as it is, bit for bit, however the iteration ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear

from tests import tiny
from tests.adapters import IDS, KINDS, adapted, four_bit, logits, moved, pack, tied
from trl_trustkl.policy import merged_weights as module
from trl_trustkl.policy.merged_weights import check_mergeable, merged_weights

pytestmark = pytest.mark.filterwarnings("ignore")

CHANGED = {kind: (lambda folder, kind=kind: adapted(KINDS[kind][0](), KINDS[kind][1])) for kind in KINDS} | {
    "full fine-tuning": lambda folder: moved(tied()),
    "4 bits": lambda folder: adapted(four_bit(folder), tiny.lora(use_dora=True)),
    "8 bits": lambda folder: adapted(four_bit(folder, load_in_4bit=False, load_in_8bit=True), tiny.lora()),
    "4 bits, packed": lambda folder: adapted(four_bit(folder), tiny.lora()),
}


def everything(policy: Any) -> dict[str, Any]:
    """Values, places and flags of all tensors, and what merging, activating and hooks leave in modules."""
    tensors = [*policy.named_parameters(remove_duplicate=False), *policy.named_buffers(remove_duplicate=False)]
    found: dict[str, Any] = {
        name: (tensor.detach().clone(), id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.dtype)
        for name, tensor in tensors
    }
    for name, tensor in tensors:
        if (state := getattr(tensor, "quant_state", None)) is not None:
            found[f"{name} state"] = (state.absmax.clone(), id(state), state.dtype, state.nested)
    for name, each in policy.named_modules():
        held = {key: id(value) for key, value in vars(each).items()}
        found[f"{name} module"] = (id(each), held, list(vars(each).get("merged_adapters", [])))
    return found


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, entry in one.items():
        for a, b in zip(entry, other[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def complete(policy: Any, monkeypatch: Any) -> None:
    assert sum(1 for _ in merged_weights(policy)) > 10


def abandoned(policy: Any, monkeypatch: Any) -> None:
    weights = merged_weights(policy)
    for _ in range(9):
        next(weights)
    weights.close()


def thrown_into(policy: Any, monkeypatch: Any) -> None:
    weights: Any = merged_weights(policy)
    for _ in range(9):
        next(weights)
    with pytest.raises(KeyError, match="engine"):
        weights.throw(KeyError("engine"))


def failed(policy: Any, monkeypatch: Any) -> None:
    """An error of PEFT's in the layer halfway, after it was changed."""
    merged: list[Any] = []
    halfway = 0

    def failing(merge: Any) -> Any:
        def fail(layer: Any, *args: Any, **kwargs: Any) -> None:
            merge(layer, *args, **kwargs)
            merged.append(layer)
            if len(merged) == halfway:
                raise RuntimeError("NaNs detected")

        return fail

    layers = [layer for layer in policy.modules() if isinstance(layer, module.BaseTunerLayer)]
    with monkeypatch.context() as patch:
        for kind in {Linear} | {each for layer in layers for each in type(layer).__mro__ if "merge" in vars(each)}:
            patch.setattr(kind, "merge", failing(kind.merge))
        complete(policy, monkeypatch)
        halfway = len(merged) + (len(merged) + 1) // 2
        if layers:
            with pytest.raises(RuntimeError, match="NaNs detected"):
                complete(policy, monkeypatch)


@pytest.mark.parametrize("kind", CHANGED)
def test_the_policy_is_as_before_however_the_iteration_ends(tmp_path, monkeypatch, kind):
    policy = CHANGED[kind](tmp_path)
    logits(policy)  # PEFT and bitsandbytes prepare what they keep in their layers
    if "packed" in kind:
        pack(policy)
    before = everything(policy)
    for end in (complete, abandoned, thrown_into, failed):
        end(policy, monkeypatch)
        assert_same(everything(policy), before)
    check_mergeable(policy)
    assert_same(everything(policy), before)
    if "packed" not in kind:  # bitsandbytes unpacks packed weights when it saves them
        saved = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        complete(policy, monkeypatch)
        after = policy.state_dict()
        assert list(after) == list(saved) and all(torch.equal(after[name], saved[name]) for name in saved)


def test_gradients_flow_after_the_iteration_as_before():
    policy = adapted(tied(), tiny.lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    gradients: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        policy(input_ids=IDS).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
        for _ in merged_weights(policy):
            assert torch.is_grad_enabled()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 29
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
