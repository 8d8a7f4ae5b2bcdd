"""A causal language model as a backbone and an output head, so that no pass needs the logits of all tokens at once."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import ModelError
from ..types import Head, MicroBatch
from . import cpu, lora, rms_norm
from .loading import trainable, without_adapter
from .micro_batches import positions, predicting
from .probes import as_in_training, close, token_ids

logger = logging.getLogger(__name__)


class OutputHead:
    """Hidden states to logits as the model computes them: projection, scaling, soft-capping."""

    def __init__(self, projection: nn.Module, config: Any) -> None:
        self.projection: Any = projection
        self._project: Callable[[Tensor], Tensor] = projection
        self.softcap = getattr(config, "final_logit_softcapping", getattr(config, "logits_soft_cap", None))
        self.divisor = getattr(config, "logits_scaling", None)
        self.factor = getattr(config, "logit_scale", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._project(hidden)
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
        """The head with its current weights: a copy, or the head itself if it has no trainable parameter."""
        if not trainable(self.projection):
            return self
        clone = copy.copy(self)
        clone.projection = clone._project = _AtWeights(self.projection)
        return clone

    def without_hooks(
        self, holding: Callable[[nn.Module], AbstractContextManager[None]] = lambda module: nullcontext()
    ) -> OutputHead:
        """The head without the hooks of its module, which an engine that shards has put around its use in a pass of the model.

        `holding` makes a context in which the module has its weights, which it has in passes of the model anyway.
        """

        def project(hidden: Tensor) -> Tensor:
            with holding(self.projection):
                logits: Tensor = self.projection.forward(hidden)
                return logits

        clone = copy.copy(self)
        clone._project = project
        return clone


class _WithoutHooks(nn.Module):
    """The forward pass of a module without its hooks, as those of an engine that shards, which expect its own weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Any:
        return self.module.forward(hidden)


