"""Screenshots of a run's report for the documentation, by headless Chromium: light, dark, and at the width of a phone.

make demo && python docs/screenshots.py runs/demo/report.html      # writes docs/figures/report_*.png
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FIGURES = Path(__file__).parent / "figures"
DARK = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
VIEWS = {"light": (1280, 2200, []), "dark": (1280, 2200, DARK), "phone": (500, 1600, [])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    page = parser.parse_args().report.resolve()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None or not page.exists():
        sys.exit(f"{page} is not there." if browser else "Chromium is not installed.")
    with tempfile.TemporaryDirectory() as scratch:
        for name, (width, height, flags) in VIEWS.items():
            raw = Path(scratch) / f"{name}.png"
            base = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command = [*base, *flags, f"--window-size={width},{height}", f"--screenshot={raw}", page.as_uri()]
            # Output does not go into pipes, because Chromium's child processes would keep them open.
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
            # 256 colours are enough for text and lines, and reduce the size to one third.
            Image.open(raw).convert("RGB").quantize(256).save(FIGURES / f"report_{name}.png", optimize=True)
            print(FIGURES / f"report_{name}.png")


if __name__ == "__main__":
    main()
