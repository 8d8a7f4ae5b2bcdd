"""The record of a window, from metrics and measurements written by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from trl import GRPOConfig, RLOOConfig

from tests.example_runs import record as example
from trl_trustkl.callbacks.window_record import completion_rows, enforced, tracked, window_record
from trl_trustkl.certificate import certificate
from trl_trustkl.records import as_dict
from trl_trustkl.trl_compat.generation import Completion
from trl_trustkl.types import AnchorMeasurement, Enforcement, Measurement, ResponseMeasurement

pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = Measurement(0.008, 0.3, 0.5, 0.04, 3.0, {"0.5": 1.01}, tokens=60, complete=True)
ENFORCEMENT = Enforcement(0.09, scale=0.25, tries=2, limit=0.01, measured=MEASURED, decided="trust_max_kl")
ANCHOR = AnchorMeasurement(coef=0.1, kl=0.7, kl_exact=0.8, kl_stderr=0.05, share=None, kl_per_token=0.09)


class Window:
    """The results of a window: two passes of one step."""

    def __init__(self, **changes: Any) -> None:
        self.metrics = {
            "reward": [0.5], "rewards/first/mean": [0.25], "rewards/second/mean": [math.nan],
            "completions/mean_length": [8.0], "completions/clipped_ratio": [0.25], "entropy": [2.0, 3.0],
            "clip_ratio/region_mean": [0.0, math.nan], "clip_ratio/low_mean": [0.0, 0.5], "kl": [0.2, 0.4],
            "kl/target": [99.0], "kl/coef": [99.0],
        }  # fmt: skip
        self.coef, self.lr, self.lr_factor, self.seconds, self.step_seconds = 0.1, 1e-3, 0.8, 0.5, 1.5
        self.steps, self.dropped_steps, self.epochs = 1, 0, 1.0
        self.anchor, self.enforcement, self.scores = ANCHOR, ENFORCEMENT, None
        self.completions = [Completion("p", "c", 0.5, {"one": 0.5}, {}), Completion("q", "d", None, {"one": None}, {})]
        for name, value in changes.items():
            setattr(self, name, value)


def args_of(config: Any = GRPOConfig, **changes: Any) -> Any:
    common = {"output_dir": "none", "report_to": "none", "bf16": False, "use_cpu": True, "beta": 0.1}
    return config(**common | changes)


def made(kind: str = "grpo", config: Any = GRPOConfig, *, settings: Any = None, **changes: Any) -> dict[str, Any]:
    options = {
        name: changes.pop(name) for name in ("target", "grad_norm", "rescaled", "anchor_limit") if name in changes
    }
    given = {"update": 3, "target": None} | options
    return as_dict(window_record(kind, args_of(config, **settings or {}), Window(**changes), **given))


def test_a_record_holds_what_was_logged_measured_and_enforced():
    row = made(target=0.05, grad_norm=2.0)
    assert row["update"] == 3 and row["score"] == 0.5 and row["length"] == 8.0 and row["eos_rate"] == 0.75
    assert row["entropy"] == 2.5, "not the mean over the passes"
    assert row["lr"] == pytest.approx(8e-4) and row["seconds"] == {"measure": 0.5, "total": 2.0}
    assert row["rewards"] == {"first": 0.25, "second": None} and row["refused"] is None
    assert row["anchor"] == {
        "estimator": "k3", "placement": "loss", "gradient": "partial", "coef": 0.1, "share": None, "kl": 0.7,
        "kl_exact": 0.8, "kl_stderr": 0.05, "kl_per_token": 0.09, "target_per_token": 0.05, "target": 0.4,
        "renewed": None, "limit": None, "kl_after": None, "guaranteed": None,
    }  # fmt: skip
    assert row["trust"] == {
        "rule": "ppo", "low": 0.2, "high": 0.2, "gated": 0.0, "gated_low": 0.25, "gated_high": None, "coef": 0.0,
        "epochs": 1.0, "stopped": False, "kl": 0.008, "kl_max": 0.3, "kl_response_max": 0.5, "kl_proposed": 0.09,
        "tv": 0.04, "max_ratio": 3.0, "ratio_quantiles": {"0.5": 1.01}, "scale": 0.25, "tries": 2, "limit": 0.01,
        "guaranteed": 0.01, "limit_token": None, "limit_response": None, "guaranteed_token": None,
        "guaranteed_response": None, "decided": "trust_max_kl", "certificate": None,
        "mask_limit": None, "masked": None, "masked_responses": None,
    }  # fmt: skip
    assert row["gradient"] == {"norm": 2.0, "max_norm": 1.0, "scale": pytest.approx(0.5)}
    assert row["shares"] == {
        "clip": 0.0,
        "stop": 0.0,
        "backtrack": 0.75,
        "grad_norm": pytest.approx(0.5),
        "lr": pytest.approx(0.2),
    }
    assert row["trainer"] == "GRPOTrainer"
    assert row["binding"] == "backtrack" and row["value"]["clip"] is None
    assert row["sampler"] == {"kl": None, "ratio_min": None, "ratio_max": None, "truncated": None}


def test_every_limit_and_what_it_guarantees_is_recorded():
    measured = MEASURED._replace(anchor_kl=0.9, anchor_start=0.8)
    limits = {"limit_token": 0.4, "limit_response": 0.45, "limit_anchor": 0.9}
    found = ENFORCEMENT._replace(measured=measured, decided="anchor_max_kl", **limits)
    row = made(enforcement=found, anchor_limit=0.7)
    trust, anchor = row["trust"], row["anchor"]
    assert trust["limit_token"] == trust["guaranteed_token"] == 0.4 and trust["decided"] == "anchor_max_kl"
    assert trust["limit_response"] == 0.45 and trust["guaranteed_response"] is None, "0.5 was measured"
    assert (anchor["limit"], anchor["kl_after"], anchor["guaranteed"]) == (0.7, 0.9, 0.9)


def test_what_is_not_known_is_null():
    row = made(anchor=None)
    assert row["anchor"]["kl_exact"] is row["anchor"]["kl_stderr"] is row["anchor"]["target"] is None
    assert row["anchor"]["kl_per_token"] == pytest.approx(0.3) and row["anchor"]["kl"] == pytest.approx(2.4), (
        "TRL's own KL is lost where the anchor was not measured"
    )
    assert row["gradient"]["norm"] is row["gradient"]["scale"] is None
    assert row["anchor"]["target_per_token"] is None and row["anchor"]["coef"] == 0.1


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({}, "backtrack"),
        ({"lr_factor": 0.01, "enforcement": ENFORCEMENT._replace(scale=0.5)}, "lr"),
        (
            {"lr_factor": 3.0, "enforcement": ENFORCEMENT._replace(scale=1.0), "grad_norm": 4.0, "rescaled": False},
            "grad_norm",
        ),
        ({"lr_factor": 3.0, "enforcement": ENFORCEMENT._replace(scale=1.0), "grad_norm": 4.0}, "unknown"),
        ({"steps": 4, "dropped_steps": 3, "enforcement": ENFORCEMENT._replace(scale=None)}, "stop"),
        ({"lr_factor": 1.0, "enforcement": ENFORCEMENT._replace(scale=1.0)}, "unknown"),
        ({"lr_factor": 1.0, "enforcement": ENFORCEMENT._replace(scale=1.0), "coef": 0.0, "grad_norm": 0.1}, "none"),
        ({"enforcement": ENFORCEMENT._replace(scale=0.0, rejected="it is too far")}, "none"),
    ],
)
def test_what_bound_the_window(changes, binding):
    assert made(**changes)["binding"] == binding


def test_dropped_steps_are_a_stop():
    row = made(steps=3, dropped_steps=2, epochs=1.0)
    assert row["trust"]["stopped"] is True and row["trust"]["epochs"] == 1.0


def test_a_window_that_was_rolled_back_says_why():
    row = made(enforcement=ENFORCEMENT._replace(scale=0.0, rejected="its KL is above panic_kl"))
    assert row["refused"] == "its KL is above panic_kl" and row["trust"]["kl_proposed"] == 0.09
    assert row["trust"]["guaranteed"] == 0.01


def test_the_certificate_is_that_of_the_scores_and_the_measured_responses():
    """Its horizon is the longest completion that can be sampled; without a limit, that of the batch."""
    responses = ResponseMeasurement((0.1, -0.2, 0.3), (2, 3, 1), kl=1e-3, tv_max=0.05, tv_positions=(0.04, 0.02, 0.01))
    measured, scores = MEASURED._replace(responses=responses), torch.tensor([1.0, math.nan, 0.25])
    enforcement = ENFORCEMENT._replace(measured=measured)
    for limit, horizon in ((9, 9), (None, 3)):
        row = made(scores=scores, enforcement=enforcement, settings={"max_completion_length": limit})
        wanted = certificate(scores, measured, horizon=horizon)
        assert wanted is not None and row["trust"]["certificate"] == wanted._asdict()
    assert made(scores=None, enforcement=enforcement)["trust"]["certificate"] is None
    rejected = enforcement._replace(scale=0.0, rejected="it is too far")
    assert made(scores=scores, enforcement=rejected)["trust"]["certificate"] is None


@pytest.mark.parametrize("limit", [0.01, None])
def test_a_window_without_a_token_has_no_measurement(limit):
    empty = Measurement(0.0, 0.0, 0.0, 0.0, 1.0, {"0.5": 1.0}, tokens=0, complete=True)
    nothing = AnchorMeasurement(0.1, math.nan, math.nan, math.nan, None, math.nan)
    found = Enforcement(0.0, None if limit is None else 0.0, 0, limit, empty, None if limit is None else "no token")
    row = made(enforcement=found, anchor=nothing)
    for name in ("kl", "kl_max", "kl_response_max", "kl_proposed", "tv", "max_ratio", "guaranteed"):
        assert row["trust"][name] is None, name
    assert row["trust"]["ratio_quantiles"] == {} and row["trust"]["limit"] == limit
    assert row["anchor"]["kl"] is row["anchor"]["kl_exact"] is row["anchor"]["kl_per_token"] is None
    json.dumps(row, allow_nan=False)


def test_rloo():
    row = made("rloo", RLOOConfig, target=0.05, settings={"num_iterations": 2}, epochs=2.0)
    assert row["anchor"]["estimator"] == "k1" and row["anchor"]["placement"] == "reward"
    assert row["anchor"]["kl_per_token"] == 0.09 and row["trust"]["rule"] == "ppo" and row["trust"]["epochs"] == 2.0


def test_completions_are_rows_without_numbers_that_are_not_finite():
    first = Completion("p", "c", 0.5, {"one": 0.5, "two": None}, {})
    second = Completion("q", "d", math.inf, {"one": math.inf, "two": 1.0}, {"words": math.nan})
    assert completion_rows(Window(completions=[first, second]), 7) == [
        {"update": 7, "prompt": "p", "completion": "c", "score": 0.5, "ref_logp": None, "rewards": {"one": 0.5, "two": None}},
        {
            "update": 7, "prompt": "q", "completion": "d", "score": None, "ref_logp": None,
            "rewards": {"one": None, "two": 1.0}, "words": None,
        },
    ]  # fmt: skip


def test_columns_that_reward_functions_log_keep_off_the_columns_of_the_row():
    extra = {"score": 7, "score_2": torch.tensor(8), 9: {1, 2}, "words": ["a"]}
    (row,) = completion_rows(Window(completions=[Completion("p", "c", 0.5, {}, extra)]), 7)
    assert row["score"] == 0.5
    assert {name: row[name] for name in list(row)[6:]} == {"score_2": 7, "score_2_2": 8, "9": "{1, 2}", "words": ["a"]}


def test_the_numbers_of_anchor_and_trust_region_are_tracked_by_their_flat_names():
    row = example()
    found = tracked(
        row._replace(trust=row.trust._replace(kl=math.nan, tv=math.inf), anchor=row.anchor._replace(coef=1))
    )
    assert (
        found["trust/kl_max"] == 1.0 and found["anchor/kl_exact"] == 5.6 and found["trust/ratio_quantiles/0.5"] == 1.0
    )
    assert found["anchor/coef"] == 1.0 and isinstance(found["anchor/coef"], float)
    assert not {"trust/kl", "trust/tv", "trust/stopped", "trust/rule", "trust/scale", "score", "seconds/total"} & set(
        found
    )
    assert all(math.isfinite(value) for value in found.values())


def test_a_window_that_was_not_enforced_is_an_error():
    with pytest.raises(AssertionError):
        enforced(Window(enforcement=None))
    assert enforced(Window()) == (ENFORCEMENT, MEASURED)
