"""Runs of TRL's trainers with a TrustRegionCallback, and a second implementation of what it measures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from tests import tiny
from tests.dense import dense_kl, rollout_logps
from tests.trl_trainers import trainer_of
from tests.weights import trained_weights
from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records
from trl_trustkl.types import Rollout

LIMIT = 0.01
ROUNDING = 1e-6
"""Of a KL in float32."""
Weights = dict[str, Tensor]


class Batch(NamedTuple):
    """A generation batch, the weights that sampled it, and the number of the first optimizer step on it, from 1."""

    rollout: Rollout
    old: Weights
    first: int


class Witness(TrainerCallback):
    """Keeps every generation batch, and the weights and the optimizer's state around every step.

    It is the first of its trainer's callbacks, so that `proposed` and `moments` are those before any enforcement, and `kept`
    and `kept_moments` those after the enforcement of windows that ended. `rates`: the learning rate of each step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches: list[Batch] = []
        self.proposed: list[Weights] = []
        self.kept: list[Weights] = []
        self.moments: list[Any] = []
        self.kept_moments: list[Any] = []
        self.rates: list[float] = []
        self._buffer: Any = None
        self._unhook: Any = lambda: None

    def _see(self, step: int) -> None:
        buffer = self.trainer._buffered_inputs
        if buffer is not self._buffer:
            self._buffer = buffer
            self.batches.append(Batch(generated(buffer), trained_weights(self.trainer.model), step))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see(state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see(state.global_step + 1)
        self._unhook()  # of a step that failed
        optimizer = self.trainer.optimizer
        hook = optimizer.optimizer.register_step_pre_hook(
            lambda inner, *_: self.rates.append(inner.param_groups[0]["lr"])
        )
        self._unhook = hook.remove

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._unhook()
        self.proposed.append(trained_weights(self.trainer.model))
        self.moments.append(moments(self.trainer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(trained_weights(self.trainer.model))
        self.kept_moments.append(moments(self.trainer))

    def steps_of(self, number: int) -> range:
        """The indices of the steps made on a batch, from its number, by the passes that TRL makes on it."""
        args = self.trainer.args
        passes, accumulated = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
        return range(number * passes // accumulated, min(-(-(number + 1) * passes // accumulated), len(self.kept)))


def generated(buffer: list[dict[str, Tensor]]) -> Rollout:
    """The rows of a generation batch. The mask has the tokens with a loss."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    ids, mask, new, new_mask = (torch.cat([part[name] for part in buffer]) for name in names)
    return Rollout(ids, mask.bool(), new, new_mask.bool())


def moments(trainer: Any) -> Any:
    """A copy of the optimizer's state, in the order of the parameters."""
    return copy.deepcopy(trainer.optimizer.state_dict()["state"])


def same_moments(one: Any, other: Any) -> bool:
    """Whether two states of an optimizer are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys() and all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        for key in one
    )


@cache
def _llama() -> Any:
    """The tiny Llama of `trainer_of` with an adapter, in float64."""
    return get_peft_model(tiny.llama(num_hidden_layers=1), tiny.lora()).double().requires_grad_(False)


def kls(batch: Rollout, old: Mapping[str, Tensor], new: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The exact KL(π_old‖π) at every response token, [N]: in float64, by complete forward passes of another model."""
    return dense_kl(logps(batch, old, temperature), logps(batch, new, temperature))


def logps(batch: Rollout, weights: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """log π over the vocabulary at every response token, [N, V], of the tiny Llama with these weights of its adapter."""
    model = _llama()
    for name, weight in model.named_parameters():
        if name in weights:
            weight.copy_(weights[name])
    return rollout_logps(model, batch, temperature)


def saved(folder: Path) -> Weights:
    """The weights of the adapter in a checkpoint, by their names in the model and in its order."""
    weights = load_file(folder / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
    return {name: named[name] for name, _ in _llama().named_parameters() if "lora_" in name}


def limited(kind: str, folder: Any, *, report: bool = True, witness: bool = False, **options: Any) -> Any:
    """TRL's trainer of this kind with a TrustRegionCallback, `options` being its limits and the settings of the run."""
    names = ("max_kl", "stop", "lr_target", "panic_kl", "every", "anchor")
    limits = {name: options.pop(name) for name in names if name in options}
    trainer = trainer_of(kind, folder, **options)
    if witness:
        trainer.witness = Witness(trainer)
        trainer.callback_handler.callbacks.insert(0, trainer.witness)
    trainer.add_callback(TrustRegionCallback(trainer, **limits))
    if report:
        trainer.add_callback(BoundReportCallback(report=False))
    return trainer


def records_of(trainer: Any) -> list[dict[str, Any]]:
    """The records of a run, which is made first."""
    trainer.train()
    return load_records(trainer.args.output_dir)
