"""The scripts of TRL's documentation and examples for GRPO and RLOO, written anew on a tiny model, with one line added.

Each script ends with `trainer.train()`, and runs with that line before it and without it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trl_trustkl import TrustRegionCallback

pytestmark = pytest.mark.filterwarnings("ignore")

LINE = "trainer.add_callback(TrustRegionCallback(trainer, max_kl=0.02))\n"
TRAIN = "trainer.train()\n"

QUICK_START = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

def reward_len(completions, **kwargs):
    return [-abs(20 - len(text)) for text in completions]

trainer = GRPOTrainer(
    model="policy",
    reward_funcs=reward_len,
    args=GRPOConfig(output_dir="run", **QUICK),
    train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
)
trainer.train()
"""

ADAPTER = """
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("json", data_files="prompts.jsonl", split="train").select(range(8))

def unique_characters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]

args = GRPOConfig(
    "run", **QUICK | {"gradient_checkpointing": True, "bf16": True, "learning_rate": 0.02, "logging_steps": 1},
    beta=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_generations=2,
)
trainer = GRPOTrainer(
    model="policy", args=args, reward_funcs=unique_characters, train_dataset=dataset,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
"""

TASKS = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

dataset = Dataset.from_list(
    [
        {"prompt": "w1 w2", "task": "even"},
        {"prompt": "w3", "task": "short"},
        {"prompt": "w4 w5 w6", "task": "even"},
        {"prompt": "w7 w8", "task": "short"},
    ]
)

def even(prompts, completions, task, **kwargs):
    return [float("2" in text) if each == "even" else None for text, each in zip(completions, task)]

def short(prompts, completions, task, **kwargs):
    return [1.0 / (1 + len(text)) if each == "short" else None for text, each in zip(completions, task)]

trainer = GRPOTrainer(
    model="policy", reward_funcs=[even, short], train_dataset=dataset,
    args=GRPOConfig("run", **QUICK | {"learning_rate": 0.02}),
)
trainer.train()
"""

WAITING = """
import asyncio
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

async def remote(prompts, completions, completion_ids, trainer_state, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(ids) + trainer_state.global_step) for ids in completion_ids]

def local(completions, wanted, log_metric, log_extra, **kwargs):
    found = [float(word in text) for text, word in zip(completions, wanted)]
    log_extra("wanted", list(wanted))
    log_metric("accuracy", sum(found) / len(found))
    return found

trainer = GRPOTrainer(
    "policy", [remote, local], args=GRPOConfig("run", reward_weights=[0.1, 1.0], **QUICK),
    train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
)
trainer.train()
"""

PARSED = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import think_format_reward

parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
dataset = load_dataset(script_args.dataset_name, data_files="prompts.jsonl", split="train")

def make_conversation(example):
    return {"prompt": [{"role": "system", "content": "w9"}, {"role": "user", "content": example["prompt"]}]}

dataset = dataset.map(make_conversation)

def accuracy(completions, wanted, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [float(word in text) + len(text) / 100 for text, word in zip(contents, wanted)]

trainer = GRPOTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    reward_funcs=[think_format_reward, accuracy],
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
"""
ARGUMENTS = (
    "--model_name_or_path policy --dataset_name json --output_dir run --learning_rate 0.02 --max_completion_length 8 "
    "--use_peft --lora_target_modules q_proj v_proj --per_device_train_batch_size 4 --num_generations 4 --max_steps 6 "
    "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 --loss_type grpo "
    "--gradient_accumulation_steps 2 --steps_per_generation 4 --save_strategy no --report_to none --bf16 false "
    "--use_cpu true --log_completions --logging_steps 1 --disable_tqdm true --dataloader_pin_memory false"
)

LEAVE_ONE_OUT = """
from datasets import load_dataset
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

dataset = load_dataset("json", data_files="prompts.jsonl", split="train").train_test_split(4, seed=0)

def reward(completions, **kwargs):
    return [float(text.count("w1")) for text in completions]

args = RLOOConfig("run", **QUICK | {"learning_rate": 0.02}, eval_strategy="steps", eval_steps=1, num_iterations=2)
trainer = RLOOTrainer(
    "policy", reward, args=args, train_dataset=dataset["train"], eval_dataset=dataset["test"],
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
"""

REWARD_MODEL = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

trainer = GRPOTrainer(
    model="policy", reward_funcs="reward_model", args=GRPOConfig("run", **QUICK | {"learning_rate": 2e-3}),
    train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
)
trainer.train()
"""

SCRIPTS = {
    "quick start": QUICK_START,
    "adapter": ADAPTER,
    "tasks": TASKS,
    "asynchronous rewards": WAITING,
    "command line": PARSED,
    "RLOO": LEAVE_ONE_OUT,
    "reward model": REWARD_MODEL,
}
BEYOND = ("adapter", "tasks", "command line", "RLOO", "reward model")
"""Those whose learning rate proposes steps beyond the limit."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder of a script: a policy, a reward model and prompts."""
    tiny.llama().save_pretrained(tmp_path / "policy")
    tiny.scalar_model(tiny.llama()).save_pretrained(tmp_path / "reward_model")
    for name in ("policy", "reward_model"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.prompts().to_json(tmp_path / "prompts.jsonl")
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGUMENTS.split()])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(script: str) -> Any:
    """The trainer of a script, after it."""
    quick = {"max_completion_length": 8, "max_steps": 4, **tiny.QUIET}
    space: dict[str, Any] = {"__name__": "__main__", "QUICK": quick, "TrustRegionCallback": TrustRegionCallback}
    exec(compile(script, "train.py", "exec"), space)
    return space["trainer"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_limits_each_update_of_a_script(name, folder):
    assert SCRIPTS[name].count(TRAIN) == 1
    logs = ran(SCRIPTS[name].replace(TRAIN, LINE + TRAIN)).state.log_history
    found = [log["trust/kl"] for log in logs if "trust/kl" in log]
    proposed = [log["trust/kl_proposed"] for log in logs if "trust/kl_proposed" in log]
    assert len(found) >= 2 and all(0 < kl <= 0.02 for kl in found)
    assert (max(proposed) > 0.02) == (name in BEYOND)
    free = ran(SCRIPTS[name]).state.log_history
    assert not any("trust/kl" in log for log in free)
    assert losses(logs)[0] == pytest.approx(losses(free)[0], abs=1e-6)


def losses(logs: list[dict[str, float]]) -> list[float]:
    return [log["loss"] for log in logs if "loss" in log]
