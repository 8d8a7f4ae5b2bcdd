"""Text of unknown origin without active characters, and numbers and lists for a reader."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_JOINERS = "\u200c\u200d"  # needed to spell Persian and many emoji; they do not affect the surrounding text


def visible(text: str) -> str:
    """The text with each control character (ANSI escapes, bidi controls, …) written out, as `\\x1b` or `\\u202e`.

    Line ends stay and other white space becomes a space. The result can always be encoded as UTF-8.
    """
    text = text.replace("\r\n", "\n")
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or character == "\n" or character in _JOINERS:
        return character
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str) -> str:
    """The visible text on one line."""
    return " ".join(visible(text).split())


def markdown(text: str) -> str:
    """Text escaped for Markdown, on one line: it cannot become markup, HTML, a link or a table column."""
    plain = html.escape(one_line(text), quote=False)
    active = r"([\\`*_\[\]#|~!$])|(?<!\w)(?=https?:|www\.)"
    return re.sub(active, lambda found: "\\" + found[0] if found[0] else "\u200b", plain)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of the text, followed by the number of characters left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits and no trailing zeros; "–" for one that is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "–"
    return "<1 %" if 0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def count(number_of: int, noun: str) -> str:
    """ "1 update", "3 updates"."""
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def listed(parts: Sequence[str], word: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return f" {word} ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
