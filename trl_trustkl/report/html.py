"""One self-contained page from one or several runs.

Records and completions are untrusted text. Every expression in the templates passes through `visible` and Jinja's autoescape,
without exception. Figures are base64 data in an attribute, and the page's policy allows no script, no network and no form.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from .figures import Drawn
from .findings import Finding, find
from .schema import Run
from .summary import Statement, summarise
from .tables import Moment, Table, comparison, moments, settings, updates
from .text import number, shortened, visible

GLOSSARY = {
    "gated": "The share of an update in which a mechanism intervened: for the clip, the share of the gradient's weight that it "
    "set to zero; for the anchor, its share of the absolute advantage; for backtracking, the share of the step that was taken "
    "back. It need not be the share by which the mechanism changed the outcome: under Adam, a limit on the gradient's norm may "
    "scale every gradient down and change almost nothing, because Adam divides by the gradient's own size.",
    "counterfactual": "What the same update would have done without one mechanism. The update is rerun from its start, with "
    "this mechanism off and every other one on, and KL(π_old‖π) is measured. If it is larger than it was, the mechanism "
    "limited the update; if it is smaller, the mechanism let the update go further. What builds up over several updates is not "
    "part of it. Under an optimizer that rescales gradients, such as Adam, the gradients without a limit on their norm are "
    "multiplied by one factor, which makes them comparable to those that the optimizer has averaged so far.",
    "measured": "What an update did. After the update, the batch passes through the new policy, and the divergence from the "
    "old policy is computed over the full vocabulary.",
    "guaranteed": "A bound that was enforced. Only backtracking enforces one: on the mean KL(π_old‖π) over the contexts of the "
    "batch. Clipping, penalties and early stopping guarantee nothing.",
    "anchor": "The penalty β · KL(π‖π_ref) for moving away from π_ref, the model the run started from, in nats per response. "
    "It determines where the run ends.",
    "trust region": "What keeps one update small: KL(π_old‖π), in nats per token, where π_old is the policy that sampled the "
    "batch. It determines how fast the run gets there.",
    "nat": "The unit of KL and log-likelihood with natural logarithms. A text that is 1 nat less likely is less likely by a "
    "factor of 2.7.",
    "reference's likelihood": "log π_ref of a completion: its log-likelihood under the reference model, in nats per response. "
    "Closer to 0 is likelier.",
}


class Section(NamedTuple):
    run: Run
    statements: list[Statement]
    findings: list[Finding]
    figures: list[Drawn]
    settings: Table
    moments: list[Moment]
    updates: Table

    @property
    def likelihoods(self) -> bool:
        """Whether the completions have a likelihood under the reference."""
        return any(row.ref_logp is not None for row in self.run.completions)


def section(run: Run, figures: list[Drawn]) -> Section:
    return Section(run, summarise(run), find(run), figures, settings(run), moments(run), updates(run))


def page(sections: Sequence[Section]) -> str:
    runs = [each.run for each in sections]
    template = environment().get_template("report.html")
    return template.render(
        sections=sections,
        comparison=comparison(runs) if len(runs) > 1 else None,
        glossary=GLOSSARY,
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
