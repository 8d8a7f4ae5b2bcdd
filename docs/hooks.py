"""MkDocs hooks: formulas become MathML, and files outside docs/ that a page links to are added to the site, under source/.

The pages use relative links to these files, and blocks of `math`, so that both also work in a clone and on GitHub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")

_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for page in list(files.documentation_pages()):
        for link in _OUTSIDE.finditer(Path(page.abs_src_path or "").read_text("utf-8")):
            name = _served(link[1])
            if (ROOT / link[1]).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=(ROOT / link[1]).read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = _FORMULA.sub(
        lambda formula: f'<div class="formula">{convert(formula[1], display="block")}</div>', markdown
    )
    return _OUTSIDE.sub(lambda link: f"]({_served(link[1])})", markdown)


def _served(path: str) -> str:
    """The path of a file in the site. Markdown and Python files are served as text, so that MkDocs does not render them."""
    return f"source/{path}" + (".txt" if path.endswith((".md", ".py")) else "")
