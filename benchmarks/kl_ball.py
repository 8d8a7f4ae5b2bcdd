"""Time and memory of `clip_rule="troll"`: the projection of each token's distribution onto KL(·‖π_old) ≤ limit.

Hidden states of two policies go through a frozen output head, forward and backward, as in the loss of a micro-batch. The share
of the tokens outside of the limit is varied: those tokens have the hidden states of another policy, the others nearly π_old's.
The base of comparison is the pass that computes the exact KL(π_old‖π), forward and backward, of the same tokens. The passes
alternate, and times are medians.

    python benchmarks/kl_ball.py            # writes benchmarks/data/kl_ball.csv and .md
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from common import DATA, machine, peak_bytes, resident_bytes, write_csv

LIMIT = 0.05
SHARES = (0.0, 0.12, 1.0)
BASE = "exact KL"


class Passes:
    """The passes over N tokens, of which a share is outside of the limit."""

    def __init__(self, options: argparse.Namespace, share: float) -> None:
        import torch

        from trl_trustkl.policy.exact_kl import PolicySnapshot

        torch.manual_seed(0)
        self.vocab = options.vocab
        # Logits with a standard deviation of 3: an entropy of about 6 nats.
        self.head = torch.nn.Linear(options.hidden, options.vocab, bias=False).requires_grad_(False)
        torch.nn.init.normal_(self.head.weight, std=3 / options.hidden**0.5)
        states = torch.randn(options.tokens, options.hidden)
        noise = torch.full((options.tokens, 1), 1e-3)
        noise[: round(share * options.tokens)] = 0.3
        self.hidden = (states + noise * torch.randn_like(states)).requires_grad_()
        self.targets = torch.randint(options.vocab, (options.tokens,))
        self.old = PolicySnapshot(states, self.head)

    def run(self, what: str) -> float:
        """Seconds of one forward and backward pass."""
        from trl_trustkl.policy.exact_kl import token_statistics

        limit = None if what == BASE else LIMIT
        start = time.perf_counter()
        found = token_statistics(self.hidden, self.targets, self.head, vocab_size=self.vocab, old=self.old, limit=limit)
        first = found.logp if what == BASE else found.projected_logp
        second = found.old_kl if what == BASE else found.projected_kl
        (first + second).sum().backward()
        return time.perf_counter() - start

    def outside(self) -> float:
        from trl_trustkl.policy.exact_kl import token_statistics

        found = token_statistics(self.hidden, self.targets, self.head, vocab_size=self.vocab, old=self.old, limit=LIMIT)
        return float((found.projected_scale < 1).double().mean())


def memory(options: argparse.Namespace, what: str, share: float) -> float:
    """MiB above the memory of the stored hidden states and the head, in a separate process."""
    names = ("--vocab", "--hidden", "--tokens")
    sizes = [str(getattr(options, name[2:])) for name in names]
    command = [sys.executable, __file__, *(part for pair in zip(names, sizes, strict=True) for part in pair)]
    done = subprocess.run(
        [*command, "--memory", what, str(share)], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},  # freed blocks do not count
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def peak(options: argparse.Namespace, what: str, share: float) -> float:
    passes = Passes(options, share)
    before = resident_bytes()
    passes.run(what)
    return (peak_bytes() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576, help="those of SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("WHAT", "SHARE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(peak(options, options.memory[0], float(options.memory[1])))
        return
    rows = [measure(options, share) for share in SHARES]
    write_csv(DATA / "kl_ball.csv", rows)
    (DATA / "kl_ball.md").write_text(as_markdown(rows, options), encoding="utf-8")
    print((DATA / "kl_ball.md").read_text(encoding="utf-8"))


def measure(options: argparse.Namespace, share: float) -> dict[str, Any]:
    passes = Passes(options, share)
    times: dict[str, list[float]] = {BASE: [], "projection": []}
    for _ in range(options.repeats + 1):
        for what, seconds in times.items():
            seconds.append(passes.run(what))
    base, projection = (np.array(seconds[1:]) for seconds in times.values())  # the first pass warms up
    ratios = projection / base
    return {
        "outside": passes.outside(), "exact_kl_seconds": float(np.median(base)),
        "projection_seconds": float(np.median(projection)), "ratio": float(np.median(ratios)),
        "ratio_min": float(ratios.min()), "ratio_max": float(ratios.max()),
        "exact_kl_mib": memory(options, BASE, share), "projection_mib": memory(options, "projection", share),
    }  # fmt: skip


def as_markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"{options.tokens} tokens, vocabulary {options.vocab:,}, hidden size {options.hidden}, limit {LIMIT} nats; forward and "
        f"backward; {options.repeats} repetitions. {machine('cpu')}.",
        "",
        "| tokens outside | exact KL (s) | projection (s) | ratio (range) | exact KL (MiB) | projection (MiB) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {100 * row['outside']:.0f} % | {row['exact_kl_seconds']:.2f} | {row['projection_seconds']:.2f} "
            f"| {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) "
            f"| {row['exact_kl_mib']:.0f} | {row['projection_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
