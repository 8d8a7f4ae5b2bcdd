"""Hostile texts for pages and terminals, and a parser that reads a page as a browser does."""

from __future__ import annotations

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
