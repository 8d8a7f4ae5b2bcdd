"""The reference policy π_ref, to which the anchor limits the KL divergence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, ModelError
from ..trl_compat import activation_checkpointing
from ..types import MicroBatch, PolicySnapshot
from . import probes
from .dropout import disable_dropout
from .split_lm import OutputHead, SplitLM

logger = logging.get_logger(__name__)

REFERENCE_ADAPTER = "trustkl_ref"


class Reference:
    """π_ref: `model`, else the policy with `adapter`, else the policy with its adapters disabled. Only
    `ReferenceRenewal` changes it.

    Parameters of the policy that are trained outside of its adapter, such as the biases of `LoraConfig(bias="all")`, have
    the values that they had at construction, or at the last renewal: `outside` has both by name. `is_start`: whether π_ref is
    the policy as it is at construction. `ref_lm`: the passes of `model`; None for those of a SplitLM.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        split_lm: SplitLM,
        model: PreTrainedModel | PeftModel | None = None,
        adapter: str | None = None,
        *,
        is_start: bool = False,
        ref_lm: SplitLM | None = None,
    ) -> None:
        self.is_start = is_start
        self.policy = policy
        self.model = model
        self.adapter = adapter
        self.split_lm = split_lm if model is None else ref_lm or SplitLM(model, name="ref_model")
        if self.split_lm.vocab_size != split_lm.vocab_size:
            raise ModelError(
                f"`ref_model` has {self.split_lm.vocab_size} vocabulary entries and the policy {split_lm.vocab_size}; "
                "a KL divergence needs the same vocabulary."
            )
        # PEFT's layers contain the layer that they adapt; a plain projection contains no module.
        head = self.split_lm.head
        adapted = isinstance(head, OutputHead) and next(head.projection.children(), None) is not None
        self._head_has_adapter = model is None and adapted
        outside = {} if model is not None else trained_outside_adapters(policy)
        self.outside: dict[str, tuple[nn.Parameter, Tensor]] = {
            name: (weight, weight.detach().clone()) for name, weight in outside.items()
        }

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
        current = [parameter.data for parameter, _ in self.outside.values()]
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        for parameter, start in self.outside.values():
            parameter.data = start.to(parameter.device)
        try:
            with disabled(self.policy) if self.adapter is None else activated(self.policy, self.adapter):
                yield
        finally:
            for (parameter, _), data in zip(self.outside.values(), current, strict=True):
                parameter.data = data
            self.policy.requires_grad_(False)  # PEFT trains the complete adapter after it was disabled or replaced
            for parameter in trained:
                parameter.requires_grad_(True)


def build_reference(
    policy: PreTrainedModel | PeftModel,
    split_lm: SplitLM,
    ref_model: PreTrainedModel | PeftModel | None,
    *,
    ref_adapter_name: str | None,
    start: Tensor | None,
    renewed: bool = False,
) -> Reference:
    """The reference by the first rule that applies.

    1. A `ref_model` is used as it is.
    2. Full fine-tuning uses a frozen copy of the model.
    3. The adapter `ref_adapter_name` is frozen and used.
    4. The adapter that the trainer added is disabled. `start` are the logits of `probes.logits` before it was added, None
       if the policy came with its adapter.
    5. An adapter that the policy came with gets a frozen clone, so that the KL starts at 0. So does one whose
       initialisation rewrote the base model (PiSSA, OLoRA): without it, the policy is not the model that was passed. So does
       any adapter if the reference is `renewed` later.

    Raises ModelError for a new adapter with which the policy does not start as the model that was passed.
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
        activation_checkpointing.disable(clone)
        return Reference(policy, split_lm, clone, is_start=True)
    if ref_adapter_name is not None:
        if ref_adapter_name not in policy.peft_config:
            raise ConfigError(
                f"`ref_adapter_name` got {ref_adapter_name!r}; the model's adapters are {sorted(policy.peft_config)}."
            )
        freeze_adapter(policy, ref_adapter_name)
        return Reference(policy, split_lm, adapter=ref_adapter_name)
    if start is not None and _base_is(policy, start) and not renewed:
        return Reference(policy, split_lm, is_start=True)
    if REFERENCE_ADAPTER in policy.peft_config:  # of an earlier trainer of this model
        policy.delete_adapter(REFERENCE_ADAPTER)
    clone_adapter(policy, policy.active_adapter, REFERENCE_ADAPTER)
    return Reference(policy, split_lm, adapter=REFERENCE_ADAPTER, is_start=True)


def _base_is(policy: PeftModel, start: Tensor) -> bool:
    """Whether the policy with its new adapter disabled is the model before it, as it is with the adapter."""
    precise = start.dtype in (torch.float32, torch.float64)
    tolerance = 2e-3 if precise else 0.05  # of the largest logit
    if not probes.close(probes.logits(policy), start, tolerance):
        config = policy.active_peft_config
        options = {k: v for k, v in config.to_dict().items() if k.startswith("init_") and v is not True}
        fix = "Use an initialisation that keeps the model, such as LoraConfig(init_lora_weights=True), or pass the `ref_model` "
        fix += "that the KL is measured to."
        if not precise:
            fix += f" PiSSA and OLoRA rewrite the base model, which rounds it in {start.dtype}: load it in float32."
        raise ModelError(
            f"`peft_config` is a {type(config).__name__} whose new adapter changes the model before the first step"
            f"{''.join(f' ({name}={value!r})' for name, value in options.items())}: the policy would not start at its "
            f"reference. {fix}"
        )
    with disabled(policy):
        return probes.close(probes.logits(policy), start, tolerance)


@contextmanager
def disabled(policy: PeftModel) -> Iterator[None]:
    """The policy with its adapters disabled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")  # see `Reference`
        with policy.disable_adapter():
            yield


