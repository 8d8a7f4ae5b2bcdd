"""PPOConfig and PPOTrainer for the versions of TRL that have none (1.13 and newer), on TRL's base classes.

The fields are those of `trl.experimental.ppo.PPOConfig` in TRL 1.12, with its defaults; a test compares the two. The
trainer has the attributes that TRL's hub and model card code reads; its subclass has the constructor and the loop.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from ..options import option


@dataclass
class PPOConfig(_BaseConfig):
    """The configuration of TRL 1.12's PPO trainer."""

    learning_rate: float = option(3e-6, "The initial learning rate of the optimizer.")
    dataset_num_proc: int | None = option(None, "Processes that tokenize the dataset.")
    num_mini_batches: int = option(1, "Mini-batches a batch is split into; each makes one optimizer step an epoch.")
    total_episodes: int | None = option(None, "Responses to sample in the run; None: num_train_epochs of the dataset.")
    local_rollout_forward_batch_size: int = option(64, "Prompts generated from at a time, per process.")
    num_sample_generations: int = option(10, "How often in the run to print completions of the evaluation set.")
    response_length: int = option(53, "Largest number of new tokens in a response.")
    stop_token: Literal["eos"] | None = option(None, "The stop token. Excludes `stop_token_id`.")
    stop_token_id: int | None = option(None, "Id of the stop token. Excludes `stop_token`.")
    temperature: float = option(0.7, "Sampling temperature; the policy is the tempered one everywhere.")
    missing_eos_penalty: float | None = option(
        None, "Subtracted from the score of a response that no stop token or stop string ended."
    )
    sft_model_path: str = option("EleutherAI/pythia-160m", "Path of the policy, for scripts.")
    world_size: int | None = option(None, "Number of processes (computed).")
    num_total_batches: int | None = option(None, "Number of updates in the run (computed).")
    micro_batch_size: int | None = option(None, "Micro-batch over all processes (computed).")
    local_batch_size: int | None = option(None, "Batch of one process (computed).")
    batch_size: int | None = option(None, "Batch over all processes (computed).")
    local_mini_batch_size: int | None = option(None, "Mini-batch of one process (computed).")
    mini_batch_size: int | None = option(None, "Mini-batch over all processes (computed).")
    push_to_hub: bool = option(False, "Whether to push the model to the Hub.")
    reward_model_path: str = option("EleutherAI/pythia-160m", "Path of the reward model, for scripts.")
    model_adapter_name: str | None = option(None, "Name of the adapter to train, with several adapters.")
    ref_adapter_name: str | None = option(None, "Name of the adapter that is the reference, with several adapters.")
    num_ppo_epochs: int = option(4, "Passes over each batch.")
    whiten_rewards: bool = option(False, "Whether to whiten the rewards.")
    kl_coef: float = option(0.05, "Coefficient of the KL penalty.")
    kl_estimator: Literal["k1", "k3"] = option("k1", "Estimator of the KL divergence from the reference.")
    cliprange: float = option(0.2, "Clip range of the policy's probability ratio.")
    vf_coef: float = option(0.1, "Coefficient of the value loss.")
    cliprange_value: float = option(0.2, "Clip range of the value, around its value at rollout.")
    gamma: float = option(1.0, "Discount factor.")
    lam: float = option(0.95, "Lambda of generalised advantage estimation.")
    ds3_gather_for_generation: bool = option(True, "With DeepSpeed ZeRO-3: gather the policy's weights to generate.")


class PPOTrainer(_BaseTrainer):
    """Names and paper of TRL 1.12's PPO trainer, for model cards and the hub."""

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": textwrap.dedent("""\
            @article{mziegler2019fine-tuning,
                title        = {{Fine-Tuning Language Models from Human Preferences}},
                author       = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and Dario Amodei and Paul F. Christiano and Geoffrey Irving},
                year         = 2019,
                eprint       = {arXiv:1909.08593}
            }"""),  # noqa: E501
    }
