"""The versions of constraints.txt, and a mark for tests that hold only for the version of transformers there."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PINS = {
    pin.name.lower(): pin
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}


def pinned(name: str) -> str:
    (spec,) = PINS[name].specifier
    return spec.version


ON_PINNED_TRANSFORMERS = version("transformers") == pinned("transformers")


def on_pinned_transformers(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not ON_PINNED_TRANSFORMERS, reason=reason)