@contextmanager
def activated(policy: PeftModel, adapter: str) -> Iterator[None]:
    """The policy with a frozen adapter in the place of the trained one."""
    trained = policy.active_adapter
    policy.set_adapter(adapter)
    try:
        yield
    finally:
        policy.set_adapter(trained)
        freeze_adapter(policy, adapter)


def clone_adapter(policy: PeftModel, source: str, target: str) -> None:
    """Add a frozen adapter `target` that equals `source`."""
    config = copy.deepcopy(policy.peft_config[source])
    # The weights are copied: an initialisation of the clone must not rewrite the base model again, and PEFT allows only one
    # adapter that trains biases.
    for name, value in (("init_lora_weights", True), ("bias", "none")):
        if hasattr(config, name):
            setattr(config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.add_adapter(target, config)
        # PEFT finds the parameters and buffers of every adapter method; not all of their names contain ".{source}.".
        weights = get_peft_model_state_dict(policy, adapter_name=source, save_embedding_layers=False)
        set_peft_model_state_dict(policy, weights, adapter_name=target)
    disable_dropout(policy)  # `add_adapter` gave the clone dropout
    policy.set_adapter(source)
    freeze_adapter(policy, target)


def freeze_adapter(policy: PeftModel, adapter: str) -> None:
    """Freeze an adapter, which `set_adapter` made trainable when it activated it."""
    for name, weight in policy.named_parameters():
        if _belongs_to(name, adapter):
            weight.requires_grad_(False)


def trained_outside_adapters(policy: PreTrainedModel | PeftModel) -> dict[str, nn.Parameter]:
    """The trained parameters of a policy with adapters that belong to the base model, by their names."""
    adapters = policy.peft_config if isinstance(policy, PeftModel) else {}
    return {
        name: weight
        for name, weight in policy.named_parameters()
        if weight.requires_grad and not any(_belongs_to(name, adapter) for adapter in adapters)
    }


def warn_of_unsaved(policy: PreTrainedModel | PeftModel) -> None:
    """Warn about trained parameters outside of the adapter, which PEFT does not save with it."""
    if not isinstance(policy, PeftModel):
        return
    biases = getattr(policy.active_peft_config, "bias", "none") != "none"  # PEFT saves them
    names = [name for name in trained_outside_adapters(policy) if not (biases and name.endswith(".bias"))]
    if names:
        logger.warning(
            f"`model` trains {len(names)} parameters outside of its adapter, such as {names[0]}: save_model writes the adapter "
            "only and loses them. Name their modules in LoraConfig(modules_to_save=[...]) instead."
        )


def _belongs_to(name: str, adapter: str) -> bool:
    return f".{adapter}." in name or name.endswith(f".{adapter}")
