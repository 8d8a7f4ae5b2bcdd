"""A language model that another trainer trains: the hidden states of the trainer's passes, and of equal passes made here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..parallel.sharding import REPLICATED, Replicated
from ..trl_compat.trl_trainers import GenerationTrainer
from ..types import Head, MicroBatch, PolicySnapshot
from .dropout import noise_places, without_dropout
from .exact_kl import TokenStatistics, token_statistics
from .micro_batches import predicting
from .probes import as_in_training
from .reference import Reference
from .split_lm import OutputHead, SplitLM


class ObservedLM(SplitLM):
    """A model whose hidden states are read by a hook on its backbone while the complete model is called.

    The complete model, with the wrappers and adapters around its backbone, is what its trainer calls. `hidden_states` makes
    such a call with the model's own kernels, so that its result equals that of the trainer's pass. The calls that compute
    something belong into the context `without_noise`.

    Args:
        model: the model that the trainer calls.
        autocast: the context of the trainer's passes.
        temperature: the number by which the trainer divides logits.
        name: of the model, in messages.
        sharding: how its parameters are spread over processes.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        temperature: float,
        name: str = "model",
        sharding: Replicated = REPLICATED,
    ) -> None:
        self._sharding = sharding
        self._noise = noise_places(model)
        # Accelerate may have put autocast around the model's forward pass; the backbone alone is then tested under it too.
        prepared = hasattr(model, "_original_forward")
        with without_dropout(self._noise), autocast() if prepared else nullcontext():
            super().__init__(model, name=name)
        if isinstance(self.head, OutputHead) and sharding.shards_weights:
            self.head = self.head.without_hooks(sharding.holding)
        self.model = model
        self.autocast = autocast
        self.temperature = temperature
        self._states: Tensor | None = None
        self._options: dict[str, Any] = {"use_cache": False}
        if self.chunked and "logits_to_keep" in inspect.signature(self.causal.forward).parameters:
            self._options["logits_to_keep"] = 1  # the logits themselves are not read

    def watch(self) -> Callable[[], None]:
        """Keep the states of each training pass, which `states_of_training` returns, until the returned function is called.

        To be called when training begins, because a trainer may add noise then, as by `neftune_noise_alpha`.
        """
        self._noise = noise_places(self.model)
        if not self.chunked:
            return lambda: None

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():  # else a pass of generation, evaluation or measurement
                self._states = _last_states(output).detach()

        return self.backbone.register_forward_hook(keep).remove

    def states_of_training(self, micro: MicroBatch) -> Tensor | None:
        """The states [N, H] that predict the N response tokens, from the last training pass; None if that pass had another
        shape than the micro-batch, or was read before."""
        states, self._states = self._states, None
        rows, length = micro.input_ids.shape
        if states is None or states.shape[0] != rows or states.shape[1] < length:
            return None
        return predicting(states, micro)

    @contextmanager
    def without_noise(self) -> Iterator[None]:
        """The model as in training, but without gradients and without dropout.

        Autocast is entered for each pass: it keeps its casts of trained weights until it is left, and later passes would
        compute with those even if the weights have changed.
        """
        in_training = nullcontext() if self.model.training else as_in_training(self.model)
        with torch.no_grad(), without_dropout(self._noise), in_training:
            yield

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """The states [N, H] (or logits [N, V] without a separate head) that predict the N response tokens."""
        states: list[Tensor] = []
        inputs = {"input_ids": micro.input_ids, "attention_mask": micro.attention_mask}
        if not self.chunked:
            with self.autocast():
                return predicting(self.model(**inputs, **self._options).logits, micro)
        hook = self.backbone.register_forward_hook(lambda module, args, output: states.append(_last_states(output)))
        try:
            with self.autocast():
                self.model(**inputs, **self._options)
        finally:
            hook.remove()
        return predicting(states[-1], micro)

    def frozen_head(self) -> Head:
        if not isinstance(self.head, OutputHead):
            return self.head
        with self._sharding.holding(self.head.projection):
            return self.head.frozen()

    def compare(self, micro: MicroBatch, old: PolicySnapshot, ref: PolicySnapshot | None = None) -> TokenStatistics:
        """Log-probabilities under the current policy and π_old, exact KL(π_old‖π) and total variation, and with a reference
        KL(π‖π_ref), [b, t] each."""
        return self._statistics(micro, PolicySnapshot(self.hidden_states(micro), self.head), old=old, ref=ref)

    def to_reference(self, micro: MicroBatch, policy: PolicySnapshot, ref: PolicySnapshot) -> TokenStatistics:
        """Log-probabilities under a snapshot and the reference, and the exact KL(snapshot‖reference), [b, t] each."""
        return self._statistics(micro, policy, ref=ref)

    def _statistics(
        self,
        micro: MicroBatch,
        policy: PolicySnapshot,
        *,
        ref: PolicySnapshot | None = None,
        old: PolicySnapshot | None = None,
    ) -> TokenStatistics:
        with self.autocast(), ExitStack() as stack:
            for each in (policy, old, ref):
                projection = getattr(getattr(each, "head", None), "projection", None)
                if isinstance(projection, nn.Module):  # gathered once for all chunks
                    stack.enter_context(self._sharding.holding(projection))
            return token_statistics(
                policy.hidden, micro.targets, policy.head, vocab_size=self.vocab_size,
                temperature=self.temperature, ref=ref, old=old,
            ).spread(micro)  # fmt: skip


def observed_reference(
    trainer: GenerationTrainer, model: ObservedLM, sharding: Replicated = REPLICATED
) -> Reference | None:
    """The reference of a trainer of TRL, whose policy is `model`; None where TRL has none."""
    policy = trainer.model
    if isinstance(policy, PeftModel):
        return Reference(policy, model, adapter="ref" if "ref" in policy.peft_config else None)
    if trainer.ref_model is None:
        return None
    ref_model = trainer.accelerator.unwrap_model(trainer.ref_model)
    with sharding.loaded(trainer.ref_model):  # TRL has sharded it already
        ref_lm = ObservedLM(
            ref_model, autocast=model.autocast, temperature=model.temperature, name="ref_model", sharding=sharding
        )
        return Reference(policy, model, ref_model, ref_lm=ref_lm)


def _last_states(output: Any) -> Tensor:
    """The hidden states after the last layer, from the output of a backbone."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
