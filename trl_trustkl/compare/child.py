"""One run in a process of its own: `python -m trl_trustkl.compare.child FOLDER`.

The folder's settings.json says what to train. When the run is over, done.json says with what it was made: a folder without it
holds half a run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_atomically
from ..records import load_records

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"


def run(folder: Path) -> None:
    """Train what the folder's settings.json describes, and mark it as done."""
    from transformers import set_seed

    from .task import load

    made_with = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    set_seed(made_with["seed"])  # a task that makes its model at random makes the same one each time
    function = load(made_with["task"])
    changes = {**made_with["config"], "seed": made_with["seed"], "max_steps": made_with["updates"]}
    trainer = function(str(folder), callbacks=(), **changes)
    trainer.train()
    made = len(load_records(folder))
    if made != made_with["updates"]:
        raise DataError(f"the run left records of {made} updates instead of {made_with['updates']}: it ended early.")
    write(folder / DONE_FILE, made_with)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write settings.json or done.json in one step."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))


def end_with_parent() -> None:
    """End when standard input does: the parent holds its other side, and lets go however it ends."""

    def watch() -> None:
        # From the descriptor: a thread that waits in sys.stdin holds its lock, which the interpreter wants when it ends.
        while os.read(0, 1):
            pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    run(Path(sys.argv[1]))
