"""The steps of TRL's examples/scripts/ppo/ppo.py and ppo_tldr.py, with this package's configuration and trainer.

Both scripts read their command line with HfArgumentParser, load the policy, reference, reward and value models, add a pad
token, tokenize the prompts themselves, train, save the model and show completions. ppo.py splits its data by itself;
ppo_tldr.py has two splits, leaves out long prompts, and leaves a column of lengths in the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)
from trl import ModelConfig, ScriptArguments, get_peft_config

from tests import tiny
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = (
    "--learning_rate 3e-3 --per_device_train_batch_size 4 --missing_eos_penalty 1.0 --response_length 6 --total_episodes 24 "
    "--sft_model_path {place}/policy --model_name_or_path {place}/policy --reward_model_path {place}/reward "
    "--dataset_name {place}/data --output_dir {place}/run --use_cpu --bf16 False --report_to none"
)
COMMANDS = {
    "ppo": "--dataset_train_split train --gradient_accumulation_steps 1",
    "ppo_tldr": (
        "--dataset_test_split validation --gradient_accumulation_steps 2 --stop_token eos --eval_strategy steps --eval_steps 1"
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The models, and a dataset with two splits; the last prompt of each is longer than the others."""
    policy = tiny.llama(pad_token_id=None)
    for name, model in (("policy", policy), ("reward", tiny.scalar_model(policy, seed=1))):
        model.save_pretrained(tmp_path / name)
    tiny.tokenizer(pad=False).save_pretrained(tmp_path / "policy")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 28), ("validation", 6)):
        prompts = [f"w{i % 9} w{i % 7} w{i % 5}" for i in range(count)] + ["w1 " * 30]
        lines = [json.dumps({"prompt": prompt, "completion": "w1"}) for prompt in prompts]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def tokenized(rows: Dataset, tokenizer: Any, script: str) -> Dataset:
    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"], padding=False)["input_ids"]
        return {"input_ids": ids, "lengths": len(ids)} if script == "ppo_tldr" else {"input_ids": ids}

    made = rows.map(tokenize, remove_columns=rows.column_names)
    return made.filter(lambda row: row["lengths"] <= 10) if script == "ppo_tldr" else made


@pytest.mark.parametrize("with_peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_of_trl_runs_from_its_command_line(script: str, with_peft: bool, place: Path, capsys) -> None:
    words = f"{COMMON} {COMMANDS[script]} {'--use_peft --lora_r 4' if with_peft else ''}".format(place=place).split()
    parser = HfArgumentParser((ScriptArguments, TrustKLPPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses(words)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1) for _ in "vr"
    )
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
    peft_config = get_peft_config(model_args)
    reference = None if peft_config else AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)

    data = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train, held_out = data[script_args.dataset_train_split], data["validation"]
    if script == "ppo":
        train, held_out = train.select(range(24)), train.select(range(24, 28))
    trainer = TrustKLPPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=tokenized(train, tokenizer, script),
        eval_dataset=tokenized(held_out, tokenizer, script),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    capsys.readouterr()
    trainer.generate_completions()

    assert "score" in capsys.readouterr().out
    updates = 24 // (4 if script == "ppo" else 8)
    assert len(load_records(place / "run")) == updates == trainer.state.global_step
    weights = "adapter_model.safetensors" if with_peft else "model.safetensors"
    assert (place / "run" / weights).is_file()
    evaluated = [each for each in trainer.state.log_history if "eval_score" in each]
    assert len(evaluated) == (updates if script == "ppo_tldr" else 0)
