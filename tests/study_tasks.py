"""The tasks of `benchmarks/study.py` with a tiny model, for tests/end_to_end/test_study.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.study_task import Measured
from tests import tiny
from trl_trustkl import TrustKLGRPOConfig, TrustKLGRPOTrainer, TrustKLPPOTrainer

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
GROUPS = {
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def few_words(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """The share of distinct words."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text.split())) / (len(text.split()) or 1) for text in texts]


def measured(trainer: Any) -> Measured:
    return Measured(trainer, PROMPTS, few_words, tokens=6)


def grpo(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Measured:
    return measured(
        TrustKLGRPOTrainer(
            model=tiny.llama(), args=TrustKLGRPOConfig(output_dir, **GROUPS | changes), reward_funcs=few_words,
            train_dataset=tiny.Dataset.from_dict({"prompt": PROMPTS}), processing_class=tiny.tokenizer(),
            peft_config=tiny.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), callbacks=list(callbacks),
        )
    )  # fmt: skip


def ppo(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Measured:
    return measured(
        tiny.trainer(
            output_dir, kind=TrustKLPPOTrainer, changes=changes, reward_funcs=few_words, callbacks=list(callbacks)
        )
    )
