"""One run in a separate process: `python -m trl_trustkl.compare.child FOLDER`.

settings.json in the folder says what to train. When the run is finished, the same settings are written to done.json; without
it, the run in the folder is incomplete.
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
    """Train what the folder's settings.json describes, and mark the run as finished."""
    from transformers import set_seed

    from .task import load

    made_with = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    set_seed(made_with["seed"])  # so that a task that initialises its model at random makes the same one each time
    function = load(made_with["task"])
    changes = {**made_with["config"], "seed": made_with["seed"], "max_steps": made_with["updates"]}
    trainer = function(str(folder), callbacks=(), **changes)
    trainer.train()
    # GRPO has a record for each generation batch, which may serve several updates.
    made = max((record["update"] for record in load_records(folder)), default=0)
    if made != made_with["updates"]:
        raise DataError(f"the run ended early: it has records up to update {made} of {made_with['updates']}.")
    write(folder / DONE_FILE, made_with)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write settings.json or done.json atomically."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))


def end_with_parent() -> None:
    """Exit when standard input ends: the parent holds its other end, which closes however the parent exits."""

    def watch() -> None:
        # Not sys.stdin: a thread that waits in it holds its lock, which the interpreter needs when it exits.
        while os.read(0, 1):
            pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    run(Path(sys.argv[1]))
