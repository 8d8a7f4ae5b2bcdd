"""The reference policy π_ref, to which the anchor limits the KL divergence."""

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
    """π_ref, frozen for the entire run: `model`, else the policy with `adapter`, else the policy with its adapters disabled."""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        split_lm: SplitLM,
        model: PreTrainedModel | PeftModel | None = None,
        adapter: str | None = None,
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
        # PEFT's layers contain the layer that they adapt; a plain projection contains no module.
        head = self.split_lm.head
        adapted = isinstance(head, OutputHead) and next(head.projection.children(), None) is not None
        self._head_has_adapter = model is None and adapted

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
        """Make the policy compute as the reference; the previous adapter is restored in any case."""
        if self.model is not None:
            yield
            return
        assert isinstance(self.policy, PeftModel)  # the reference of any other policy is a separate model
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
    """The reference by the first rule that applies.

    1. A `ref_model` is used as it is.
    2. Full fine-tuning uses a frozen copy of the model.
    3. The adapter `ref_adapter_name` is frozen and used.
    4. If the trainer added the policy's adapter (`new_adapter`), the adapter is disabled.
    5. An adapter that the policy came with gets a frozen clone, so that the KL starts at 0.
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
        return Reference(policy, split_lm, ref_model.train())
    if not isinstance(policy, PeftModel):
        if ref_adapter_name is not None:
            raise ConfigError(f"`ref_adapter_name` got {ref_adapter_name!r}, but the model has no adapters.")
        clone = copy.deepcopy(policy).requires_grad_(False)
        clone.gradient_checkpointing_disable()
        return Reference(policy, split_lm, clone)
    if ref_adapter_name is not None:
        if ref_adapter_name not in policy.peft_config:
            raise ConfigError(
                f"`ref_adapter_name` got {ref_adapter_name!r}; the model's adapters are {sorted(policy.peft_config)}."
            )
        freeze_adapter(policy, ref_adapter_name)
    elif not new_adapter:
        ref_adapter_name = REFERENCE_ADAPTER
        clone_adapter(policy, policy.active_adapter, ref_adapter_name)
    return Reference(policy, split_lm, adapter=ref_adapter_name)


def clone_adapter(policy: PeftModel, source: str, target: str) -> None:
    """Add a frozen adapter `target` that equals `source`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.add_adapter(target, policy.peft_config[source])
        # PEFT finds the parameters and buffers of every adapter method; not all of their names contain ".{source}.".
        weights = get_peft_model_state_dict(policy, adapter_name=source, save_embedding_layers=False)
        set_peft_model_state_dict(policy, weights, adapter_name=target)
    disable_dropout(policy)  # `add_adapter` gave the clone dropout
    policy.set_adapter(source)
    freeze_adapter(policy, target)


def freeze_adapter(policy: PeftModel, adapter: str) -> None:
    """Freeze an adapter, which `set_adapter` made trainable when it activated it."""
    for name, weight in policy.named_parameters():
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            weight.requires_grad_(False)
