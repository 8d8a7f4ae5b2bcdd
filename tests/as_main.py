"""Runs a script or a module as Python does, and ends its process group before Python ends.

    python -m tests.as_main FILE ARGUMENTS…
    python -m tests.as_main -m MODULE ARGUMENTS…

A process that ends with its process group may be aborted by the group's threads ("terminate called without an active
exception"), also after everything went well.
"""

from __future__ import annotations

import gc
import runpy
import sys

from torch import distributed

if __name__ == "__main__":
    _, *words = sys.argv
    if words[0] == "-m":
        sys.argv = words[1:]
        names = runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        names = runpy.run_path(words[0], run_name="__main__")
    names.clear()
    gc.collect()  # models in DDP have references to the group
    if distributed.is_initialized():
        distributed.destroy_process_group()
