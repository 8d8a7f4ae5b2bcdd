"""The conclusions of a comparison: the numbers must support each sentence."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from trl_trustkl.compare.conclusions import Corners, conclude, corners, gap
from trl_trustkl.compare.metrics import METRICS, Result

FLAT = {"score": 0.5, "kl": 8.0, "update_kl": 0.05, "ratio": 1.1, "ref_logp": -3.0}
NOISE = (-0.01, 0.0, 0.01)


SWITCHES = {
    "both": (True, True), "clip": (False, True), "anchor": (True, False), "neither": (False, False),
}  # fmt: skip


def synthetic(
    name: str, seeds: int = 3, *, config: dict[str, Any] | None = None, noise: float = 1.0, **values: float
) -> Result:
    """A setting whose seeds vary by 1 % (times `noise`) around the values."""
    anchored, clipped = SWITCHES.get(name, (True, True))
    rows = {
        seed: dict.fromkeys(METRICS, math.nan)
        | {metric: value * (1 + noise * NOISE[seed]) for metric, value in {**FLAT, **values}.items()}
        for seed in range(seeds)
    }
    config = {"kl_coef": 0.05 if anchored else 0.0, "clip_rule": "ppo" if clipped else "none"}
    return Result(name, config, anchored, clipped, 1.2 if clipped else None, rows, {})


def four(seeds: int = 3, noise: float = 1.0, **changed: dict[str, float]) -> list[Result]:
    return [synthetic(name, seeds, noise=noise, **changed.get(name, {})) for name in SWITCHES]


NO_ANCHOR = {"clip": {"kl": 36.0}, "neither": {"kl": 101.0}}
NO_CLIP = {"anchor": {"update_kl": 0.5}, "neither": {"kl": 101.0, "update_kl": 1.5}}


CASES: list[tuple[str, list[Result], list[str], list[str]]] = [
    # name of the case, results, parts of the text, parts that must not be in it
    ("nothing differs", four(),
     ["In score, no two settings differ clearly (0.50 to 0.50)",
      "Removing the anchor did not clearly change KL to the reference, reference log-likelihood and score.",
      "No ratio was above the clip's range; the clip does not guarantee it."],
     ["higher", "lower", "So the anchor", "highest", "did not hold"]),
    ("the anchor matters", four(**NO_ANCHOR),
     ["Without the anchor the KL to the reference was higher both with the clip (36 against 8 nats/response, ",
      "and without it (101 against 8 nats/response, ",
      "In KL to the reference, 5 of 6 pairs of settings differ clearly: it was highest with neither (101) and lowest with "],
     ["So the anchor", "score was higher", "update KL was higher"]),
    ("each matters", four(**NO_ANCHOR | NO_CLIP),
     ["Without the clip the largest update KL was higher both with the anchor (0.5 against 0.05 nats/token, ",
      "So the anchor kept the policy nearer to the reference, and the clip kept updates smaller, each with"],
     ["Without the clip the largest ratio was higher"]),
    ("the anchor matters with the clip only", four(clip={"kl": 36.0}),
     ["KL to the reference was higher with the clip (36 against 8 nats/response, ",
      "and not clearly different without it (8 against 8 nats/response)."], ["So the anchor", "lower"]),
    ("opposite effects", four(clip={"score": 0.9}, neither={"score": 0.1}),
     ["Without the anchor the score was higher with the clip (0.90 against 0.50, ", "and lower without it (0.10 against 0.50, ",
      "Without the clip the score was not clearly different with the anchor (0.50 against 0.50), and lower without it"],
     ["So the anchor"]),
    ("a difference within the spread", four(noise=40.0, **NO_CLIP | {"clip": {"kl": 9.0}}),
     ["In score, no two settings differ clearly"], ["higher with the clip", "So the anchor"]),
    ("the likelihood fell", four(clip={"ref_logp": -4.0}, neither={"ref_logp": -5.0}),
     ["Without the anchor the reference log-likelihood was lower both with the clip (-4.00 against -3.00 nats/token, "],
     ["likelihood was higher"]),
    ("the clip did not hold", four(both={"ratio": 131.0}, clip={"ratio": 129.0}),
     ["The clip did not hold the ratio in its range: with both the largest was 132, and the range ends at 1.2."],
     ["No ratio was above"]),
    ("no clip at all", [synthetic("anchor"), synthetic("neither", kl=50.0)],
     ["In KL to the reference, the two settings differ clearly: it was highest with neither (50) and lowest with anchor (8), "],
     ["clip's range", "did not hold", "Without the"]),
    ("one seed", four(1, **NO_ANCHOR),
     ["of one seed: without a spread over seeds",
      "Without the anchor the KL to the reference was higher both with the clip (35.6 against 7.92"],
     [" SD", "standard deviation", "So the anchor"]),
    ("one seed, less than a tenth", four(1, clip={"kl": 8.5}, neither={"kl": 8.5}),
     ["Removing the anchor did not clearly change KL to the reference,",
      "no two settings differ by a tenth or more (7.92 to"],
     ["higher"]),
    ("not corners", [synthetic("x"), synthetic("y", score=0.9), synthetic("z", score=0.7)],
     ["In score, 3 of 3 pairs of settings differ clearly: it was highest with y (0.90) and lowest with x (0.50), "],
     ["Without the"]),
    ("a metric that is 0", [synthetic("x"), synthetic("y", update_kl=0.001), synthetic("z", update_kl=0.0)],
     ["it was highest with x (0.05) and lowest with y (0.001), ", " SD. It is 0 with z."], ["lowest with z"]),
    ("one setting", [synthetic("x")], ["over 3 seeds"], ["pairs", "the two", "Without"]),
]  # fmt: skip


@pytest.mark.parametrize(("results", "said", "unsaid"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_sentence_appears_if_the_numbers_support_it(
    results: list[Result], said: list[str], unsaid: list[str]
) -> None:
    text = conclude(results, last=5)
    for part in said:
        assert part in text, text
    for part in unsaid:
        assert part not in text.partition("do not overlap.")[2 if "do not overlap." in text else 0], text


def test_a_gap_counts_pooled_standard_deviations_and_needs_disjoint_ranges() -> None:
    def of(*values: float) -> Result:
        rows = {seed: dict.fromkeys(METRICS, value) for seed, value in enumerate(values)}
        return Result("x", {}, True, True, None, rows, {})

    found = gap(of(1, 2, 3), of(7, 8, 9), "kl")
    assert found == (1, pytest.approx(6.0))
    pooled = math.sqrt((statistics.variance([1, 2]) + 2 * statistics.variance([4, 6, 9])) / 3)
    found = gap(of(4, 6, 9), of(1, 2), "score")
    assert found == (-1, pytest.approx((19 / 3 - 1.5) / pooled))
    assert (
        gap(of(1, 2, 2, 2, 2, 2, 2, 9), of(8, 9, 9, 9, 9, 9, 9, 9), "kl").sign == 0
    )  # different means, but their ranges overlap
    assert (
        gap(of(1, 3), of(3.5, 5.5), "kl").sign == 0
    )  # disjoint ranges, but means less than 2 standard deviations apart
    assert gap(of(1, 1), of(1, 1), "kl") == (0, 0.0)
    assert gap(of(10, 1000), of(1e5, 1e7), "ratio").sds == pytest.approx(2 * math.sqrt(2))  # of the logarithms
    assert gap(of(math.nan), of(1.0), "kl") is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({name: {"lam": 0.9} for name in SWITCHES}, True),
        ({"both": {"lam": 0.9}}, False),
        ({"anchor": {"kl_coef": 0.1}}, False),
        ({"clip": {"cliprange": 0.1}}, False),
        ({"clip": {"trust_max_kl": 0.1}}, False),
    ],
)
def test_four_corners_differ_only_in_anchor_and_clip(changes: dict[str, dict[str, Any]], found: bool) -> None:
    results = [each._replace(config={**each.config, **changes.get(each.name, {})}) for each in four()]
    got = corners(list(reversed(results)))
    assert (got is not None) is found
    if got is not None:
        assert [each.name for each in got] == list(Corners._fields)
    assert corners(results[:3]) is None and corners([*results[:3], results[0]]) is None
