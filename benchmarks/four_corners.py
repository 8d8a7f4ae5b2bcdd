"""The four combinations of anchor and trust region on a real language model: what fails without each of them.

SmolLM2-135M-Instruct with a 4-bit backbone and LoRA is trained with a reward for positive sentiment, four times from the
same model: with the anchor (β = 0.05) and the clip (0.2), with either one, and with neither. The table and the figures are
used in the README and docs/kl_or_trust_region.md.

    python benchmarks/four_corners.py    # benchmarks/data/four_corners.csv and .md, docs/figures/four_corners_*.png

This script runs `trustkl compare` with its defaults, and copies the table, the numbers and two of the figures to the folders
that the documentation uses. Options such as `--seeds 42 43` are passed on. Running it again resumes an interrupted comparison.
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
