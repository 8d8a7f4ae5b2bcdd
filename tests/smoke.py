"""What an installed package must do without its extras, for an environment that has nothing else: `make smoke`.

Imports the public names, asks each command for its help, and trains a tiny model with each trainer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import trl_trustkl

if Path(trl_trustkl.__file__).is_relative_to(Path(__file__).resolve().parents[1] / "trl_trustkl"):
    sys.exit("This is the package of the clone. Run: python -P tests/smoke.py")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_trustkl import (
    BoundReportCallback,
    TrustKLGRPOConfig,
    TrustKLGRPOTrainer,
    TrustKLPPOConfig,
    TrustKLPPOTrainer,
    TrustKLRLOOConfig,
    TrustKLRLOOTrainer,
    load_records,
)

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]
LIMIT = 0.02


def trustkl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("trustkl"), *arguments], capture_output=True, text=True)


def check_commands() -> None:
    assert trustkl("--version").stdout.strip() == trl_trustkl.__version__ == version("trl-trustkl")
    for command in ("demo", "train", "report", "compare"):
        assert "usage: trustkl" in trustkl(command, "--help").stdout, command
    for command in ("demo", "compare"):
        done = trustkl(command, "--updates", "1")
        assert done.returncode == 1 and "Fix: pip install" in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


def short(completions: list[str], **columns: object) -> list[float]:
    return [-len(text) / 100 for text in completions]


def check_training(folder: Path) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="w0")
    place, shape = (
        str(folder / "model"),
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **shape)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    prompts = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 32})
    common = {
        "max_steps": 2,
        "learning_rate": 0.05,
        "trust_max_kl": LIMIT,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    grpo = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 8}
    for name, trainer, config, given in (
        ("ppo", TrustKLPPOTrainer, TrustKLPPOConfig, {"response_length": 8, "per_device_train_batch_size": 8}),
        ("grpo", TrustKLGRPOTrainer, TrustKLGRPOConfig, grpo),
        ("rloo", TrustKLRLOOTrainer, TrustKLRLOOConfig, grpo),
    ):
        trainer(
            model=place, args=config(str(folder / name), **common, **given), reward_funcs=short, train_dataset=prompts,
            callbacks=[BoundReportCallback()],
        ).train()  # fmt: skip
        kls = [record["trust"]["kl"] for record in load_records(folder / name)]
        assert len(kls) == 2 and 0 < max(kls) <= LIMIT, (name, kls)


if __name__ == "__main__":
    check_commands()
    with tempfile.TemporaryDirectory() as place:
        check_training(Path(place))
    print(f"trl-trustkl {version('trl-trustkl')} works beside trl {version('trl')} on Python {sys.version.split()[0]}")
