"""The task of the demo and of the comparisons: SmolLM2-135M-Instruct, QLoRA, replies of positive sentiment."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any


def sentiment_trainer(
    output_dir: str, *, callbacks: Sequence[Any] = (), reward_funcs: Any = None, **changes: Any
) -> Any:
    """A trainer of a 4-bit SmolLM2 with LoRA and VADER's compound score, or other rewards; `changes` are configuration
    fields."""
    quieten()
    import torch

    from .. import TrustKLPPOTrainer
    from .smollm2 import load_smollm2

    config = sentiment_config(output_dir, **changes)
    model, tokenizer = load_smollm2(quantize=True, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    return TrustKLPPOTrainer(
        args=config, model=model, processing_class=tokenizer, callbacks=list(callbacks), **_task(reward_funcs)
    )


def sentiment_grpo_trainer(
    output_dir: str, *, callbacks: Sequence[Any] = (), reward_funcs: Any = None, **changes: Any
) -> Any:
    """TRL's GRPO trainer with a trust region on the same task, with LoRA on a model that is not quantized; `changes` are
    configuration fields."""
    quieten()
    import torch
    from transformers.trainer_callback import PrinterCallback

    from .. import TrustKLGRPOTrainer
    from .smollm2 import load_smollm2

    config = sentiment_grpo_config(output_dir, **changes)
    model, tokenizer = load_smollm2(quantize=False, dtype=torch.float32)
    trainer = TrustKLGRPOTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=list(callbacks), **_task(reward_funcs)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sentiment_grpo_config(output_dir: str, **changes: Any) -> Any:
    """That of the GRPO task: an update has 16 completions of 24 tokens, 8 for each prompt."""
    from .. import TrustKLGRPOConfig

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_generations": 8,
        "num_generations_eval": 1,
        "max_completion_length": 24,
        "learning_rate": 1e-3,
        "logging_strategy": "steps",
        "logging_steps": 1,
        **_quiet_run(),
    }
    return TrustKLGRPOConfig(output_dir, **settings | changes)


def _task(reward_funcs: Any = None) -> dict[str, Any]:
    """The prompts, the reward and the adapter, as arguments of a trainer."""
    from datasets import Dataset
    from peft import LoraConfig

    from .prompts import EVAL_PROMPTS, TRAIN_PROMPTS
    from .rewards import sentiment

    def as_chat(texts: Sequence[str]) -> Dataset:
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})

    return {
        "reward_funcs": sentiment if reward_funcs is None else reward_funcs,
        "train_dataset": as_chat(TRAIN_PROMPTS),
        "eval_dataset": as_chat(EVAL_PROMPTS),
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def _quiet_run() -> dict[str, Any]:
    """Fields of a run on this machine that saves no checkpoints and prints nothing."""
    import torch

    return {
        "lr_scheduler_type": "constant",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def sentiment_config(output_dir: str, **changes: Any) -> Any:
    """The task's configuration: an update has 16 responses of 24 tokens and 2 epochs × 2 mini-batches.

    `bf16` has its default: on where the hardware computes it fast.
    """
    from .. import TrustKLPPOConfig

    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 24,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "per_device_eval_batch_size": 16,
        "num_sample_generations": 0,
        "logging_strategy": "no",
        **_quiet_run(),
    }
    return TrustKLPPOConfig(**settings | changes)


def quieten() -> None:
    """Turn off the libraries' progress bars and warnings."""
    # Before any other import: bitsandbytes logs errors while it is imported, and transformers may import it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import torch
    import transformers

    # DeepSpeed, which accelerate imports, prints a warning if it has to find out that there is no GPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
