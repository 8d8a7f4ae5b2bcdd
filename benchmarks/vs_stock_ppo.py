"""Compare this trainer with TRL 1.12's PPO trainer: seconds per update by phase, tokens per second, peak memory.

Each run is a separate process, and the kinds alternate. *stock* is TRL's trainer. *equal* trains the same models: a 4-bit
policy with LoRA, a separate full-precision value model, a full-precision reward model. *recommended* uses this package's
defaults: a value head on the policy's backbone, and a reward function. Both run under bf16 autocast if the hardware has
bf16 instructions, as TRL's configurations do by default; *equal-float32* does not. The stock trainer has to run in float32:
with `bf16=True` it cannot sample from a 4-bit policy (its norms pass float32 to an output head that it has cast to bf16).
Measuring and recording are enabled in all kinds of this package. Prompts, episodes, epochs and mini-batches are the same.

    make test-trl112 ARGS=--collect-only                 # creates the environment with TRL 1.12, once
    python benchmarks/vs_stock_ppo.py                    # writes benchmarks/data/vs_stock_ppo.csv and .md

The model is SmolLM2-135M-Instruct. `--model random` needs no weights; with `--device cuda` it has 0.6 B parameters in the
shape of Qwen3-0.6B.

The minimal amount of computation on SmolLM2 (135 M parameters, 106 M of them in 4 bits): an update of 16 responses of T =
32 tokens after P ≈ 12 tokens of prompt needs one pass over 16·(P + T) tokens for generation, one each for π_old and π_ref,
two forward and backward passes for two epochs, and one for the measurement. With 2·N flops per token forward and 4·N
backward to the activations and adapters, this is about (4 + 2·3)·2·N·16·(P + T) = 3 Tflop. The stock trainer adds a value
model and a reward model of the same size, and the weight gradients of the value model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    DATA,
    PHASES,
    ROOT,
    byte_tokenizer,
    distinct_share,
    lora,
    machine,
    most_bytes,
    phase_clock,
    training_settings,
    write_csv,
)
from common import random_model as random_qwen3

KINDS = ("stock", "equal", "equal-float32", "recommended")
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


# -- one run, in a separate process -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the seconds of each update's phases, and the peak memory above a bare interpreter with torch."""
    import torch

    device = options.device
    bare = most_bytes(device)
    seconds: list[dict[str, float]] = []
    build = stock_trainer if options.run == "stock" else our_trainer
    build(options, seconds).train()
    peak = most_bytes(device)
    import trl

    return {"trl": trl.__version__, "torch": torch.__version__, "seconds": seconds, "mib": (peak - bare) / 2**20}


def load_tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def policy(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    device_map = {"": 0} if options.device == "cuda" else None
    return AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four_bit, dtype=dtype, device_map=device_map
    )


def scalar_model(options: argparse.Namespace, seed: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = load_tokenizer(options).pad_token_id
    return model


def prompt_dataset(options: argparse.Namespace) -> Any:
    """Token ids in a fixed order, so that every kind has the same prompts."""
    from datasets import Dataset

    tokenizer = load_tokenizer(options)
    texts = json.loads(Path(options.prompts).read_text(encoding="utf-8"))
    return Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})


def our_trainer(options: argparse.Namespace, seconds: list[dict[str, float]]) -> Any:
    from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer

    equal = options.run != "recommended"

    return TrustKLPPOTrainer(
        args=TrustKLPPOConfig(**training_settings(options)),
        model=policy(options),
        processing_class=load_tokenizer(options),
        reward_funcs=None if equal else distinct_share,
        reward_model=scalar_model(options, 1) if equal else None,
        value_model=scalar_model(options, 2) if equal else None,
        train_dataset=prompt_dataset(options),
        peft_config=lora(),
        callbacks=[phase_clock(seconds)],
    )


