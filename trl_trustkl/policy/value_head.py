"""Policy and value in one module: one backbone with a policy adapter and a value head, or a separate model for each."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..trl_compat import activation_checkpointing
from ..trl_compat.module import Module
from ..types import MicroBatch, PolicySnapshot
from .exact_kl import TokenOutputs, token_statistics
from .loading import trainable, without_adapter
from .micro_batches import positions, predicting
from .rms_norm import plain_layers
from .split_lm import SplitLM, accepted, faster_kernels, model_inputs


class NoValue(Module):
    """In the place of a value, where advantages need none: without parameters, so that nothing is trained or saved."""


class ValueHead(Module):
    """A linear value on the policy's hidden states, initially 0; in float32, unless an engine casts all weights to bf16."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()


class ValueModel(Module):
    """A separate value model: a sequence classifier with one label, evaluated at every position.

    `vocab_size` is the policy's: the model must accept every token that the policy may sample, except a last one that only
    pads (`padding_id`): it may have no embedding for that, and reads it as masked, as in TRL.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocab_size: int, padding_id: int | None = None) -> None:
        super().__init__()
        self.model = model
        base = without_adapter(model)
        backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
        score = getattr(base, "score", None)
        if backbone is None or score is None:
            raise ModelError(
                f"`value_model` is a {type(base).__name__}; it must be a sequence classifier with one label, such as "
                "AutoModelForSequenceClassification.from_pretrained(name, num_labels=1), or None for a value head."
            )
        if (labels := getattr(base.config, "num_labels", 1)) != 1:
            raise ModelError(
                f"`value_model` has {labels} labels; it must have 1: AutoModelForSequenceClassification.from_pretrained(name, "
                "num_labels=1)."
            )
        known = backbone.get_input_embeddings().weight.shape[0]
        self._known = known if known < vocab_size else None
        if known < vocab_size and not known == padding_id == vocab_size - 1:
            raise ModelError(
                f"`value_model` has {known} embeddings, fewer than the {vocab_size} tokens of the policy, whose token ids it "
                "reads; use a model with the policy's tokenizer, and if it has that already, call "
                f"value_model.resize_token_embeddings({vocab_size})."
            )
        self._norms = plain_layers(base)
        self._parts = (backbone, score)  # a tuple, so that nothing is registered twice

    def forward(self, inputs: dict[str, Tensor], first: int) -> Tensor:
        backbone, score = self._parts
        if self._known is not None:
            inputs = _masked(inputs, inputs["input_ids"] < self._known)
        with faster_kernels(self.model, inputs["input_ids"], norms=self._norms):
            values = score(backbone(**accepted(backbone, inputs), use_cache=False).last_hidden_state[:, first:])
        if values.shape[-1] != 1:
            raise ModelError(
                f"`value_model` returns {values.shape[-1]} numbers per position; it must return 1 (num_labels=1)."
            )
        return values.squeeze(-1).float()


def _masked(inputs: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The arguments of a backbone with the tokens masked that are not kept."""
    mask = inputs["attention_mask"] * keep
    found = {"input_ids": inputs["input_ids"] * keep, "attention_mask": mask}
    return found | ({"position_ids": positions(mask)} if "position_ids" in inputs else {})


class PolicyAndValue(Module):
    """Policy and value: the module that is trained, saved and wrapped for several processes (`trainer.model`)."""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: PreTrainedModel | PeftModel | None,
        *,
        temperature: float,
        detach_value: bool = True,
        padding_id: int | None = None,
        has_value: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.split_lm = SplitLM(policy)
        self.value: ValueHead | ValueModel | NoValue
        if not has_value:
            self.value = NoValue()
        elif value_model is None:
            self.value = ValueHead(self.split_lm.hidden_size)
        else:
            self.value = ValueModel(value_model, self.split_lm.vocab_size, padding_id)
        self.value.to(next(policy.parameters()).device)
        self.temperature = temperature
        self.detach_value = detach_value
        self.config = policy.config

    @property
    def restorable_value(self) -> list[nn.Parameter]:
        """The value's parameters that a rollback restores: those of a head or an adapter.

        A fully trained value model keeps its steps, which are finite: restoring them would take a copy of its weights and
        optimizer state, three times its size, in every update.
        """
        fully_trained = isinstance(self.value, ValueModel) and not isinstance(self.value.model, PeftModel)
        return [] if fully_trained else trainable(self.value)

    @property
    def value_trains_policy(self) -> bool:
        """Whether the value's loss has a gradient with respect to the policy: in a backbone that both use."""
        return isinstance(self.value, ValueHead) and not self.detach_value

    def forward(
        self,
        micro: MicroBatch,
        *,
        entropy: bool = False,
        values: bool = True,
        ref: PolicySnapshot | None = None,
        old: PolicySnapshot | None = None,
        limit: float | None = None,
    ) -> TokenOutputs:
        """The micro-batch's tokens under the policy; see `TokenOutputs` and the arguments of `token_statistics`. Without
        `values`, or without a value, these are 0."""
        inputs, first = model_inputs(micro)
        states, features = self.split_lm.hidden(inputs, first)
        hidden = predicting(states, micro)
        token = token_statistics(
            hidden,
            micro.targets,
            self.split_lm.head,
            vocab_size=self.split_lm.vocab_size,
            temperature=self.temperature,
            entropy=entropy,
            ref=ref,
            old=old,
            limit=limit,
        )
        found = self._values(inputs, first, features) if values else None
        value = features.new_zeros(features.shape[:2]) if found is None else found
        return TokenOutputs.of(token.spread(micro), value, hidden.detach())

    def _values(self, inputs: dict[str, Tensor], first: int, features: Tensor) -> Tensor | None:
        if isinstance(self.value, NoValue):
            return None
        if isinstance(self.value, ValueHead):
            return self.value(features.detach() if self.detach_value else features)
        return self.value(inputs, first)

    # -- what TRL's helpers and users call on the model of a trainer -------------------------------------------------------

    @property
    def value_model(self) -> ValueHead | PreTrainedModel | PeftModel | None:
        """The value model that was given, or the value head, under TRL's name; None without a value."""
        if isinstance(self.value, NoValue):
            return None
        return self.value.model if isinstance(self.value, ValueModel) else self.value

    @property
    def device(self) -> torch.device:
        """That of the policy."""
        return next(self.policy.parameters()).device

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the policy checkpoints its activations."""
        return activation_checkpointing.is_enabled(self.policy)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """That of the policy."""
        activation_checkpointing.enable(self.policy, gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """That of the policy."""
        activation_checkpointing.disable(self.policy)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """That of the policy."""
        return self.policy.generate(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """That of the policy, without the value: the result is loaded as any model or adapter."""
        return self.policy.save_pretrained(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """That of a policy with an adapter: the base model with the adapter's weights added to its own."""
        policy: Any = self.policy
        return policy.merge_and_unload(*args, **kwargs)

    def print_trainable_parameters(self) -> None:
        """That of a policy with an adapter."""
        policy: Any = self.policy
        policy.print_trainable_parameters()
