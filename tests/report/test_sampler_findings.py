"""Each finding about responses that another engine sampled, on records that show it and on similar ones that do not."""

from __future__ import annotations

import pytest

from tests.report.cases import Case, Changes, checks_of, own
from trl_trustkl.report import sampler_findings
from trl_trustkl.report.findings import FINDINGS, find

CORRECTED: Changes = {"sampler__truncated": 0.0}

CASES: list[Case] = [
    # finding, records that show it, similar records that do not, part of the evidence, part of the advice
    ("sampler_differs", CORRECTED | {"sampler__kl": 0.06}, {"sampler__kl": 0.06},
     "In 12 of 12 updates, the distribution that the responses were sampled from differed from the policy's by more than 0.05 "
     "nats per token, and by 0.06 at most", "use_vllm=False"),
    ("sampler_differs", CORRECTED | {"sampler__kl": lambda p: 0.3 if p > 0.75 else 0.002},
     CORRECTED | {"sampler__kl": lambda p: 0.3 if p > 0.85 else 0.002},
     "In 3 of 12 updates", "gets the weights of every update"),
    ("sampler_differs", CORRECTED | {"sampler__kl": lambda p: None if p < 0.5 else 0.08}, CORRECTED | {"sampler__kl": 0.049},
     "by 0.08 at most", "use_vllm=False"),
    ("weights_truncated", {"sampler__truncated": lambda p: 0.4 if p > 0.75 else 0.0, "sampler__ratio_max": 8.5},
     {"sampler__truncated": lambda p: 0.4 if p == 1 else 0.0},
     "The bounds changed 10 % of the importance weights, and 40 % in one update. ", '"token_truncate"'),
    ("weights_truncated", {"sampler__truncated": 0.051, "sampler__ratio_min": lambda p: 0.01 if p == 1 else 0.5},
     {"sampler__truncated": 0.049},
     "The ratios of single tokens were from 0.01 to 1.1.", "vllm_importance_sampling_clip_max=3"),
]  # fmt: skip


test_every_finding_has_a_case, test_findings = checks_of(own(sampler_findings), CASES)


def test_only_the_updates_that_were_corrected_count(run_of) -> None:
    """The others are of a run that was resumed with another engine."""
    half = {
        "sampler__truncated": lambda p: 0.2 if p > 0.5 else None,
        "sampler__kl": lambda p: 0.9 if p > 0.5 else 0.001,
    }
    run = run_of(**half)
    assert "In 6 of 6 updates" in FINDINGS["sampler_differs"](run).evidence
    assert "20 % of the importance weights" in FINDINGS["weights_truncated"](run).evidence
    other = {
        "sampler__truncated": lambda p: 0.0 if p > 0.5 else None,
        "sampler__kl": lambda p: 0.001 if p > 0.5 else 0.9,
    }
    assert find(run_of(**other)) == []


def test_an_unlikely_token_now_and_then_in_a_long_run_is_no_finding(run_of) -> None:
    rare = CORRECTED | {"sampler__kl": lambda p: 0.2 if (100 * p) % 20 == 0 else 0.002}
    assert FINDINGS["sampler_differs"](run_of(100, **rare)) is None


@pytest.mark.parametrize("truncated", [None, 0.0])
def test_a_sampler_of_which_nothing_is_on_record_is_no_finding(run_of, truncated) -> None:
    nothing = {"sampler__kl": None, "sampler__ratio_min": None, "sampler__ratio_max": None}
    assert find(run_of(**nothing, sampler__truncated=truncated)) == []
