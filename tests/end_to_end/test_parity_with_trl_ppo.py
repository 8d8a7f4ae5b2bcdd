"""Weights and metrics equal those of TRL 1.12's PPO trainer, except for the intended differences."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.stock_ppo import (
    MOVED,
    ROWS,
    SCRIPT,
    TOLERANCE,
    UPDATES,
    Script,
    difference,
    models,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fast_stock_trainer")]

SAME_METRICS = (
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/num_eos_tokens",
    "lr",
    "episode",
)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weights_equal_the_stock_trainers(stock, ours, family, adapter):
    start = models(family)
    extra = {"peft_config": tiny.lora()} if adapter else {}
    theirs, mine = (trainer(start, adapter=adapter, **extra) for trainer in (stock, ours))

    assert difference(theirs.before, mine.before) == 0.0
    assert any("lora_B" in name for name in mine.before) == adapter
    for part in ("policy", "value"):
        moves = [float((mine.after[n] - mine.before[n]).abs().max()) for n in mine.before if n.startswith(part)]
        assert max(moves) > MOVED, f"the {part} did not change: equal weights would show nothing"
    gap = difference(theirs.after, mine.after)
    print(f"\n{family}, {'lora' if adapter else 'full'}: moved {mine.moved():.3f}, differ by {gap:.1e}")
    assert gap <= TOLERANCE
    # Both clips were active; otherwise their agreement would be untested.
    assert all(max(entry[key] for entry in mine.logs) > 0 for key in ("policy/clipfrac_avg", "val/clipfrac_avg"))


@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ({"kl_estimator": "k3"}, SCRIPT),
        ({"whiten_rewards": True}, SCRIPT),
        ({"missing_eos_penalty": 1.0}, SCRIPT),
        ({"gamma": 0.9, "lam": 0.8, "cliprange_value": 0.5}, SCRIPT),
        ({"stop_token": None}, Script(ends=(None,))),
        ({"stop_token": None, "stop_token_id": 5}, Script(stop=5)),
        ({"lr_scheduler_type": "constant", "temperature": 1.0}, SCRIPT),
        ({"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3, "weight_decay": 0.1}, SCRIPT),
    ],
    ids=["k3", "whiten_rewards", "missing_eos", "gae", "no_stop_token", "stop_token_id", "schedule", "adamw"],
)
def test_trl_options_mean_the_same(stock, ours, settings, script):
    start = models()
    settings = {"total_episodes": 2 * ROWS} | settings
    theirs, mine = (trainer(start, settings, script=script) for trainer in (stock, ours))
    assert mine.moved() > MOVED
    assert difference(theirs.after, mine.after) <= TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.21},
        {"kl_estimator": "k3"},
        {"temperature": 0.71},
        {"cliprange": 0.19},
        {"cliprange_value": 0.19},
        {"clip_rule": "none"},
        {"clip_value": False},
        {"vf_coef": 0.51},
        {"lam": 0.94},
        {"whiten_advantages": False},
        {"score_position": "eos"},
        {"max_grad_norm": 1.0},
        {"lr_scheduler_type": "constant"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_parity_can_fail(ours, settings):
    """A setting that is slightly off exceeds the tolerance; the same error in the code would too."""
    start = models()
    neutral, off = ours(start), ours(start, settings)
    assert difference(neutral.after, off.after) > TOLERANCE


def test_metrics_of_the_same_name_equal_the_stock_trainers(stock, ours):
    """Only the metrics that TRL computes correctly; difference 4 covers those that include padding."""
    start = models()
    theirs, mine = stock(start), ours(start)
    assert len(theirs.logs) == len(mine.logs) == UPDATES
    for one, other in zip(theirs.logs, mine.logs, strict=True):
        for name in SAME_METRICS:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
