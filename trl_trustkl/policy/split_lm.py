"""A causal language model in two halves, backbone and output head, so that logits need not be made for all tokens at once."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, TypeGuard

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..errors import ModelError
from ..types import Head, MicroBatch
from . import lora
from .loading import trainable
from .micro_batches import positions

logger = logging.getLogger(__name__)


class OutputHead:
    """Hidden states to logits as the model itself computes them: projection, scaling, soft-capping."""

    def __init__(self, projection: nn.Module, config: Any) -> None:
        self.projection = projection
        self.softcap = getattr(config, "final_logit_softcapping", getattr(config, "logits_soft_cap", None))
        self.divisor = getattr(config, "logits_scaling", None)
        self.factor = getattr(config, "logit_scale", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.projection(hidden)
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.factor is not None:
            logits = logits * self.factor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.projection.parameters()

    def frozen(self) -> OutputHead:
        """This head as it is now: itself where nothing in it is trained, else a copy."""
        if not trainable(self.projection):
            return self
        clone = copy.copy(self)
        clone.projection = copy.deepcopy(self.projection).requires_grad_(False)
        return clone


def _identity_head(logits: Tensor) -> Tensor:
    return logits


class SplitLM:
    """A causal language model as backbone (tokens to hidden states) and head (hidden states to logits).

    Not a module: it registers nothing. Where the head does not reproduce the model's own logits (probed once), it falls
    back to the model's whole forward pass with the logits in the place of the hidden states, and says so.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, name: str = "model") -> None:
        self.model = model
        self.causal = model.get_base_model() if isinstance(model, PeftModel) else model
        self._lora_layers = lora.linear_layers(self.causal)
        config = self.causal.config.get_text_config()
        projection = self.causal.get_output_embeddings()
        if projection is None:
            raise ModelError(
                f"`{name}` is a {type(self.causal).__name__}, which has no output head over a vocabulary; it must be a causal "
                "language model, such as AutoModelForCausalLM.from_pretrained(name)."
            )
        self.vocab_size = int(projection.weight.shape[0]) if hasattr(projection, "weight") else int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.backbone: Any = getattr(self.causal, self.causal.base_model_prefix, None)
        self.head: Head = OutputHead(projection, config)
        self.chunked = self.backbone is not None and self._reproduces_logits()
        states = self._behind_padding()
        if _differ(states, self._behind_padding()):
            raise ModelError(
                f"`{name}` is a {type(self.causal).__name__} of which two passes over the same tokens differ in training; no "
                "ratio or divergence of it means anything. Set what is random in it to 0 in its configuration, such as "
                "model.config.hidden_dropout; where experts are drawn at random, take another model."
            )
        if not self.chunked:
            self.head = _identity_head
            logger.warning(
                "%s: the logits of %s are not its output head applied to its hidden states; exact divergences take them "
                "from the whole forward pass, [b, t, V] for a micro-batch at a time.",
                name,
                type(self.causal).__name__,
            )
        if _differ(states, self._behind_padding(flipped=True)):
            logger.warning(
                "%s: %s does not ignore padding: what it makes of a prompt depends on how much longer the prompts beside it "
                "are, when it generates, is trained and is measured. Give prompts of one length, or set "
                "per_device_train_batch_size=1 and local_rollout_forward_batch_size=1, and nothing is padded.",
                name,
                type(self.causal).__name__,
            )

    @torch.no_grad()
    def _behind_padding(self, *, flipped: bool = False) -> Tensor:
        """The states of a few tokens behind as many that are masked; `flipped`: behind others."""
        device = next(self.causal.parameters()).device
        ids = torch.arange(1, 9, device=device).unsqueeze(0) % self.vocab_size
        if flipped:
            ids = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
        mask = torch.arange(8, device=device).unsqueeze(0) >= 4
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions(mask)}
        with as_in_training(self.causal):
            return self.hidden(inputs, 4)[0]

    @torch.no_grad()
    def _reproduces_logits(self) -> bool:
        device = next(self.causal.parameters()).device
        ids = torch.arange(1, 5, device=device).unsqueeze(0) % self.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with as_in_training(self.causal):
            try:
                states = self.backbone(**inputs).last_hidden_state
                mine = self.head(states)
            except (TypeError, AttributeError, RuntimeError):
                return False
            theirs = self.causal(**inputs).logits
        self.hidden_size = int(states.shape[-1])  # what the value reads; a few models (OPT-350m) project their states
        # Relative to the largest: where logits are still small, a soft cap that is left out changes them little.
        tolerance = 1e-3 if mine.dtype in (torch.float16, torch.bfloat16) else 1e-5
        return mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())

    def hidden(self, inputs: dict[str, Tensor], first: int) -> tuple[Tensor, Tensor]:
        """What the head wants and what the value wants at the positions from `first` on: [b, t + 1, H or V], [b, t + 1, H]."""
        with faster_kernels(self.causal, inputs["input_ids"], self._lora_layers):
            if self.chunked:
                states = self.backbone(**accepted(self.backbone, inputs), use_cache=False).last_hidden_state[:, first:]
                return states, states
            out = self.causal(**accepted(self.causal, inputs), use_cache=False, output_hidden_states=True)
        return out.logits[:, first:], out.hidden_states[-1][:, first:]

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """The states [N, H] (or logits [N, V], where there is no separate head) that predict the N response tokens."""
        inputs, first = model_inputs(micro)
        states, _ = self.hidden(inputs, first)
        return states[:, :-1][micro.response_mask]

    def frozen_head(self) -> Head:
        return self.head.frozen() if isinstance(self.head, OutputHead) else self.head


def _differ(states: Tensor, others: Tensor) -> bool:
    """By more than kernels may; where tokens under the mask make no difference, it is none to the bit."""
    return bool((states - others).abs().max() > 1e-3 * states.abs().max())


def model_inputs(micro: MicroBatch) -> tuple[dict[str, Tensor], int]:
    """A backbone's arguments, and the first position whose state predicts a response token."""
    first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
    return {name: getattr(micro, name) for name in ("input_ids", "attention_mask", "position_ids")}, first


def accepted(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that the module's forward names, since some models have no position ids; all where it names none."""
    names = inspect.signature(module.forward).parameters
    if "input_ids" not in names:
        return inputs
    return {name: value for name, value in inputs.items() if name in names}


class Checkpointed(Protocol):
    """A part of a model that is recomputed in the backward pass."""

    gradient_checkpointing: bool


def checkpointed(model: nn.Module) -> list[Checkpointed]:
    return [module for module in model.modules() if _is_checkpointed(module)]


def _is_checkpointed(module: nn.Module) -> TypeGuard[Checkpointed]:
    return bool(getattr(module, "gradient_checkpointing", False))


SHORT = 128
"""Tokens up to which, on a CPU in bf16, attention written out beats the fused kernel with its slow backward."""


def faster_kernels(model: nn.Module, input_ids: Tensor, lora_layers: Sequence[Any] = ()) -> AbstractContextManager[Any]:
    """The faster kernels of attention and of LoRA layers for these tokens, the same in every pass over them.

    A model with gradient checkpointing recomputes its passes outside of this context, in the backward; it keeps PyTorch's
    and PEFT's own.
    """
    if checkpointed(model):
        return nullcontext()
    with ExitStack() as stack:
        if lora_layers:
            stack.enter_context(lora.short_forward(lora_layers))
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if input_ids.device.type == "cpu" and bf16 and input_ids.shape[1] <= SHORT:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack.pop_all()


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """`model` in train mode: the kernels of a forward pass may depend on it (see `quantization.unpack_4bit_weights`)."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
