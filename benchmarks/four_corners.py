"""The four corners of anchor × trust region on a real language model: what fails without each of them.

SmolLM2-135M-Instruct with a 4-bit backbone and LoRA is tuned towards positive sentiment four times from the same start:
with the anchor (β = 0.05) and the clip (0.2), with either, with neither. Table and figures go into the README and
docs/kl_or_trust_region.md.

    python benchmarks/four_corners.py    # benchmarks/data/four_corners.csv and .md, docs/figures/four_corners_*.png

This is `trustkl compare` with nothing changed; its table, its numbers and two of its figures are copied to where the
documentation has them. Its options are handed on, such as `--seeds 42 43`; an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from trl_trustkl.cli import main as trustkl

DATA = Path(__file__).parent / "data"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/four_corners"))
    options, rest = parser.parse_known_args()
    status = trustkl(["compare", "--output-dir", str(options.output_dir), *rest])
    if status == 0:
        DATA.mkdir(exist_ok=True)
        for suffix in (".csv", ".md"):
            shutil.copyfile(options.output_dir / f"comparison{suffix}", DATA / f"four_corners{suffix}")
        for name in ("kl", "ratio"):
            shutil.copyfile(
                options.output_dir / "figures" / f"compare_{name}.png", FIGURES / f"four_corners_{name}.png"
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
