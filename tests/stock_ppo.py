"""TRL's PPO trainer and this package's, from copies of the same models and with the same responses.

The responses are given by a `Script`, because the two trainers sample from different random streams. The old
log-probabilities, which TRL takes from generation, are then those of a forward pass in both.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from tests import tiny
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer
from trl_trustkl.types import Prompts, Rollout

ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 removed its PPO trainer")
ppo_config = pytest.importorskip("trl.experimental.ppo.ppo_config")

TOLERANCE = 5e-5
MOVED = 1e-3
ROWS, LENGTH, UPDATES = 10, 8, 4
EOS, FIRST_WORD = 2, 7
ENDS = (None, LENGTH, LENGTH - 1, 1, LENGTH // 2)
"""The number of tokens of a response, including the stop token; None: it has no stop token."""

NEUTRAL = {
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 3,
    "total_episodes": ROWS * UPDATES,
    "response_length": LENGTH,
    "stop_token": "eos",
    "temperature": 0.7,
    "kl_estimator": "k1",
    "kl_coef": 0.2,
    "vf_coef": 0.5,
    "optim": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": 0.0,
    **tiny.QUIET,
    "num_sample_generations": 0,
}


# -- the same responses for both ---------------------------------------------------------------------------------------


class Script:
    """Responses that depend on the prompt and the update: random words, then `stop`, then padding."""

    def __init__(self, ends: tuple[int | None, ...] = ENDS, *, stop: int = EOS, pad: int = 0) -> None:
        self.ends, self.stop, self.pad = ends, stop, pad

    def response(self, prompt: list[int], update: int) -> list[int]:
        words = random.Random(f"{prompt} {update}").choices(range(FIRST_WORD, tiny.VOCAB), k=LENGTH)
        end = self.ends[(prompt[0] + update) % len(self.ends)]
        return words if end is None else words[: end - 1] + [self.stop] + [self.pad] * (LENGTH - end)

    def responses(self, ids: Tensor, mask: Tensor, update: int) -> Tensor:
        return torch.tensor([self.response(row[keep].tolist(), update) for row, keep in zip(ids, mask, strict=True)])

    def mask(self, responses: Tensor) -> Tensor:
        """True up to and including the first stop token."""
        ended = (responses == self.stop).long().cumsum(-1)
        return (ended == 0) | ((ended == 1) & (responses == self.stop))

    def as_generation(self) -> Callable:
        """A replacement for TRL's `batch_generation`; its scores are logits of a forward pass divided by the temperature."""
        update = -1

        @torch.no_grad()
        def batch_generation(model, queries, _, pad_token_id, generation_config):
            nonlocal update
            update += 1
            tokens = (queries != pad_token_id).long().cumsum(-1) > 0
            sequences = torch.cat([queries, self.responses(queries, tokens, update)], dim=1)
            logits = ppo_trainer.forward(model, sequences, pad_token_id).logits
            return sequences, logits[:, queries.shape[1] - 1 : -1] / generation_config.temperature

        return batch_generation


SCRIPT = Script()


class ScriptedTrainer(TrustKLPPOTrainer):
    """This package's trainer, with the responses of `script` unless that is None."""

    script: Script | None = None

    def rollout(self, prompts: Prompts) -> Rollout:
        if self.script is None:
            return super().rollout(prompts)
        responses = self.script.responses(prompts.ids, prompts.mask, self.state.global_step)
        mask = self.script.mask(responses)
        return Rollout(prompts.ids, prompts.mask, responses, mask, None, prompts.rows)


# -- the same models and data for both ---------------------------------------------------------------------------------


class Models(NamedTuple):
    policy: nn.Module
    value: nn.Module
    reward: nn.Module


def models(family: str = "llama") -> Models:
    policy = tiny.FAMILIES[family]()
    return Models(policy, tiny.scalar_model(policy, seed=1), tiny.scalar_model(policy, seed=2))


def rows(count: int = ROWS) -> Dataset:
    """Prompts of one to four tokens; the first token tells them apart."""
    return Dataset.from_dict({"input_ids": [[FIRST_WORD + i, *range(10, 10 + i % 4)] for i in range(count)]})


def left_padding_tokenizer(**changes: Any):
    tokenizer = tiny.tokenizer(**changes)
    tokenizer.padding_side = "left"
    return tokenizer


def arguments(start: Models, **changes: Any) -> dict[str, Any]:
    policy, value, reward = copy.deepcopy(start)
    return {
        "processing_class": left_padding_tokenizer(),
        "model": policy,
        "ref_model": None,
        "reward_model": reward,
        "value_model": value,
        "train_dataset": rows(),
    } | changes


def stock_trainer(folder: Any, start: Models, settings: dict[str, Any] | None = None, **changes: Any):
    args = ppo_config.PPOConfig(output_dir=str(folder / "stock"), **NEUTRAL | (settings or {}))
    return ppo_trainer.PPOTrainer(args=args, **arguments(start, **changes))


def our_trainer(folder: Any, start: Models, settings: dict[str, Any] | None = None, **changes: Any) -> ScriptedTrainer:
    args = TrustKLPPOConfig(output_dir=str(folder / "ours"), **NEUTRAL | (settings or {}))
    return ScriptedTrainer(args=args, **arguments(start, **changes))


def fill_adapter(model: nn.Module, seed: int = 5) -> None:
    """Set random weights in an adapter: PEFT starts with B = 0, where half of the gradient is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


# -- runs --------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Trained weights before and after a run, by name, and the logs, an entry for each update."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    logs: list[dict[str, Any]]

    def moved(self) -> float:
        return difference(self.before, self.after)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference of two sets of weights with the same names."""
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def weights(trainer: Any) -> dict[str, Tensor]:
    """The trained weights of policy and value, under the same names for both trainers."""
    model = trainer.model
    parts = [("policy", model.policy), ("value", model.value_model)]
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, module in parts
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def run(trainer: Any) -> Run:
    before = weights(trainer)
    trainer.train()
    return Run(before, weights(trainer), [entry for entry in trainer.state.log_history if "objective/kl" in entry])
