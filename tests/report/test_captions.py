"""The captions of the figures: each says what the records have, and nothing that they lack."""

from __future__ import annotations

import pytest

from tests.example_runs import trl_rows, write_run
from trl_trustkl.report import captions, read_run
from trl_trustkl.report.figures import draw

LIMITED = {"trust__limit": 0.02, "trust__scale": 0.5, "trust__kl_proposed": 0.04}
NO_RANGE = {"trust__rule": "none"}
ADAPTED = {"anchor__coef": lambda p: p / 10}


@pytest.mark.parametrize(
    ("figure", "changes", "says", "not_says"),
    [
        ("anchor", {"anchor__coef": 0.0}, "β was 0 throughout", "lower panel"),
        ("anchor", {}, "was the same in every update", "A controller"),
        ("anchor", ADAPTED, "A controller raises β (lower panel)", "same in every"),
        ("anchor", ADAPTED | {"anchor__target": None}, "The lower panel is the coefficient β.", "target"),
        ("anchor", {"anchor__coef": None}, "The KL to the reference when each batch", "β"),
        ("anchor", {"anchor__kl_exact": None}, "as estimated", "exact"),
        ("trust_region", {}, "No limit was enforced", "line is"),
        ("trust_region", LIMITED, "dashed red line", "No limit"),
        ("trust_region", LIMITED, "The orange line", "dotted"),
        ("trust_region", LIMITED | {"trust__scale": 1.0}, "dashed red line", "orange"),
        ("trust_region", {"trust__limit_token": 0.1, "trust__scale": 1.0}, "dotted red line", "dashed"),
        ("trust_region", {"trust__scale": 1.0}, "on other quantities", "No limit"),
        ("ratios", {}, "The clip range is grey", "clip acts on the ratios"),
        ("ratios", NO_RANGE, "98 %, 90 % and 50 %", "clip"),
        ("ratios", {"trust__ratio_quantiles": {}}, "The red line is the largest ratio", "bands"),
        ("gradient", {}, "above the dashed line", "No limit"),
        ("gradient", {"gradient__max_norm": None}, "No limit was set on it.", "dashed"),
        ("counterfactual", {"counterfactual": lambda p: {"clip": 1.0} if p == 1 else None}, ": 1 of 12.", "12 of 12"),
    ],
)
def test_a_caption_says_what_the_records_have(run_of, figure, changes, says, not_says) -> None:
    text = getattr(captions, figure)(run_of(12, **changes).records)
    assert says in text and not_says not in text


def test_the_captions_of_a_long_run_say_what_was_summed_up(run_of) -> None:
    short, long = run_of(300).records, run_of(3000).records
    for of in (captions.score, captions.anchor, captions.trust_region, captions.ratios, captions.gradient):
        assert "successive" not in of(short)
        assert of(long).endswith(
            "is the median of about 10 successive updates. A band reaches from the smallest to the largest."
        )
    assert "Each bar is the mean of about 25 successive updates." in captions.gated(long)
    assert "successive" not in captions.gated(short[:120])
    assert "an update:" in captions.frontier(short) and "one of 2 successive updates" in captions.frontier(long)


def test_the_page_has_the_captions_of_its_records(tmp_path) -> None:
    records = read_run(write_run(tmp_path, trl_rows())).records
    for figure in draw(records):
        assert figure.caption == getattr(captions, figure.name)(records)
        assert figure.caption.endswith(".") and "nan" not in figure.caption
