"""The loss of a micro-batch, and the statistics that are made of its sums."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from tests import tiny
from tests.tiny import EOS
from tests.watched import CUT, run
from trl_trustkl.divergences import k1, k3
from trl_trustkl.masking import masked_mean
from trl_trustkl.policy.exact_kl import TokenOutputs
from trl_trustkl.ppo.losses import (
    Aggregation,
    LossScale,
    LossSums,
    Penalties,
    epoch_stats,
    micro_loss,
    token_weights,
    value_loss,
)
from trl_trustkl.surrogates import build_surrogate
from trl_trustkl.types import EpochStats

pytestmark = pytest.mark.filterwarnings("ignore")


def test_statistics_are_pooled_over_tokens_and_epochs(tmp_path):
    """At a learning rate of 0 every ratio is 1 and nothing is clipped, for every number of mini-batches."""
    for minis in (1, 2, 4):
        changes = {"num_mini_batches": minis, "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
        trainer, _ = run(tmp_path / str(minis), changes=changes)
        log = trainer.state.log_history[0]
        assert log["val/ratio"] == 1.0 and log["val/ratio_var"] == 0.0 and log["policy/approxkl_avg"] == 0.0
        assert len(trainer.seen["optimise"][0].epochs) == 2


def test_statistics_leave_padding_out(tmp_path):
    script = [([5, EOS], 2), CUT]
    trainer, (record,) = run(tmp_path, changes={"max_steps": 1}, script=script)
    scored = trainer.seen["score"][0]
    log = trainer.state.log_history[0]
    assert scored.loss_mask.sum() == 4 * 2 + 4 * 6
    expected = float(masked_mean(scored.entropy, scored.loss_mask))
    assert record["entropy"] == log["policy/entropy_avg"] == pytest.approx(expected)
    assert expected > 1.1 * float(scored.entropy.mean())  # a mean that includes padding
    assert record["length"] == 4.0 and record["eos_rate"] == 0.5 and log["val/num_eos_tokens"] == 4
    weight = trainer.seen["optimise"][0].total
    assert 0 < weight.ratio < 2


def test_the_value_loss_is_the_worse_of_the_value_and_the_clipped_value():
    old, returns = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, 0.1, 1.0])
    values = torch.tensor([0.1, 0.5, -0.5, 0.5, 0.5, 3.0])
    plain, none = value_loss(values, old, returns, None)
    torch.testing.assert_close(plain, (values - returns) ** 2)
    assert not none.any()
    squared, clipped = value_loss(values, old, returns, 0.2)
    assert clipped.tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(squared, torch.tensor([0.81, 0.64, 2.25, 2.25, 0.16, 4.0]))


def test_epoch_statistics_are_means_of_the_sums():
    sums = LossSums(
        policy_loss=3.0, weight=8.0, pull=2.0, gated=4.0, gated_low=1.0, gated_high=3.0, clipped=5.0,
        squared_log_ratio=20.0, ratio=10.0, squared_ratio=14.0, tokens=10.0, terms=5.0, masked=2.0, masked_responses=1.0,
        responses=5.0, value_loss=6.0, value_gated=2.0, positions=4.0,
    )  # fmt: skip
    found = epoch_stats(torch.tensor(sums, dtype=torch.float64))
    assert found == EpochStats(
        policy_loss=0.6, value_loss=1.5, gated=0.5, gated_low=0.125, gated_high=0.375, clip_fraction=0.5, penalty=0.25,
        value_gated=0.5, approx_kl=1.0, ratio=1.0, ratio_var=pytest.approx(0.4), masked=0.25, masked_responses=0.2,
    )  # fmt: skip


def test_epoch_statistics_of_nothing_are_0_and_those_of_infinite_ratios_are_not_numbers():
    assert set(epoch_stats(torch.zeros(len(LossSums._fields)))) == {0.0}
    sums = dict.fromkeys(LossSums._fields, 1.0) | {"ratio": math.inf, "squared_ratio": math.inf}
    found = epoch_stats(torch.tensor([*sums.values()], dtype=torch.float64))
    assert found.ratio == math.inf and math.isnan(found.ratio_var)


class Hand:
    """A batch of three responses as tensors, and the loss of some of its rows by the formula."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.mask = torch.arange(4) < torch.tensor([4, 2, 3]).unsqueeze(-1)
        self.value_mask = torch.arange(4) < torch.tensor([4, 3, 4]).unsqueeze(-1)
        self.logp, self.old, self.ref, self.advantages, self.returns, self.old_values = (
            torch.randn(3, 4, generator=draw) for _ in range(6)
        )
        self.values = torch.randn(3, 5, generator=draw)
        scored = SimpleNamespace(
            logp=self.old, ref_logp=self.ref, values=self.old_values, loss_mask=self.mask, value_mask=self.value_mask,
            sampler_weights=None,
        )  # fmt: skip
        self.batch = SimpleNamespace(scored=scored, advantages=self.advantages, returns=self.returns)

    def loss(self, rows: list[int], length: int, aggregation: str = "token_mean") -> tuple[float, LossSums]:
        micro = SimpleNamespace(rows=torch.tensor(rows))
        out = TokenOutputs(self.logp[rows, :length], self.values[rows, : length + 1], hidden=torch.zeros(0))
        penalties = Penalties(anchor_coef=0.3, anchor_estimator=k1, trust_coef=0.7, trust_estimator=k3)
        rule = build_surrogate("none", low=0.2, high=0.2)
        terms = self.mask.sum() if aggregation == "token_mean" else self.mask.any(1).sum()
        scale = LossScale(float(terms), float(self.value_mask.sum()))
        loss, sums = micro_loss(
            out, micro, self.batch, scale, rule=rule, aggregation=aggregation, length=6, vf_coef=0.5, value_range=None,
            penalties=penalties,
        )  # fmt: skip
        return float(loss), sums

    def expected(self, aggregation: str = "token_mean") -> float:
        log_ratio = self.logp - self.old
        terms = -log_ratio.exp() * self.advantages + 0.3 * (self.logp - self.ref)
        terms = terms + 0.7 * (log_ratio.exp() - 1 - log_ratio)
        value = 0.5 * ((self.values[:, :4] - self.returns) ** 2)[self.value_mask].mean()
        rows = [row[mask] for row, mask in zip(terms, self.mask, strict=True) if mask.any()]
        policy = {
            "token_mean": torch.cat(rows).mean(),
            "sequence_mean": sum(row.mean() for row in rows) / len(rows),
            "sequence_sum": sum(row.sum() / 6 for row in rows) / len(rows),
        }[aggregation]
        return float(policy + 0.5 * value)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_the_loss_is_that_of_the_formula_however_it_is_split(aggregation, missing):
    """With `missing`, one response has no token that counts."""

    def stacked(sums: LossSums) -> torch.Tensor:
        return torch.stack([each.double() for each in sums])

    hand = Hand()
    hand.mask[0] &= not missing
    complete, sums = hand.loss([0, 1, 2], 4, aggregation)
    assert complete == pytest.approx(hand.expected(aggregation), rel=1e-5)
    parts = [hand.loss(rows, length, aggregation) for rows, length in (([1], 2), ([2, 0], 4))]
    assert sum(loss for loss, _ in parts) == pytest.approx(complete, rel=1e-5)
    torch.testing.assert_close(sum(stacked(sums) for _, sums in parts), stacked(sums), rtol=1e-5, atol=1e-6)
    tokens, responses = (5, 2) if missing else (9, 3)
    assert sums.tokens == tokens and sums.positions == 11
    assert sums.terms == (tokens if aggregation == "token_mean" else responses)