class _AtWeights:
    """A module as it computes with its weights of now.

    It calls the module itself: in a copy, a forward pass that was assigned to the module, as TRL does for
    `cast_lm_head_to_fp32`, would compute with the module's own weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = _WithoutHooks(module)
        self._weights = {
            name: weight.detach().clone() for name, weight in self._module.named_parameters() if weight.requires_grad
        }

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._module, self._weights, (hidden,))
        return logits

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._weights.values())


class SplitLM:
    """A causal language model as a backbone (tokens to hidden states) and a head (hidden states to logits).

    It is not a module and registers nothing. If the head does not reproduce the model's logits, which the constructor
    tests, the complete forward pass is used instead of the backbone, and its logits instead of the hidden states, and a warning
    is logged.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, name: str = "model") -> None:
        self.causal = without_adapter(model)
        self._lora_layers = lora.linear_layers(self.causal)
        self._norms = rms_norm.plain_layers(self.causal)
        kind, config = type(self.causal).__name__, self.causal.config.get_text_config()
        projection = self.causal.get_output_embeddings()
        if projection is None:
            raise ModelError(
                f"`{name}` is a {kind}, which has no output head over a vocabulary; it must be a causal language model, such "
                "as AutoModelForCausalLM.from_pretrained(name)."
            )
        self.vocab_size = int(projection.weight.shape[0]) if hasattr(projection, "weight") else int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.backbone: Any = getattr(self.causal, self.causal.base_model_prefix, None)
        self.head: Head = OutputHead(projection, config)
        with torch.no_grad(), as_in_training(self.causal):
            self.chunked = self.backbone is not None and self._reproduces_logits()
            states, again, flipped = (self._states_after_padding(flip) for flip in (False, False, True))
        if states.isnan().any():
            raise ModelError(
                f"`{name}` is a {kind} whose results for a few tokens are NaN: its weights are damaged, or too large "
                f"for {states.dtype}. Load other weights, or load it with dtype=torch.float32."
            )
        if not close(again, states, 1e-3):
            raise ModelError(
                f"`{name}` is a {kind} for which two passes over the same tokens differ in training mode, so that no ratio or "
                "divergence is meaningful. Set every source of randomness to 0 in its configuration, such as "
                "model.config.hidden_dropout; if its experts are drawn at random, use another model."
            )
        if not self.chunked:
            self.head = nn.Identity()
            logger.warning(
                f"{name}: the logits of {kind} differ from output_head(hidden_states); exact divergences are "
                "computed from the complete forward pass, with the logits [b, t, V] of one micro-batch at a time."
            )
        if not close(flipped, states, 1e-3):
            logger.warning(
                f"{name}: {kind} does not ignore padding: its results for a prompt depend on the lengths of the other prompts "
                "of the batch, in generation, training and measurement. Use prompts of equal length, or avoid padding with "
                "per_device_train_batch_size=1 and local_rollout_forward_batch_size=1."
            )

    def _states_after_padding(self, flip: bool) -> Tensor:
        """The states of 4 tokens after 4 masked ones, in reverse order with `flip`."""
        ids = token_ids(self.causal, 8)
        if flip:
            ids = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
        mask = torch.arange(8, device=ids.device).unsqueeze(0) >= 4
        return self.hidden({"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions(mask)}, 4)[0]

    def _reproduces_logits(self) -> bool:
        ids = token_ids(self.causal, 4)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        try:
            states = self.backbone(**inputs).last_hidden_state
            logits = self.head(states)
        except (TypeError, AttributeError, RuntimeError):
            return False
        expected = self.causal(**inputs).logits
        self.hidden_size = int(states.shape[-1])  # of the value's input; OPT-350m, for example, projects its states
        # Relative to the largest logit: while logits are small, a missing soft cap changes them little.
        tolerance = 1e-3 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-5
        return logits.shape == expected.shape and close(logits, expected, tolerance)

    def hidden(self, inputs: dict[str, Tensor], first: int) -> tuple[Tensor, Tensor]:
        """The inputs of the head and of the value at the positions from `first` on: [b, t + 1, H or V], [b, t + 1, H]."""
        with faster_kernels(self.causal, inputs["input_ids"], self._lora_layers, self._norms):
            if self.chunked:
                states = self.backbone(**accepted(self.backbone, inputs), use_cache=False).last_hidden_state[:, first:]
                return states, states
            out = self.causal(**accepted(self.causal, inputs), use_cache=False, output_hidden_states=True)
        return out.logits[:, first:], out.hidden_states[-1][:, first:]

    def adapt_to_shards(self) -> None:
        """Keep to what an engine that shards allows.

        A kernel may read the weights of a layer only within the layer. And the head is called without its hooks: a process
        calls it once for each chunk of its tokens, but the engine's hooks expect the same calls in every process.
        """
        self._lora_layers = []
        if isinstance(self.head, OutputHead):
            self.head = self.head.without_hooks()

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """The states [N, H] (or logits [N, V] without a separate head) that predict the N response tokens."""
        states, _ = self.hidden(*model_inputs(micro))
        return predicting(states, micro)

    def frozen_head(self) -> Head:
        """The head with its current weights, which later updates of the model do not change."""
        return self.head.frozen() if isinstance(self.head, OutputHead) else self.head


def model_inputs(micro: MicroBatch) -> tuple[dict[str, Tensor], int]:
    """The arguments of a backbone, and the first position whose state predicts a response token."""
    first = micro.input_ids.shape[1] - micro.response_ids.shape[1] - 1
    inputs = {"input_ids": micro.input_ids, "attention_mask": micro.attention_mask}
    if micro.position_ids is not None:
        inputs["position_ids"] = micro.position_ids
    return inputs, first


def accepted(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that the module's `forward` names, since some models take no position ids; all if it names none."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in inputs.items() if name in names or "input_ids" not in names}


def checkpointed(model: nn.Module) -> list[Any]:
    """The modules with gradient checkpointing, whose forward pass is repeated in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def faster_kernels(
    model: nn.Module, input_ids: Tensor, lora_layers: Sequence[Any] = (), norms: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """The faster kernels of attention, LoRA layers and norms for these tokens, the same in every pass over them.

    With gradient checkpointing the backward pass would recompute outside of this context, with other kernels; such a
    model keeps those of PyTorch and PEFT.
    """
    if checkpointed(model):
        yield
    else:
        with lora.short_forward(lora_layers), rms_norm.short_backward(norms), cpu.attention_kernel(input_ids):
            yield
