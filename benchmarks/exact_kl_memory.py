"""Memory of exact full-vocabulary divergences: computed in chunks, compared with all logits at once ("dense").

Each point is a separate process with N = B·T tokens, hidden states of width H for two policies, and a frozen head of V × H.
The script measures the peak resident memory above that of hidden states and head, for a forward pass and for forward and
backward passes. Dense, it grows with N·V. In chunks, the memory of the computation does not grow with N.

A process can hold more memory than it uses: by default glibc keeps freed blocks of up to 32 MiB for later use, and cannot
always reuse them, because small blocks that are still in use lie between them (allocator `default`). With a fixed
MALLOC_MMAP_THRESHOLD_, large blocks are returned when they are freed, at the cost of page faults (allocator `returning`).

    python benchmarks/exact_kl_memory.py            # writes benchmarks/data/exact_kl_memory.csv
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from typing import Any

from common import DATA, machine, peak_bytes, resident_bytes, write_csv

ALLOCATORS = {"default": {}, "returning": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}


def measure(mode: str, tokens: int, vocab: int, hidden: int, backward: bool) -> float:
    """MiB above the memory of the stored hidden states and the head."""
    import torch

    from trl_trustkl import divergences
    from trl_trustkl.policy.exact_kl import PolicySnapshot, token_statistics

    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocab, bias=False).requires_grad_(False)
    old = torch.randn(tokens, hidden)
    new = (old + 0.01 * torch.randn(tokens, hidden)).requires_grad_(backward)
    targets = torch.randint(vocab, (tokens,))
    warm = token_statistics(new[:2], targets[:2], head, vocab_size=vocab, old=PolicySnapshot(old[:2], head)).old_kl
    del warm
    before = resident_bytes()
    with torch.set_grad_enabled(backward):
        if mode == "chunked":
            kl = token_statistics(new, targets, head, vocab_size=vocab, old=PolicySnapshot(old, head)).old_kl.mean()
        else:
            kl = divergences.exact("kl", head(old), head(new)).mean()
        if backward:
            kl.backward()
    return (peak_bytes() - before) / 2**20


def in_a_process(row: dict[str, Any]) -> float:
    names = ("mode", "tokens", "vocab", "hidden", "backward")
    command = [sys.executable, __file__, "--point", *(str(row[name]) for name in names)]
    environment = {**os.environ, **ALLOCATORS[row["allocator"]]}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dense-up-to", type=int, default=256, help="largest N that is also computed dense")
    parser.add_argument("--point", nargs=5, metavar=("MODE", "N", "V", "H", "BACKWARD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        mode, tokens, vocab, hidden, backward = options.point
        print(measure(mode, int(tokens), int(vocab), int(hidden), backward == "True"))
        return
    rows = []
    print(f"V = {options.vocab}, H = {options.hidden}; MiB above hidden states and head; {machine('cpu')}")
    for backward, allocator, tokens, mode in itertools.product(
        (False, True), ALLOCATORS, options.tokens, ("chunked", "dense")
    ):
        if mode == "dense" and tokens > options.dense_up_to:
            continue
        row = {"mode": mode, "tokens": tokens, "vocab": options.vocab, "hidden": options.hidden, "backward": backward}
        row["allocator"] = allocator
        row["extra_mib"] = round(in_a_process(row), 1)
        rows.append(row)
        what = "forward+backward" if backward else "forward"
        print(f"{what:17} {allocator:10} {mode:8} N = {tokens:5}: {row['extra_mib']:8.1f} MiB", flush=True)
    write_csv(DATA / "exact_kl_memory.csv", rows)
    print("written to exact_kl_memory.csv")


if __name__ == "__main__":
    main()
