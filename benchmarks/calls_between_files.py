"""Count the calls from one file of the package to another in one PPO update of a tiny model.

    python benchmarks/calls_between_files.py
    python benchmarks/calls_between_files.py --within ppo/trainer.py ppo/loop.py   # also those between these files

A call is attributed to the nearest caller in the package, even if functions of a library are in between.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import trl_trustkl
from tests import tiny

ROOT = Path(trl_trustkl.__file__).parent


class Calls:
    """A profile function of the interpreter that counts pairs of (calling, called) files."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        called = frame.f_code.co_filename
        if event != "call" or not called.startswith(str(ROOT)):
            return
        above = frame.f_back
        while above is not None and not above.f_code.co_filename.startswith(str(ROOT)):
            above = above.f_back
        if above is not None and above.f_code.co_filename != called:
            caller = above.f_code.co_filename
            self.pairs[str(Path(caller).relative_to(ROOT)), str(Path(called).relative_to(ROOT))] += 1


def count() -> Counter[tuple[str, str]]:
    """The calls of the second of three updates, which includes backtracking, on a tiny Llama with LoRA."""
    from transformers import TrainerCallback

    calls = Calls()

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                sys.setprofile(calls)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sys.setprofile(None)

    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_steps": 3, "trust_max_kl": 1e-6, "learning_rate": 1e-2, "logging_strategy": "no"}
        callbacks = [trl_trustkl.BoundReportCallback(report=False), Watch()]
        tiny.trainer(folder, changes=changes, callbacks=callbacks).train()
    return calls.pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--within", nargs="+", default=[], metavar="FILE", help="also count the calls between these files"
    )
    files = set(parser.parse_args().within)
    pairs = count()
    for (caller, called), number in pairs.most_common():
        print(f"{number:5}  {caller} → {called}")
    print(f"{sum(pairs.values()):5}  in total, between {len(pairs)} pairs of files")
    if files:
        within = sum(number for pair, number in pairs.items() if files.issuperset(pair))
        print(f"{within:5}  between the files of --within")


if __name__ == "__main__":
    main()
