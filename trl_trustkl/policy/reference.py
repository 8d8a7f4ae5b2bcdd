"""π_ref, the policy that the anchor holds on to: a model of its own, an adapter of the policy, or its adapters off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError, ModelError
from ..types import MicroBatch, PolicySnapshot
from .loading import disable_dropout
from .split_lm import OutputHead, SplitLM

REFERENCE_ADAPTER = "trustkl_ref"


class Reference:
    """π_ref, frozen for the whole run: a model of its own, an adapter of the policy, or the policy's adapters off."""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        split_lm: SplitLM,
        model: PreTrainedModel | PeftModel | None,
        adapter: str | None,
    ) -> None:
        self.policy = policy
        self.model = model
        self.adapter = adapter
        self.split_lm = SplitLM(model, name="ref_model") if model is not None else split_lm
        if self.split_lm.vocab_size != split_lm.vocab_size:
            raise ModelError(
                f"`ref_model` has {self.split_lm.vocab_size} vocabulary entries and the policy {split_lm.vocab_size}; "
                "a KL divergence needs the same vocabulary."
            )
        head = self.split_lm.head
        parts = head.projection.children() if isinstance(head, OutputHead) else iter(())
        self._head_has_adapter = model is None and any(True for _ in parts)

    @torch.no_grad()
    def snapshot(self, micro: MicroBatch) -> PolicySnapshot:
        """The reference's hidden states at the micro-batch's response tokens, with its head."""
        with self.active():
            hidden = self.split_lm.hidden_states(micro)
        return PolicySnapshot(hidden, self._head_as_reference if self._head_has_adapter else self.split_lm.head)

    def _head_as_reference(self, hidden: Tensor) -> Tensor:
        with self.active():
            return self.split_lm.head(hidden)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The reference in the policy's place, put back whatever happens."""
        if self.model is not None:
            yield
            return
        assert isinstance(self.policy, PeftModel)  # the reference of any other is a model of its own
        if self.adapter is None:
            with self.policy.disable_adapter():
                yield
        else:
            trained = self.policy.active_adapter
            self.policy.set_adapter(self.adapter)
            try:
                yield
            finally:
                self.policy.set_adapter(trained)
                freeze_adapter(self.policy, self.adapter)


def build_reference(
    policy: PreTrainedModel | PeftModel,
    split_lm: SplitLM,
    ref_model: PreTrainedModel | PeftModel | None,
    *,
    ref_adapter_name: str | None,
    new_adapter: bool,
) -> Reference:
    """The reference by the first rule that fits.

    A `ref_model` is used as it is. A named reference adapter is used frozen. A policy whose adapter the trainer made has
    its adapters switched off. A policy that came with an adapter gets a frozen clone of it, so that the KL starts at 0.
    Full fine-tuning gets a frozen copy of the model.
    """
    if ref_model is not None:
        if ref_adapter_name is not None:
            raise ConfigError(
                f"`ref_adapter_name` got {ref_adapter_name!r} together with a `ref_model`; give only one."
            )
        if not isinstance(ref_model, (PreTrainedModel, PeftModel)):
            raise ModelError(
                f"`ref_model` got {type(ref_model).__name__}; it must be a causal language model, its name, or None for the "
                "policy as it is at the start."
            )
        disable_dropout(ref_model)
        ref_model.requires_grad_(False)
        return Reference(policy, split_lm, ref_model.train(), None)
    if not isinstance(policy, PeftModel):
        if ref_adapter_name is not None:
            raise ConfigError(f"`ref_adapter_name` got {ref_adapter_name!r}, but the model has no adapters.")
        clone = copy.deepcopy(policy).requires_grad_(False)
        clone.gradient_checkpointing_disable()
        return Reference(policy, split_lm, clone, None)
    if ref_adapter_name is not None:
        if ref_adapter_name not in policy.peft_config:
            raise ConfigError(
                f"`ref_adapter_name` got {ref_adapter_name!r}; the model's adapters are {sorted(policy.peft_config)}."
            )
        freeze_adapter(policy, ref_adapter_name)
        return Reference(policy, split_lm, None, ref_adapter_name)
    if new_adapter:
        return Reference(policy, split_lm, None, None)
    clone_adapter(policy, policy.active_adapter, REFERENCE_ADAPTER)
    return Reference(policy, split_lm, None, REFERENCE_ADAPTER)


def clone_adapter(policy: PeftModel, source: str, target: str) -> None:
    """Add a frozen adapter `target` that equals `source`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.add_adapter(target, policy.peft_config[source])
        # PEFT knows which parameters and buffers of which method are the adapter's; the names of some have no ".{source}.".
        weights = get_peft_model_state_dict(policy, adapter_name=source, save_embedding_layers=False)
        set_peft_model_state_dict(policy, weights, adapter_name=target)
    disable_dropout(policy)  # the clone came with one of its own
    policy.set_adapter(source)
    freeze_adapter(policy, target)


def freeze_adapter(policy: PeftModel, adapter: str) -> None:
    """`set_adapter` makes an adapter trainable as it activates it; the reference must never be."""
    for name, weight in policy.named_parameters():
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            weight.requires_grad_(False)