def stock_trainer(options: argparse.Namespace, seconds: list[dict[str, float]]) -> Any:
    """TRL 1.12's trainer, with timers in the functions where its phases begin and end."""
    import torch
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    marks: dict[str, float] = {}
    generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        marks["begin"] = time.perf_counter()
        result = generate(*args, **kwargs)
        marks["generated"] = time.perf_counter()
        return result

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            marks.setdefault("scored", time.perf_counter())
        return forward(*args, **kwargs)

    class Phases(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            begin, generated, scored = marks["begin"], marks["generated"], marks.pop("scored")
            phases = (generated - begin, scored - generated, now - scored, 0.0, now - begin)
            seconds.append(dict(zip(PHASES, phases, strict=True)))

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    return PPOTrainer(
        args=PPOConfig(**training_settings(options)),
        processing_class=load_tokenizer(options),
        model=policy(options),
        ref_model=None,
        reward_model=scalar_model(options, 1),
        value_model=scalar_model(options, 2),
        train_dataset=prompt_dataset(options),
        eval_dataset=prompt_dataset(options),
        peft_config=lora(),
        callbacks=[Phases()],
    )


# -- all runs, alternating -----------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each run: medians over its updates except the first, which is a warm-up."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, prompts = prepare(options, Path(scratch))
        for repeat in range(options.repeats):
            for kind in options.kinds:
                result = in_a_process(options, kind, model, prompts, Path(scratch) / f"{kind}-{repeat}")
                updates = result["seconds"][1:]
                median = {phase: statistics.median(update[phase] for update in updates) for phase in PHASES}
                tokens = options.batch_size * options.response_length
                row = {"kind": kind, "repeat": repeat, "trl": result["trl"], "torch": result["torch"], **median}
                row |= {"tokens_per_second": tokens / median["total"], "mib": result["mib"]}
                rows.append(row)
                print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    return rows


def in_a_process(options: argparse.Namespace, kind: str, model: str, prompts: Path, folder: Path) -> dict[str, Any]:
    python = options.stock_python if kind == "stock" else sys.executable
    command = [
        python,
        __file__,
        "--run",
        kind,
        "--model",
        model,
        "--prompts",
        str(prompts),
        "--output-dir",
        str(folder),
    ]
    for name in ("device", "updates", "epochs", "batch_size", "response_length"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--bf16"] if options.bf16 and kind in ("equal", "recommended") else []
    command += ["--gradient-checkpointing"] if options.gradient_checkpointing else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parent)
    if done.returncode:
        sys.exit(f"the {kind} run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[str, Path]:
    """The folder of the model and the file of the prompts, which are the same for every run."""
    from trl_trustkl.demo.prompts import TRAIN_PROMPTS

    prompts = scratch / "prompts.json"
    prompts.write_text(json.dumps(list(TRAIN_PROMPTS)), encoding="utf-8")
    if options.model == "smollm2":
        from trl_trustkl.demo.smollm2 import smollm2_path

        return smollm2_path(), prompts
    if options.model != "random":
        return options.model, prompts
    return random_model(scratch / "model", tiny=options.device == "cpu"), prompts


def random_model(folder: Path, *, tiny: bool) -> str:
    """A folder with a tokenizer and random weights in the shape of Qwen3-0.6B, or much smaller."""
    import torch

    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 16} if tiny else {}
    random_qwen3(**QWEN3_06B | small).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The table of medians, and the ratios with their ranges over the repeats."""
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in options.kinds}
    lines = [
        "| | TRL | generate (s) | score (s) | optimise (s) | measure (s) | update (s) | tokens/s | peak memory (MiB) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, some in by_kind.items():
        middle = {key: statistics.median(row[key] for row in some) for key in (*PHASES, "tokens_per_second", "mib")}
        cells = [f"{middle[phase]:.2f}" for phase in PHASES] + [
            f"{middle['tokens_per_second']:.0f}",
            f"{middle['mib']:,.0f}",
        ]
        lines.append(f"| {kind} | {some[0]['trl']} | " + " | ".join(cells) + " |")
    lines.append("")
    for kind in options.kinds:
        if kind == "stock" or "stock" not in by_kind:
            continue
        pairs = list(zip(by_kind["stock"], by_kind[kind], strict=True))
        for what, key in (("faster", "total"), ("less memory", "mib")):
            ratios = sorted(stock[key] / ours[key] for stock, ours in pairs)
            spread = (
                f" ({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} pairs of runs)" if len(ratios) > 1 else ""
            )
            lines.append(f"- *{kind}*: {statistics.median(ratios):.2f} × {what} than the stock trainer{spread}")
    shape = f"{options.batch_size} responses × {options.response_length} tokens, {options.epochs} PPO epochs"
    precision = "float32" + (", *equal* and *recommended* under bf16 autocast" if options.bf16 else "")
    model = {"smollm2": "SmolLM2-135M", "random": "random weights in the shape of Qwen3"}.get(
        options.model, options.model
    )
    lines += ["", f"{model}, {shape}, {precision}; {machine(options.device)}; "]
    lines[-1] += (
        f"medians of {options.repeats} runs of {options.updates} updates, without the first update of each run."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stock-python", default=str(ROOT / ".venv-trl112/bin/python"), help="with TRL 1.12 (%(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="responses per update (%(default)s)")
    parser.add_argument("--response-length", type=int, help="tokens per response (32; 512 on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="for equal and recommended (default: if the hardware has it)",
    )
    parser.add_argument(
        "--avx2",
        action="store_true",
        help="as on a CPU without larger vectors: restricts torch, oneDNN and MKL to AVX2",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, random, or the name or folder of a model (%(default)s)"
    )
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    parser.add_argument("--output-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.response_length = options.response_length or (512 if options.device == "cuda" else 32)
    if options.run:
        options.bf16 = bool(options.bf16)  # None would select TRL's default, which is True
        print(json.dumps(run(options)))
        return
    if options.avx2:
        # torch and MKL read these at their start, so that this process has to begin again.
        limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        if any(os.environ.get(name) != value for name, value in limits.items()):
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **limits})
    from trl_trustkl.policy.cpu import has_bf16_instructions

    if options.bf16 is None:
        options.bf16 = options.device == "cuda" or has_bf16_instructions()
    rows = measure(options)
    name = "vs_stock_ppo" + ("_cuda" if options.device == "cuda" else "_avx2" if options.avx2 else "")
    write_csv(DATA / f"{name}.csv", rows)
    text = summary(rows, options)
    (DATA / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
