"""The contrast of two colours, as WCAG 2 defines it."""

from __future__ import annotations

from matplotlib.colors import to_rgb


def contrast(one: str, other: str) -> float:
    """From 1 for equal colours to 21 for black and white."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
