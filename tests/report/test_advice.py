"""The sentences that several findings share."""

from __future__ import annotations

import numpy as np

from tests.example_runs import trl_run
from trl_trustkl.report.advice import configured_lr, of_updates, set_lr, weaker_anchor


def test_the_learning_rate_is_given_with_the_one_it_is_computed_from(run_of, tmp_path) -> None:
    changes = {"lr": lambda p: 1e-3 * p}
    run = run_of(4, **changes)
    assert configured_lr(run) == 1e-3
    assert set_lr(run, 1 / 2, "half") == "Set learning_rate=0.0005, half, which is at most 0.001"
    assert set_lr(run, 5, "five times", "value_learning_rate").startswith("Set value_learning_rate=0.005, five times,")
    assert set_lr(trl_run(tmp_path, **changes), 2, "twice") == "Set learning_rate=0.002, twice, which is 0.001"


def test_an_anchor_is_weakened_by_its_coefficient_or_by_its_target(run_of) -> None:
    fixed = run_of(3, anchor__coef=lambda p: 0.3 * p, anchor__target=None)
    assert weaker_anchor(fixed) == "Set kl_coef=0.1, half of the median β."
    aimed = weaker_anchor(run_of(3, anchor__target=lambda p: 8 * p))
    assert aimed == "Set kl_target=12, 1.5 times the last one, so that the controller settles at a lower β."


def test_updates_are_counted_among_all() -> None:
    assert of_updates(np.array([True, False, True])) == "2 of 3 updates"
    assert of_updates(np.array([True])) == "1 of 1 update"
    assert of_updates(np.array([False, False]), "attributed update") == "0 of 2 attributed updates"
