"""Which parts of a loss the importance weights multiply: those that are estimated at sampled tokens, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from trl_trustkl.divergences import k1, k2, k3
from trl_trustkl.kl_ball import TokenProjection
from trl_trustkl.policy.exact_kl import TokenOutputs
from trl_trustkl.ppo.losses import Aggregation, LossScale, LossSums, Penalties, epoch_stats, micro_loss, token_weights
from trl_trustkl.surrogates import build_surrogate

LENGTH, COEF = 6, 0.3


class Example:
    """Three responses of up to four tokens, random in float64, of which one token has the weight 0."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.mask = torch.arange(4) < torch.tensor([4, 2, 3]).unsqueeze(-1)
        self.value_mask = torch.arange(4) < torch.tensor([4, 3, 4]).unsqueeze(-1)
        self.old, self.ref, self.advantages, self.returns, self.old_values = (
            torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(5)
        )
        self.weights = torch.where(self.mask, 3 * torch.rand(3, 4, generator=draw, dtype=torch.float64), 1.0)
        self.weights[1, 0] = 0.0
        self.logp = (self.old + 0.5 * torch.randn(3, 4, generator=draw, dtype=torch.float64)).requires_grad_()
        self.values = torch.randn(3, 5, generator=draw, dtype=torch.float64).requires_grad_()
        self.kls = torch.rand(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
        """KL(π‖π_ref) and KL(π_old‖π) of each context."""

    def loss(
        self, weights: Tensor | None, *, rows: Any = (0, 1, 2), width: int = 4, rule: str = "ppo",
        aggregation: Aggregation = "token_mean", **penalties: Any,
    ) -> tuple[Tensor, LossSums]:  # fmt: skip
        scored = SimpleNamespace(
            logp=self.old, ref_logp=self.ref, values=self.old_values, loss_mask=self.mask, value_mask=self.value_mask,
            sampler_weights=weights,
        )  # fmt: skip
        batch = SimpleNamespace(scored=scored, advantages=self.advantages, returns=self.returns)
        at = torch.tensor(rows)
        out = TokenOutputs(
            self.logp[at, :width], self.values[at, : width + 1], hidden=torch.zeros(0), ref_kl=self.kls[0, at, :width],
            old_kl=self.kls[1, at, :width],
        )  # fmt: skip
        _, terms = token_weights(self.mask, aggregation, LENGTH)
        return micro_loss(
            out, SimpleNamespace(rows=at), batch, LossScale(float(terms), float(self.value_mask.sum())),
            rule=build_surrogate(rule, low=0.2, high=0.2), aggregation=aggregation, length=LENGTH, vf_coef=0.5,
            value_range=0.2, penalties=Penalties(**penalties),
        )  # fmt: skip

    def gradients(self, weights: Tensor | None, **options: Any) -> list[Tensor]:
        """Of the loss, with respect to log-probabilities, values and exact KLs."""
        loss, _ = self.loss(weights, **options)
        leaves = [self.logp, self.values, self.kls]
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


ESTIMATED = {"anchor_coef": COEF, "anchor_estimator": k2, "trust_coef": 0.7, "trust_estimator": k3}
EXACT = {"anchor_coef": COEF, "trust_coef": 0.7}


@pytest.mark.parametrize("penalties", [{}, ESTIMATED, EXACT], ids=["none", "estimated", "exact"])
@pytest.mark.parametrize("rule", ["none", "ppo", "spo", "gspo", "gmpo", "cispo"])
def test_a_loss_that_is_not_corrected_is_bit_for_bit_that_of_weights_of_1(rule, penalties):
    example = Example()
    (plain, sums), (ones, same) = (
        example.loss(w, rule=rule, **penalties) for w in (None, torch.ones_like(example.old))
    )
    assert torch.equal(plain, ones) and all(map(torch.equal, sums, same))
    of_none, of_ones = (example.gradients(w, rule=rule, **penalties) for w in (None, torch.ones_like(example.old)))
    assert all(map(torch.equal, of_none, of_ones)) and all(each.abs().sum() > 0 for each in of_none[:2])


@pytest.mark.parametrize("offpolicy", [False, True])
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_the_objective_and_the_estimated_kl_terms_are_weighted_and_the_counts_are_not(aggregation, offpolicy):
    """Against the formula, in one micro-batch and in two."""
    example = Example()
    options = {"rule": "none", "aggregation": aggregation, "anchor_offpolicy": offpolicy, **ESTIMATED}
    complete, sums = example.loss(example.weights, **options)
    log_ratio = example.logp - example.old
    anchor = 0.5 * (example.logp - example.ref) ** 2 * (log_ratio.exp() if offpolicy else 1.0)
    terms = -log_ratio.exp() * example.advantages + COEF * anchor + 0.7 * (log_ratio.exp() - 1 - log_ratio)
    rows = [row[mask] for row, mask in zip(example.weights * terms, example.mask, strict=True)]
    policy = {
        "token_mean": torch.cat(rows).sum() / 9,
        "sequence_mean": sum(row.sum() / len(row) for row in rows) / 3,
        "sequence_sum": sum(row.sum() / LENGTH for row in rows) / 3,
    }[aggregation]
    without = Example()
    without.advantages.zero_()
    value, _ = without.loss(None, rule="none", aggregation=aggregation)
    assert complete.item() == pytest.approx((policy + value).item(), rel=1e-12)
    parts = [
        example.loss(example.weights, rows=rows, width=width, **options) for rows, width in (((1,), 2), ((2, 0), 4))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(complete.item(), rel=1e-12)
    assert sums.tokens == 9 and sums.terms == (9 if aggregation == "token_mean" else 3)


def test_values_and_exact_kl_terms_have_the_gradient_that_they_have_without_weights():
    example = Example()
    plain, weighted = (example.gradients(weights, **EXACT) for weights in (None, example.weights))
    assert torch.equal(plain[1], weighted[1]) and torch.equal(plain[2], weighted[2])
    assert plain[1].any() and (plain[2] > 0).equal(example.mask.expand(2, 3, 4))
    assert not torch.allclose(plain[0], weighted[0])


@pytest.mark.parametrize("rule", ["none", "ppo", "dual", "rollback", "spo", "cispo", "sapo", "gspo", "gmpo"])
def test_the_gradient_at_a_token_is_multiplied_by_its_weight(rule):
    example = Example()
    plain, weighted = (example.gradients(weights, rule=rule)[0] for weights in (None, example.weights))
    torch.testing.assert_close(weighted, plain * example.weights * example.mask, rtol=1e-12, atol=0)
    assert weighted[1, 0] == 0 and plain[1, 0] != 0


def test_the_shares_of_the_gradient_are_weighted_and_the_shares_of_tokens_are_not():
    """Four tokens: gated above, gated below, free, and one that the correction has left out."""
    example = Example()
    example.mask = example.value_mask = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
    ratios, weights = torch.tensor([2.0, 0.5, 1.1, 3.0]).double(), torch.tensor([0.5, 3.0, 1.0, 0.0]).double()
    example.logp = (example.old[0] + ratios.log()).expand(3, 4).clone().requires_grad_()
    example.advantages = torch.tensor([1.0, -1.0, 2.0, 1.0]).double().expand(3, 4)
    _, sums = example.loss(weights.expand(3, 4), trust_coef=0.5)
    found = epoch_stats(torch.stack([each.double() for each in sums]))
    total = 0.5 * 2.0 + 3.0 * 0.5 + 1.1 * 2.0
    assert found.gated == pytest.approx((0.5 * 2.0 + 3.0 * 0.5) / total)
    assert found.gated_high == pytest.approx(0.5 * 2.0 / total) and found.gated_low == pytest.approx(1.5 / total)
    pull = 0.5 * (0.5 * 1.0 + 3.0 * 0.5 + 0.1)
    assert found.penalty == pytest.approx(pull / (pull + total))
    assert found.policy_loss == pytest.approx(-(0.5 * 1.2 - 3.0 * 0.8 + 2.2) / 4)
    assert found.clip_fraction == 0.75 and found.ratio == pytest.approx(6.6 / 4)
    assert found.approx_kl == pytest.approx(0.5 * float(ratios.log().square().mean()))


def test_an_estimator_without_a_gradient_on_average_is_weighted_too():
    """k1 in the loss: its gradient at a token is the weight."""
    example = Example()
    example.advantages.zero_()
    found = example.gradients(example.weights, anchor_coef=1.0, anchor_estimator=k1)[0]
    torch.testing.assert_close(found, torch.where(example.mask, example.weights / 9, 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_the_penalty_of_a_projection_is_added_without_importance_weights(aggregation):
    """It is exact, over the vocabulary, while the ratio of the projection is at the sampled token."""
    example, draw = Example(), torch.Generator().manual_seed(1)
    projected = (example.old + 0.1 * torch.randn(3, 4, generator=draw, dtype=torch.float64)).requires_grad_()
    kl = torch.rand(3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    scored = SimpleNamespace(
        logp=example.old, ref_logp=example.ref, values=example.old_values, loss_mask=example.mask,
        value_mask=example.value_mask, sampler_weights=example.weights,
    )  # fmt: skip
    batch = SimpleNamespace(scored=scored, advantages=example.advantages, returns=example.returns)
    projection = TokenProjection(projected, kl, torch.ones_like(kl), torch.zeros_like(kl))
    out = TokenOutputs(example.logp, example.values, hidden=torch.zeros(0), projection=projection)
    tokens, terms = token_weights(example.mask, aggregation, LENGTH, torch.float64)
    loss, sums = micro_loss(
        out, SimpleNamespace(rows=torch.arange(3)), batch, LossScale(float(terms), 1.0),
        rule=build_surrogate("troll", low=0.2, high=0.2, kwargs={"alpha": 0.7}), aggregation=aggregation, length=LENGTH,
        vf_coef=0.0, value_range=None, penalties=Penalties(),
    )  # fmt: skip
    weighted = example.weights * (projected - example.old).exp() * example.advantages
    expected = ((0.7 * kl - weighted) * tokens).sum()
    torch.testing.assert_close(loss, expected / terms)
    torch.testing.assert_close(sums.policy_loss, expected.detach())
    (of_projected, of_kl) = torch.autograd.grad(loss, [projected, kl])
    torch.testing.assert_close(of_projected, -(weighted * tokens).detach() / terms)
    torch.testing.assert_close(of_kl, 0.7 * tokens / terms)
