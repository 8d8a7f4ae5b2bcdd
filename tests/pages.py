"""Hostile texts for pages and terminals, a parser that reads a page as a browser does, and one of tables in Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser

ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</p></div></style></title><iframe srcdoc='x'>",
    "javascript:alert(1)",
    '<a href="javascript:alert(1)">x</a>',
    "{{ 7 * 7 }}{% raw %}",
    "]]><!-- --><base href=//evil>",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202etxt.exe\u2066",
    "\ud800",
    "&lt;script&gt;&#x3c;script>",
    "$\\frac{$ \\input{x}",
]


class Page(HTMLParser):
    """The elements, attributes and text of a page, as a browser parses them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def table_rows(text: str, first_header: str) -> dict[str, str]:
    """The rows of the Markdown table whose first column has this header: for each name in backticks in the first cell, the
    second cell."""
    lines = iter(text.splitlines())
    assert any(line.startswith(f"| {first_header} |") for line in lines)
    next(lines)
    rows: dict[str, str] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        names, said = (cell.strip() for cell in line.strip("|").split(" | ", 1))
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in rows, f"{name} is in two rows"
            rows[name] = said
    return rows