@pytest.mark.parametrize("rule", ["gspo", "gmpo"])
@pytest.mark.parametrize(("aggregation", "shares"), [(None, (0.5, 0.5)), ("token_mean", (0.25, 0.75))])
def test_responses_of_a_sequence_rule_have_equal_weights_whatever_their_lengths(tmp_path, rule, aggregation, shares):
    """Lengths 2 and 6: the share of each in the gradient with respect to its tokens' log-probabilities."""
    args = tiny.config(tmp_path, clip_rule=rule, loss_aggregation=aggregation)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    logp = torch.zeros(2, 6, requires_grad=True)
    scored = SimpleNamespace(
        logp=torch.zeros(2, 6), ref_logp=torch.zeros(2, 6), values=torch.zeros(2, 6), loss_mask=mask, value_mask=mask,
        sampler_weights=None,
    )  # fmt: skip
    batch = SimpleNamespace(scored=scored, advantages=torch.ones(2, 6), returns=torch.zeros(2, 6))
    _, terms = token_weights(mask, args.aggregation, args.response_length)
    loss, sums = micro_loss(
        TokenOutputs(logp, torch.zeros(2, 7), hidden=torch.zeros(0)), SimpleNamespace(rows=torch.arange(2)), batch,
        LossScale(float(terms), 8.0), rule=args.build_surrogate(), aggregation=args.aggregation,
        length=args.response_length, vf_coef=0.0, value_range=None, penalties=Penalties(),
    )  # fmt: skip
    loss.backward()
    assert tuple(-logp.grad.sum(1)) == pytest.approx(shares)
    assert epoch_stats(torch.stack([each.double() for each in sums])).policy_loss == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("rule", "given", "expected"),
    [
        ("ppo", None, "token_mean"),
        ("gspo", None, "sequence_mean"),
        ("gmpo", None, "sequence_mean"),
        ("gspo", "token_mean", "token_mean"),
        ("ppo", "sequence_sum", "sequence_sum"),
    ],
)
def test_the_aggregation_follows_the_rule_unless_it_is_given(tmp_path, rule, given, expected):
    assert tiny.config(tmp_path, clip_rule=rule, loss_aggregation=given).aggregation == expected
