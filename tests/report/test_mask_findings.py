"""Each finding about response masks, on records that show it and on similar ones that do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.example_runs import trl_run
from tests.report.cases import Case, Changes, checks_of, own
from trl_trustkl.report import mask_findings
from trl_trustkl.report.findings import FINDINGS

OWN = own(mask_findings)


ELSEWHERE = {"engine": "VLLMServerEngine"}


def masked(responses: Any, **changes: Any) -> Changes:
    return {"trust__mask_limit": 0.05, "trust__masked": 0.1, "trust__masked_responses": responses, **changes}


CASES: list[Case] = [
    # finding, records that show it, similar records that do not, part of the evidence, part of the advice
    ("masks_leave_out_most", masked(0.51), masked(0.49),
     "In 12 of 12 updates, more than half of the responses were left out of the loss, 51 % on average: a token of each had a "
     "KL above response_mask_kl, 0.05 nats", "learning_rate=0.0005"),
    ("masks_leave_out_most", masked(lambda p: 0.9 if p > 0.4 else 0.1), masked(lambda p: 0.9 if p > 0.6 else 0.1),
     "In 8 of 12 updates", "or a larger response_mask_kl"),
    ("masks_act_too_late", masked(0.0, trust__kl_max=0.06), masked(0.0, trust__kl_max=0.04),
     "In 12 of 12 updates, a token ended above response_mask_kl, 0.05 nats, up to 0.06, but no response was left out in 12 "
     "updates", "Set trust_max_kl_token=0.05, which is enforced"),
    ("masks_act_too_late", masked(0.0, trust__kl_max=0.06, trust__epochs=1.0), masked(0.01, trust__kl_max=0.06), "0.06",
     "; or set num_ppo_epochs=2"),
    ("masks_act_too_late", masked(0.0, trust__kl_max=0.06), masked(0.0, trust__kl_max=0.06, rollout=ELSEWHERE), "0.06",
     "which is enforced after the last step."),
    ("masks_leave_out_most", masked(0.51, rollout=ELSEWHERE), masked(0.49, rollout=ELSEWHERE),
     "a token of each had an estimated KL from the sampler's distribution above response_mask_kl, 0.05 nats. The sampler and "
     "the training pass differ by 0.0005", "Set response_mask_kl=0.1, twice the present one"),
]  # fmt: skip


test_every_finding_has_a_case, test_findings = checks_of(OWN, CASES)


@pytest.mark.parametrize("name", sorted(OWN))
def test_records_without_masks_show_nothing(run_of, tmp_path, name: str) -> None:
    """Those of a run without masks, of an earlier version, and of TRL's trainers."""
    for responses in (0.0, None):
        run = run_of(trust__mask_limit=None, trust__masked_responses=responses, trust__kl_max=9.0)
        assert FINDINGS[name](run) is None
    assert FINDINGS[name](trl_run(tmp_path)) is None
