"""Builders of TRL's GRPO, RLOO and PPO trainers on tiny models, for the tests of the callbacks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import tiny
from trl_trustkl import AdaptiveKLCallback
from trl_trustkl.controllers import DualKL

TARGET = 0.02
DUAL = DualKL(coef=0.1, target=TARGET, lr=0.3)


class Spied:
    """Keeps `beta` and the KL of every micro-step (GRPO) or generation (RLOO) of training, by optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def keep(self) -> None:
        if self.model.training and self.beta:
            self.seen[self.state.global_step].append((self.beta, self._metrics["train"]["kl"][-1]))


class SpiedGRPO(Spied, GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        self.keep()
        return loss


class SpiedRLOO(Spied, RLOOTrainer):
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        outputs = super()._generate_and_score_completions(inputs)
        self.keep()
        return outputs


OTHER_ARGUMENTS = (
    "callbacks",
    "reward_processing_classes",
    "tools",
    "rollout_func",
    "environment_factory",
    "model_init",
)

TRAINERS = {"grpo": (SpiedGRPO, GRPOConfig), "rloo": (SpiedRLOO, RLOOConfig)}
KINDS = pytest.mark.parametrize("kind", TRAINERS)


def trainer_of(kind: str, folder: Any, **changes: Any) -> Any:
    """TRL's trainer of this kind, "grpo" or "rloo"; `changes` go to its configuration, and arguments to the trainer."""
    arguments = {
        "model": tiny.llama(num_hidden_layers=1),
        "reward_funcs": tiny.good_words,
        "train_dataset": tiny.prompts(),
        "eval_dataset": tiny.prompts(4),
        "processing_class": tiny.tokenizer(),
        "peft_config": tiny.lora(),
    }
    arguments |= {name: changes.pop(name) for name in (*arguments, *OTHER_ARGUMENTS) if name in changes}
    settings = {
        "output_dir": str(folder),
        **tiny.GROUPS,
        "per_device_eval_batch_size": 4,
        "max_steps": 5,
        "beta": 0.1,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
    }
    trainer, config = TRAINERS[kind]
    return trainer(args=config(**settings | changes), **arguments)


def controlled(kind: str, folder: Any, controller: Any = DUAL, **changes: Any) -> Any:
    """The same with an `AdaptiveKLCallback`."""
    trainer = trainer_of(kind, folder, **changes)
    trainer.add_callback(AdaptiveKLCallback(controller, trainer=trainer))
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    """The values logged under `key`."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trl_ppo(folder: Any, **changes: Any) -> Any:
    """The PPO trainer of TRL 1.12, with 4 updates of 10 responses; skips the test on a TRL without it."""
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "total_episodes": 40,
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "stop_token": "eos",
        "temperature": 0.7,
        "kl_coef": 0.2,
        "vf_coef": 0.5,
        "optim": "sgd",
        "learning_rate": 0.02,
        **tiny.QUIET,
        "num_sample_generations": 0,
    }
    policy, tokenizer = tiny.llama(), tiny.tokenizer()
    tokenizer.padding_side = "left"
    prompts = [[7 + i, *range(10, 10 + i % 4)] for i in range(10)]
    return ppo.PPOTrainer(
        args=ppo.PPOConfig(**settings | changes),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=tiny.scalar_model(policy, seed=2),
        value_model=tiny.scalar_model(policy, seed=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
