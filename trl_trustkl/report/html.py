"""One self-contained page from one or several runs.

Records and completions are untrusted text. Every expression in the templates passes through `visible` and Jinja's autoescape,
without exception. Figures are base64 data in an attribute, and the page's policy allows no script, no network and no form.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from .figures import FIGURES, Drawn
from .findings import Finding, find
from .glossary import GLOSSARY
from .schema import SETTINGS_FILE, Run
from .summary import Statement, summarise
from .tables import Moment, Table, comparison, moments, options, recurring, settings, updates
from .text import number, shortened, visible


class Section(NamedTuple):
    run: Run
    statements: list[Statement]
    findings: list[Finding]
    figures: list[Drawn]
    settings: Table
    options: Table
    recurring: list[list[Moment]]
    moments: list[Moment]
    updates: Table

    @property
    def likelihoods(self) -> bool:
        """Whether the completions have a likelihood under the reference."""
        return any(row.ref_logp is not None for row in self.run.completions)

    @property
    def not_drawn(self) -> str:
        """The figures that are left out, and why; empty if there are none."""
        drawn = {figure.name for figure in self.figures}
        left_out = [kind.title for name, kind in FIGURES.items() if name not in drawn]
        if not drawn and len(self.run.records) == 1:
            return "None: the records hold one update, and a figure needs two."
        if not left_out:
            return ""
        return f"Not drawn, because the records hold nothing or only zeros for them: {'; '.join(left_out)}."


def section(run: Run, figures: list[Drawn]) -> Section:
    tables = settings(run), options(run), recurring(run), moments(run), updates(run)
    return Section(run, summarise(run), find(run), figures, *tables)


def page(sections: Sequence[Section]) -> str:
    runs = [each.run for each in sections]
    template = environment().get_template("report.html")
    return template.render(
        sections=sections,
        comparison=comparison(runs) if len(runs) > 1 else None,
        glossary=GLOSSARY,
        settings_file=SETTINGS_FILE,
        title=" · ".join(run.name for run in runs),
    )


def environment(*packages: str) -> Environment:
    """For the templates of the packages and of this one; no text in them reaches a page unescaped."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "trl_trustkl.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # before it is escaped
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"data_uri": data_uri, "number": number, "shortened": shortened}
    return made


def data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
