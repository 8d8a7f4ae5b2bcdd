"""What is trained: one backbone with a policy adapter and a value head, or a separate model for each.

`PolicyAndValue` is the module that is trained, saved and wrapped for several processes; one call gives log-probabilities,
values and exact divergences of a micro-batch. The reference is in `reference.py`.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..trl_compat.module import Module
from ..types import MicroBatch, PolicySnapshot, TokenOutputs
from .exact_kl import token_statistics
from .loading import trainable
from .split_lm import SplitLM, accepted, faster_kernels, model_inputs


class ValueHead(Module):
    """A linear value on the policy's hidden states, in float32, 0 at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


class ValueModel(Module):
    """A value model of its own: a sequence classifier with one label, read at every position.

    `vocab_size` is the policy's: the value reads whatever that may sample.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        backbone, score = getattr(base, getattr(base, "base_model_prefix", ""), None), getattr(base, "score", None)
        if backbone is None or score is None:
            raise ModelError(
                f"`value_model` is a {type(base).__name__}; it must be a sequence classifier with one label, such as "
                "AutoModelForSequenceClassification.from_pretrained(name, num_labels=1), or None for a value head."
            )
        known = backbone.get_input_embeddings().weight.shape[0]
        if known < vocab_size:
            raise ModelError(
                f"`value_model` has {known} embeddings, fewer than the {vocab_size} tokens of the policy, whose token ids it "
                "reads; take one with the policy's tokenizer, and where that is so, "
                f"value_model.resize_token_embeddings({vocab_size})."
            )
        self._parts = (backbone, score)  # a tuple, so that nothing is registered twice

    def forward(self, inputs: dict[str, Tensor], first: int) -> Tensor:
        backbone, score = self._parts
        with faster_kernels(self.model, inputs["input_ids"]):
            values = score(backbone(**accepted(backbone, inputs), use_cache=False).last_hidden_state[:, first:])
        if values.shape[-1] != 1:
            raise ModelError(
                f"`value_model` gives {values.shape[-1]} numbers per position; it must give 1 (num_labels=1)."
            )
        return values.squeeze(-1).float()


class PolicyAndValue(Module):
    """The policy and its value; the module behind `trainer.model`."""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: PreTrainedModel | PeftModel | None,
        *,
        temperature: float,
        detach_value: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.split_lm = SplitLM(policy)
        if value_model is None:
            self.value: ValueHead | ValueModel = ValueHead(self.split_lm.hidden_size)
        else:
            self.value = ValueModel(value_model, self.split_lm.vocab_size)
        self.value.to(next(policy.parameters()).device)
        self.temperature = temperature
        self.detach_value = detach_value
        self.config = policy.config

    @property
    def restorable_value(self) -> list[nn.Parameter]:
        """What of the value an update that is undone takes back: a head, or an adapter.

        A model of its own that is trained in full keeps its steps, each of them finite: to take them back would cost a copy
        of its weights and of their optimizer's state, three times its size, in every update.
        """
        in_full = isinstance(self.value, ValueModel) and not isinstance(self.value.model, PeftModel)
        return [] if in_full else trainable(self.value)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.policy.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.policy.gradient_checkpointing_disable()

    def forward(
        self,
        micro: MicroBatch,
        *,
        entropy: bool = False,
        values: bool = True,
        ref: PolicySnapshot | None = None,
        old: PolicySnapshot | None = None,
    ) -> TokenOutputs:
        """The micro-batch's tokens under the policy; see `TokenOutputs`."""
        inputs, first = model_inputs(micro)
        states, features = self.split_lm.hidden(inputs, first)
        mask = micro.response_mask
        counted = states[:, :-1][mask]
        token = token_statistics(
            counted,
            micro.response_ids[mask],
            self.split_lm.head,
            vocab_size=self.split_lm.vocab_size,
            temperature=self.temperature,
            entropy=entropy,
            ref=ref,
            old=old,
        )
        return TokenOutputs(
            logp=spread(token.logp, mask),
            values=self._values(inputs, first, features) if values else features.new_zeros(features.shape[:2]),
            hidden=counted.detach(),
            entropy=spread(token.entropy, mask),
            ref_logp=spread(token.ref_logp, mask),
            ref_kl=spread(token.ref_kl, mask),
            old_kl=spread(token.old_kl, mask),
            old_tv=spread(token.old_tv, mask),
        )

    def _values(self, inputs: dict[str, Tensor], first: int, features: Tensor) -> Tensor:
        if isinstance(self.value, ValueHead):
            return self.value(features.detach() if self.detach_value else features)
        return self.value(inputs, first)


@overload
def spread(values: Tensor, mask: Tensor) -> Tensor: ...
@overload
def spread(values: Tensor | None, mask: Tensor) -> Tensor | None: ...
def spread(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """[N] values back to [b, t], 0 where nothing counts."""
    if values is None:
        return None
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
