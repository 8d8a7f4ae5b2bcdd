"""Memory of exact full-vocabulary divergences: in chunks against all logits at once.

Each point is a fresh process: N = B·T tokens, hidden states of width H for two policies, a frozen head of V × H. Measured
is the peak resident memory beyond what was there with hidden states and head in place, forward alone and forward with
backward. In chunks it does not grow with N; dense it grows with N·V. The C library is told to give large blocks back when
they are freed (MALLOC_MMAP_THRESHOLD_): left to itself glibc keeps some of them, and the process grows with what it does
not use.

    python benchmarks/exact_kl_memory.py            # writes benchmarks/data/exact_kl_memory.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
DATA = Path(__file__).parent / "data" / "exact_kl_memory.csv"


def measure(mode: str, tokens: int, vocab: int, hidden: int, backward: bool) -> float:
    """MiB beyond the stored hidden states and the head."""
    import torch

    from trl_trustkl import divergences
    from trl_trustkl.logprobs import Peer, token_statistics

    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocab, bias=False).requires_grad_(False)
    old = torch.randn(tokens, hidden)
    new = (old + 0.01 * torch.randn(tokens, hidden)).requires_grad_(backward)
    targets = torch.randint(vocab, (tokens,))
    warm = token_statistics(new[:2], targets[:2], head, vocab_size=vocab, old=Peer(old[:2], head)).old_kl
    del warm
    before = peak()
    with torch.set_grad_enabled(backward):
        if mode == "chunked":
            kl = token_statistics(new, targets, head, vocab_size=vocab, old=Peer(old, head)).old_kl.mean()
        else:
            kl = divergences.exact("kl", head(old), head(new)).mean()
        if backward:
            kl.backward()
    return (peak() - before) / 1024


def peak() -> int:
    """Peak resident memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dense-up-to", type=int, default=256, help="largest N that is also computed densely")
    parser.add_argument("--point", nargs=5, metavar=("MODE", "N", "V", "H", "BACKWARD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        mode, tokens, vocab, hidden, backward = options.point
        print(measure(mode, int(tokens), int(vocab), int(hidden), backward == "True"))
        return
    rows = []
    print(f"{os.cpu_count()} cores, V = {options.vocab}, H = {options.hidden}; MiB beyond hidden states and head")
    for backward in (False, True):
        for tokens in options.tokens:
            for mode in ("chunked", "dense"):
                if mode == "dense" and tokens > options.dense_up_to:
                    continue
                point = [mode, tokens, options.vocab, options.hidden, backward]
                command = [sys.executable, __file__, "--point", *map(str, point)]
                mib = float(
                    subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.split()[
                        -1
                    ]
                )
                rows.append([*point, round(mib, 1)])
                print(f"{'forward+backward' if backward else 'forward':17} {mode:8} N = {tokens:5}: {mib:8.1f} MiB")
    DATA.parent.mkdir(exist_ok=True)
    with open(DATA, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "tokens", "vocab", "hidden", "backward", "extra_mib"])
        writer.writerows(rows)
    print(f"written to {DATA.name} ({platform.machine()}, Python {platform.python_version()})")


if __name__ == "__main__":
    main()
