"""One self-contained page from one or several runs.

Records and completions are untrusted text. Every expression of the template passes through `visible` and Jinja's
autoescape, without exception: figures enter as base64 data in an attribute, and the page's own policy allows no script, no
network and no form.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from .figures import Drawn
from .findings import Finding, find
from .schema import Run
from .summary import Statement, summarise
from .tables import Moment, Table, comparison, moments, settings, updates
from .text import visible

GLOSSARY = {
    "gated": "What a mechanism took from an update while it ran: the clip's share is that of the gradient's weight it set to "
    "zero, the anchor's its part of the absolute advantage, backtracking's the part of the step taken back.",
    "measured": "What an update did: once it is over, the batch passes through the new policy, and its divergence from the "
    "old one is computed over the whole vocabulary.",
    "guaranteed": "A bound that something enforced. Only backtracking does, for the batch's mean KL(π_old‖π), on the contexts "
    "that the batch visited. Clipping, penalties and early stops guarantee nothing.",
    "anchor": "The pull towards π_ref, the model the run started from: β · KL(π‖π_ref), in nats per response. It decides where "
    "the run ends.",
    "trust region": "What keeps one update small: KL(π_old‖π), in nats per token, π_old being the policy that sampled it. "
    "It decides how fast the run gets there.",
    "nat": "The unit of KL and of log-likelihood with natural logarithms. A text that is 1 nat less likely is less "
    "likely by a factor of 2.7.",
    "reference's likelihood": "log π_ref of a completion: how likely the original model would have written it, in nats per "
    "response; closer to 0 is likelier.",
}


class Section(NamedTuple):
    """What the page says of one run."""

    run: Run
    statements: list[Statement]
    findings: list[Finding]
    figures: list[Drawn]
    settings: Table
    moments: list[Moment]
    updates: Table


def section(run: Run, figures: list[Drawn]) -> Section:
    return Section(run, summarise(run), find(run), figures, settings(run), moments(run), updates(run))


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    template = environment().get_template("report.html")
    runs = [each.run for each in sections]
    return template.render(
        sections=sections,
        comparison=comparison(runs) if len(runs) > 1 else None,
        glossary=GLOSSARY,
        title=" · ".join(run.name for run in runs),
    )


def environment(*packages: str) -> Environment:
    """For the templates of the packages and of this one; nothing in them reaches a page unescaped."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "trl_trustkl.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["data_uri"] = data_uri
    return made


def _shown(value: Any) -> Any:
    """What an expression of the template becomes before it is escaped."""
    return visible(value) if type(value) is str else value


def data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
