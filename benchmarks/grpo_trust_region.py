"""The trust region on TRL's GRPO trainer with SmolLM2 and LoRA: how far updates go with and without it, and what it costs.

    python benchmarks/grpo_trust_region.py bound    # 40 updates with the limit and 40 without; about 10 minutes on two cores
    python benchmarks/grpo_trust_region.py cost     # the parts of the callback as shares of an update's time; about 30 minutes
    python benchmarks/grpo_trust_region.py precision    # the limit under bf16 autocast, measured again in float32; 5 minutes
    python benchmarks/grpo_trust_region.py profile  # where the time of measuring goes, by operator

`bound` trains with TRL's defaults (one optimizer step for each generation batch), where the ratio is always 1 and no clip acts.

`cost` times the parts inside one run, because the speed of a machine drifts between runs. The shares are relative to the
time of an update without the callback:

    measure     the batch's pass under the new policy, and its exact KL(π_old‖π)
    anchor      the pass of the reference, and the exact KL(π_old‖π_ref)
    try         one scale of backtracking: setting the parameters, and measuring again
    rest        the snapshot, reading TRL's metrics, the records and the logs

Writes benchmarks/data/grpo_trust_region_bound.csv, grpo_trust_region_cost.csv and grpo_trust_region_precision.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import DATA, Clock, lora, machine, write_csv

SHAPES = ((8, 24), (16, 64), (8, 96), (32, 24))
"""(responses, tokens) of an update. The second pair shows how the cost scales with the length and the batch."""


def trainer_of(folder: str, *, batch: int, tokens: int, steps: int, learning_rate: float, bf16: bool) -> Any:
    """TRL's GRPO trainer on SmolLM2 with LoRA, with a reward for positive sentiment and TRL's defaults otherwise."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trl_trustkl.demo.prompts import TRAIN_PROMPTS
    from trl_trustkl.demo.rewards import sentiment
    from trl_trustkl.demo.smollm2 import load_smollm2
    from trl_trustkl.demo.task import quieten

    quieten()
    model, tokenizer = load_smollm2(quantize=False, dtype=torch.float32)
    gpu = torch.cuda.is_available()
    args = GRPOConfig(
        folder, per_device_train_batch_size=batch, num_generations=8, max_completion_length=tokens, max_steps=steps,
        learning_rate=learning_rate, lr_scheduler_type="constant", bf16=bf16, use_cpu=not gpu,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    prompts = [[{"role": "user", "content": text}] for text in TRAIN_PROMPTS]
    return GRPOTrainer(
        model=model, reward_funcs=sentiment, args=args, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip


def records_of(trainer: Any, *callbacks: Any, **options: Any) -> list[dict[str, Any]]:
    """Train with a TrustRegionCallback with these options; returns the records."""
    from trl_trustkl import BoundReportCallback, TrustRegionCallback, load_records

    trainer.add_callback(BoundReportCallback(report=False))
    trainer.add_callback(TrustRegionCallback(trainer, **options))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return load_records(trainer.args.output_dir)


# -- bound -------------------------------------------------------------------------------------------------------------


def bound(options: argparse.Namespace) -> None:
    rows = []
    for limit in (options.limit, None):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(
                folder, batch=16, tokens=16, steps=options.steps, learning_rate=options.learning_rate, bf16=options.bf16
            )
            found = records_of(trainer, max_kl=limit)
        kls = [record["trust"]["kl"] for record in found]
        print(
            f"limit {limit}: largest KL(π_old‖π) {max(kls):.4g} nats per token in {len(kls)} updates, "
            f"{sum(kl > options.limit for kl in kls)} above {options.limit:g}; proposed at most "
            f"{max(record['trust']['kl_proposed'] for record in found):.4g}; "
            f"{sum((record['trust']['scale'] or 1) < 1 for record in found)} backtracked; clip gated at most "
            f"{max(record['trust']['gated'] for record in found):g}"
        )
        rows += [
            {"limit": limit, "update": record["update"], "score": record["score"], "entropy": record["entropy"]}
            | {name: record["trust"][name] for name in ("kl", "kl_proposed", "scale", "tries", "gated")}
            | {"kl_to_reference": record["anchor"]["kl_exact"], "machine": machine("cpu"), "bf16": options.bf16}
            for record in found
        ]
    write_csv(options.output / "grpo_trust_region_bound.csv", rows)


# -- cost --------------------------------------------------------------------------------------------------------------


HOOKS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_log", "before_save")


def cost(options: argparse.Namespace) -> None:
    from trl_trustkl.callbacks.enforcer import Enforcer
    from trl_trustkl.callbacks.trust_region import TrustRegionCallback
    from trl_trustkl.callbacks.window import Window

    clock = Clock()
    clock.wrap(Window, "measure", "measure")
    clock.wrap(Window, "measure_anchor", "anchor")
    clock.wrap(Enforcer, "enforce", "enforce")
    for hook in HOOKS:
        clock.wrap(TrustRegionCallback, hook, "callback")
    rows = []
    for bf16 in options.precisions:
        for batch, tokens in SHAPES[: options.shapes]:
            for _ in range(options.runs):
                rows += timed_run(clock, options, batch, tokens, bf16)
    write_csv(options.output / "grpo_trust_region_cost.csv", rows)
    print(table(rows))


def timed_run(clock: Clock, options: argparse.Namespace, batch: int, tokens: int, bf16: bool) -> list[dict[str, Any]]:
    """The rows of the updates of one run, without the first two, which allocate memory and check the measurement."""
    from transformers import TrainerCallback

    parts: list[dict[str, list[float]]] = []

    class Collect(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if hasattr(self, "started"):
                parts.append(clock.take() | {"update": [time.perf_counter() - self.started]})
            clock.take()
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            folder, batch=batch, tokens=tokens, steps=options.steps + 3, learning_rate=options.learning_rate, bf16=bf16
        )
        records_of(trainer, Collect(), max_kl=options.limit)
    rows = []
    for each in parts[2:]:
        ours = sum(each["callback"])
        rest = ours - sum(each["measure"]) - sum(each["anchor"])
        update = each["update"][0] - ours
        tries = len(each["measure"]) - 1
        rows.append(
            {"responses": batch, "tokens": tokens, "bf16": bf16, "update": update, "measure": each["measure"][0] / update}
            | {"anchor": sum(each["anchor"]) / update, "tries": tries, "rest": rest / update}
            | {"try": (each["enforce"][0] - each["measure"][0]) / tries / update if tries else ""}
            | {"machine": machine("cpu")}
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the updates of each setting, as a Markdown table."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["responses"], row["tokens"], row["bf16"]].append(row)
    columns = ("responses × tokens", "bf16", "update (s)", "measure", "anchor", "one try", "rest", "measure + rest")
    head = (*columns, "measure + rest + anchor", "measure + rest + one try")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (batch, tokens, bf16), group in groups.items():
        middle = {
            name: statistics.median(row[name] for row in group) for name in ("update", "measure", "anchor", "rest")
        }
        tries = [row["try"] for row in group if row["tries"]]
        one = statistics.median(tries) if tries else float("nan")
        measure = middle["measure"] + middle["rest"]
        shares = (
            middle["measure"],
            middle["anchor"],
            one,
            middle["rest"],
            measure,
            measure + middle["anchor"],
            measure + one,
        )
        lines.append(
            f"| {batch} × {tokens} | {bf16} | {middle['update']:.2f} | " + " | ".join(f"{x:.1%}" for x in shares) + " |"
        )
    return "\n".join(lines)


# -- precision ---------------------------------------------------------------------------------------------------------


def precision(options: argparse.Namespace) -> None:
    from trl_trustkl.callbacks.enforcer import Enforcer

    enforce, again = Enforcer.enforce, []

    def measured_again(enforcer: Any, windows: Any) -> None:
        enforce(enforcer, windows)
        again.append(kl_in_float32(enforcer, windows[0]))

    Enforcer.enforce = measured_again  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, batch=8, tokens=24, steps=10, learning_rate=options.learning_rate, bf16=True)
        found = records_of(trainer, max_kl=options.limit)
    rows = [
        {
            "update": record["update"],
            "kl": record["trust"]["kl"],
            "kl_in_float32": kl,
            "scale": record["trust"]["scale"],
        }
        | {"limit": options.limit, "machine": machine("cpu")}
        for record, kl in zip(found, again, strict=True)
    ]
    write_csv(options.output / "grpo_trust_region_precision.csv", rows)
    for row in rows:
        print(f"update {row['update']}: {row['kl']:.4f} as computed, {row['kl_in_float32']:.4f} in float32")


@torch.no_grad()
def kl_in_float32(enforcer: Any, window: Any) -> float:
    """The window's mean KL(π_old‖π) without autocast, from passes of the backbone."""
    from trl_trustkl.policy.exact_kl import token_statistics
    from trl_trustkl.policy.split_lm import SplitLM
    from trl_trustkl.types import PolicySnapshot

    model, path = enforcer._model, enforcer._snapshot.path
    new = [SplitLM.hidden_states(model, micro) for micro in window.micro_batches]
    path.set_end()
    path.set_scale(0.0)
    old = [SplitLM.hidden_states(model, micro) for micro in window.micro_batches]
    path.set_scale(1.0)
    kls = [
        token_statistics(
            states, micro.response_ids[micro.response_mask], model.head, vocab_size=model.vocab_size,
            temperature=model.temperature, old=PolicySnapshot(before, model.head),
        ).old_kl
        for micro, states, before in zip(window.micro_batches, new, old, strict=True)
    ]  # fmt: skip
    return float(torch.cat(kls).double().mean())


# -- profile -----------------------------------------------------------------------------------------------------------


def profile(options: argparse.Namespace) -> None:
    """The operators of the measurement of one update of 8 × 24 tokens, by the time that each takes itself."""
    from torch.profiler import profile as profiler

    from trl_trustkl.callbacks.window import Window

    inner, printed = Window.measure, []

    def measure(window: Window) -> Any:
        with profiler() as found:
            result = inner(window)
        printed.append(
            found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40)
        )
        return result

    Window.measure = measure  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, batch=8, tokens=24, steps=3, learning_rate=1e-4, bf16=options.bf16)
        records_of(trainer, anchor=False)
    print(printed[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bound", "cost", "precision", "profile"))
    parser.add_argument("--limit", type=float, default=0.02, help="nats per token (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="updates of a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each shape for `cost` (%(default)s)")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the shapes `cost` measures (%(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="train with bf16 autocast, TRL's default")
    parser.add_argument(
        "--precisions", type=lambda text: text == "bf16", nargs="+", default=[False], help="float32 and/or bf16"
    )
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the results (%(default)s)")
    options = parser.parse_args()
    {"bound": bound, "cost": cost, "precision": precision, "profile": profile}[options.what](options)


if __name__ == "__main__":
    main()
