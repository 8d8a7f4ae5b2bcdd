"""A small training run for `trustkl train`: its options as a dict, as flags and as YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.processes import ROOT
from trl_trustkl.cli import main

REWARDS = """
def even(prompts, completions, **columns):
    return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]

def wanted(prompts, completions, wanted, **columns):
    return [float(word in text) for word, text in zip(wanted, completions)]

LIMIT = 3
"""


def settings(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The options of a run with the files of the fixture `place`."""
    run = {
        "model_name_or_path": str(place / "model"), "dataset_name": str(place / "prompts.jsonl"),
        "reward_funcs": [f"{place / 'my_rewards.py'}:even"], "output_dir": str(output), "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "response_length": 6, "temperature": 1.0, "learning_rate": 1e-3, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0,
        "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "report_to": "none",
        "kl_controller": "adaptive", "kl_target": 2.0, "kl_controller_kwargs": {"horizon": 100}, "trust_max_kl": 0.05,
    }  # fmt: skip
    return {**run, **changes}


def flags(run: dict[str, Any]) -> list[str]:
    """The same options as a command line."""
    words = []
    for name, value in run.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def write_yaml(path: Path, run: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(run))
    return str(path)


def timeless(folder: Path) -> list[str]:
    """The lines of bounds.jsonl as JSON, without the times."""
    rows = map(json.loads, (folder / "bounds.jsonl").read_text().splitlines())
    return [json.dumps({**row, "seconds": None}) for row in rows]


def run_main(*words: str) -> int:
    """The exit status of `trustkl train`, returned or raised."""
    try:
        return main(["train", *words])
    except SystemExit as ended:
        return ended.code


def start(*words: str, **environment: str) -> subprocess.Popen:
    """Start a module of Python in a separate process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
