"""Dropout and other noise of training, switched off: otherwise the ratio would not be 1 before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NOISE = ("layerdrop", "jitter_noise", "input_jitter_noise", "moe_jitter_eps", "neftune_noise_alpha")

Place = tuple[nn.Module, str]
"""A module, and the name of its attribute that holds a rate."""


def noise_places(model: nn.Module) -> list[Place]:
    """The places of every rate of dropout and of other noise of training, whatever the rates are.

    Besides dropout modules these are rates that other modules keep: of attention dropout, of skipped layers, and of the
    noise on an expert's input or, by NEFTune, on the embeddings.
    """
    return [
        (module, name)
        for module in model.modules()
        for name, rate in vars(module).items()
        if (name == "p" and isinstance(module, _DROPOUTS))
        or (isinstance(rate, float) and "dropout" in name)
        or (isinstance(rate, float | int) and name in _NOISE)
    ]


def has_noise(model: nn.Module) -> bool:
    """Whether any of these rates is not 0."""
    return any(getattr(module, name) for module, name in noise_places(model))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and noise of training to 0."""
    for module, name in noise_places(model):
        setattr(module, name, 0.0)


@contextmanager
def without_dropout(places: Sequence[Place]) -> Iterator[None]:
    """The rates at these places at 0 inside the context, and as before after it."""
    rates = [(module, name, getattr(module, name)) for module, name in places]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
