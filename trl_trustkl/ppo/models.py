"""The models of a run: one backbone with a policy adapter and a value head, or separate models for each.

`PolicyAndValue` is the module that is trained, saved and wrapped for several processes; one call gives log-probabilities,
values and exact divergences of a micro-batch. The reference is in `reference.py`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ConfigError, ModelError
from ..logprobs import token_statistics
from ..types import Head, MicroBatch, Peer, TokenOutputs
from . import lora

logger = logging.getLogger(__name__)

# -- loading and preparing ---------------------------------------------------------------------------------------------


def load_causal_lm(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """A causal language model by name; `init_kwargs` go to `from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(name, **(init_kwargs or {}))


def load_scalar_model(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """A reward or value model (a sequence classifier with one label) by name."""
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **(init_kwargs or {}))


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: Any,
    peft_config: PeftConfig | None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The policy, ready to train, and its tokenizer, with a padding token; both loaded where `model` is a name."""
    if processing_class is None:
        if not isinstance(model, str):
            raise ModelError("`processing_class` got None; it is optional only when `model` is a name.")
        processing_class = AutoTokenizer.from_pretrained(model)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ModelError(f"`processing_class` got {type(processing_class).__name__}; it must be a tokenizer.")
    if isinstance(model, str):
        model = load_causal_lm(model, args.model_init_kwargs)
    elif args.model_init_kwargs:
        raise ConfigError(
            "`model_init_kwargs` was given with a model that is loaded already; it is for models given by name."
        )
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise ModelError(f"`model` got {type(model).__name__}; it must be a causal language model or the name of one.")
    model.config.get_text_config().pad_token_id = pad_token_id(processing_class)
    return prepare_policy(model, peft_config, args), processing_class


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token; the stop token stands in where it has none, which the masks make safe."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "`processing_class` has neither a pad token nor an eos token; set one, for example "
                "tokenizer.add_special_tokens({'pad_token': '<pad>'})."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def prepare_policy(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: Any) -> nn.Module:
    """The policy ready to train: quantised weights prepared, adapter added, dropout off, gradient checkpointing on."""
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise ModelError(
                f"`peft_config` got {type(peft_config).__name__}; it must be a peft.PeftConfig such as LoraConfig(...)."
            )
        if isinstance(model, PeftModel):
            raise ModelError(
                "`peft_config` was given with a model that already has an adapter; leave `peft_config` out to go on "
                "training that adapter, or merge it first with model.merge_and_unload()."
            )
        if is_quantized(model):
            unpack_4bit_weights(model)
        model = get_peft_model(model, peft_config)
    elif is_quantized(model):
        if not isinstance(model, PeftModel):
            raise ModelError(
                "`model` is quantised and has no adapter: its weights cannot be trained; pass `peft_config=LoraConfig(...)`."
            )
        unpack_4bit_weights(model)
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"`peft_config` is {type(model.active_peft_config).__name__}: prompt-learning adapters change the input "
                "instead of the weights and are not supported; use LoRA or another adapter of the weights."
            )
        model.set_adapter(args.model_adapter_name or "default")
        lora.shorten(model)
    disable_dropout(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_checkpointing_kwargs(args))
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "`model` has no trainable parameter; load its adapter with is_trainable=True, or pass `peft_config`."
        )
    return model


def prepare_value_model(model: Any, args: Any) -> nn.Module | None:
    """A value model of its own, ready to train; None stays None, for a head on the policy."""
    if model is None:
        return None
    if isinstance(model, str):
        model = load_scalar_model(model, args.model_init_kwargs)
    if is_quantized(model):
        unpack_4bit_weights(model)
    disable_dropout(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_checkpointing_kwargs(args))
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    if not trainable(model):
        raise ModelError("`value_model` has no trainable parameter; load its adapter with is_trainable=True.")
    return model


def _checkpointing_kwargs(args: Any) -> dict[str, Any]:
    return {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}


def unpack_4bit_weights(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights for CPU inference.

    A forward pass in eval mode packs them on CPUs with AVX512-BF16, and the packed kernel has no gradient: training such
    a model would silently leave most of its adapter where it was.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, state
            )


@contextmanager
def dequantised_on_cpu(model: nn.Module) -> Iterator[None]:
    """Multiply by the same weights, written out once in the compute type, where a CPU would do so again for every token.

    For sampling, when there are no activations to keep; it takes two bytes a weight in bf16. Leaves a GPU to its kernels.
    """
    # PEFT's layers around them have the same name, and no compute type.
    named = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and "compute_dtype" in vars(m)]
    layers = [m for m in named if m.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = _plain_product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain_product(layer: Any) -> Callable[[Tensor], Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    bias = layer.bias

    def product(x: Tensor) -> Tensor:
        dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)).to(x.dtype)

    return product


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, the attention's own rates included: with dropout the ratio is not 1 before the first step."""
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


# -- a causal language model in two halves -----------------------------------------------------------------------------


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


class CausalHalves:
    """A causal language model as backbone (tokens to hidden states) and head (hidden states to logits).

    Not a module: it registers nothing. Where the head does not reproduce the model's own logits (probed once), it falls
    back to the model's whole forward pass with the logits in the place of the hidden states, and says so.
    """

    def __init__(self, model: nn.Module, *, name: str = "model") -> None:
        self.model = model
        self.causal = model.get_base_model() if isinstance(model, PeftModel) else model
        config = self.causal.config.get_text_config()
        projection = self.causal.get_output_embeddings()
        if projection is None:
            raise ModelError(f"`{name}` is a {type(self.causal).__name__}, which has no output head over a vocabulary.")
        self.vocab_size = int(projection.weight.shape[0]) if hasattr(projection, "weight") else int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.backbone = getattr(self.causal, self.causal.base_model_prefix, None)
        self.head: OutputHead | Any = OutputHead(projection, config)
        self.chunked = self.backbone is not None and self._reproduces_logits()
        if not self.chunked:
            self.head = _identity_head
            logger.warning(
                "%s: the logits of %s are not its output head applied to its hidden states; exact divergences take them "
                "from the whole forward pass, [b, t, V] for a micro-batch at a time.",
                name,
                type(self.causal).__name__,
            )

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
        with attention_kernel(self.causal, inputs["input_ids"]):
            if self.chunked:
                states = self.backbone(**accepted(self.backbone, inputs), use_cache=False).last_hidden_state[:, first:]
                return states, states
            out = self.causal(**accepted(self.causal, inputs), use_cache=False, output_hidden_states=True)
        return out.logits[:, first:], out.hidden_states[-1][:, first:]

    def frozen_head(self) -> Head:
        return self.head.frozen() if self.chunked else self.head


def accepted(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that the module's forward names, since some models have no position ids; all where it names none."""
    names = inspect.signature(module.forward).parameters
    if "input_ids" not in names:
        return inputs
    return {name: value for name, value in inputs.items() if name in names}


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are recomputed in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


SHORT = 128
"""Tokens up to which, on a CPU in bf16, attention written out beats the fused kernel with its slow backward."""


def attention_kernel(model: nn.Module, input_ids: Tensor) -> AbstractContextManager[Any]:
    """The faster kernel of `scaled_dot_product_attention` for these tokens, the same in every pass over them.

    A pass that is recomputed in the backward would be so outside of this context; there the choice is PyTorch's.
    """
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if input_ids.device.type != "cpu" or not bf16 or input_ids.shape[1] > SHORT or checkpointed(model):
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """`model` in train mode: the kernels of a forward pass may depend on it (see `unpack_4bit_weights`)."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


# -- the value ---------------------------------------------------------------------------------------------------------


class ValueHead(nn.Module):
    """A linear value on the policy's hidden states, in float32, 0 at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A value model of its own: a sequence classifier with one label, read at every position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        backbone, score = getattr(base, getattr(base, "base_model_prefix", ""), None), getattr(base, "score", None)
        if backbone is None or score is None:
            raise ModelError(
                f"`value_model` is a {type(base).__name__}; it must be a sequence classifier with one label, such as "
                "AutoModelForSequenceClassification.from_pretrained(name, num_labels=1), or None for a value head."
            )
        self._parts = (backbone, score)  # a tuple, so that nothing is registered twice

    def forward(self, inputs: dict[str, Tensor], first: int) -> Tensor:
        backbone, score = self._parts
        with attention_kernel(self.model, inputs["input_ids"]):
            values = score(backbone(**accepted(backbone, inputs), use_cache=False).last_hidden_state[:, first:])
        if values.shape[-1] != 1:
            raise ModelError(
                f"`value_model` gives {values.shape[-1]} numbers per position; it must give 1 (num_labels=1)."
            )
        return values.squeeze(-1).float()


# -- what is trained ---------------------------------------------------------------------------------------------------


class PolicyAndValue(nn.Module):
    """The policy and its value; the module behind `trainer.model`."""

    def __init__(
        self, policy: nn.Module, value_model: nn.Module | None, *, temperature: float, detach_value: bool = True
    ) -> None:
        super().__init__()
        self.policy = policy
        self.halves = CausalHalves(policy)
        self.value = ValueModel(value_model) if value_model is not None else ValueHead(self.halves.hidden_size)
        self.value.to(next(policy.parameters()).device)
        self.temperature = temperature
        self.detach_value = detach_value
        self.config = policy.config

    @property
    def shares_backbone(self) -> bool:
        return isinstance(self.value, ValueHead)

    @property
    def undoable_value(self) -> list[nn.Parameter]:
        """What of the value an update that is undone takes back: a head, or an adapter.

        A model of its own that is trained in full keeps its steps, each of them finite: to take them back would cost a copy
        of its weights and of their optimizer's state, three times its size, in every update.
        """
        in_full = not self.shares_backbone and not isinstance(self.value.model, PeftModel)
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
        ref: Peer | None = None,
        old: Peer | None = None,
    ) -> TokenOutputs:
        """The micro-batch's tokens under the policy; see `TokenOutputs`."""
        inputs, first = model_inputs(micro)
        states, features = self.halves.hidden(inputs, first)
        mask = micro.response_mask
        counted = states[:, :-1][mask]
        token = token_statistics(
            counted,
            micro.response_ids[mask],
            self.halves.head,
            vocab_size=self.halves.vocab_size,
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
        if self.shares_backbone:
            return self.value(features.detach() if self.detach_value else features)
        return self.value(inputs, first)


def model_inputs(micro: MicroBatch) -> tuple[dict[str, Tensor], int]:
    """A backbone's arguments, and the first position whose state predicts a response token."""
    first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
    return {name: getattr(micro, name) for name in ("input_ids", "attention_mask", "position_ids")}, first


def spread(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """[N] values back to [b, t], 0 where nothing counts."""
    if values is None:
        return None
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
