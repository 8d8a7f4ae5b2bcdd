"""Projections of tokens' distributions in the chunks of `token_statistics`, against a dense computation with autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_trustkl.divergences import project_onto_kl_ball
from trl_trustkl.policy import projection
from trl_trustkl.policy.exact_kl import token_statistics
from trl_trustkl.types import PolicySnapshot

V, H, N, LIMIT = 37, 16, 29, 0.05
COLUMNS = ("logp", "old_kl", "projected_logp", "projected_kl")


class Example:
    """Tokens of which some are outside of the ball and some inside, all in float64."""

    def __init__(self, distance: float = 0.5) -> None:
        draw = torch.Generator().manual_seed(4)
        self.head, frozen = nn.Linear(H, V, bias=False).double(), nn.Linear(H, V, bias=False).double()
        with torch.no_grad():
            for weight in (self.head.weight, frozen.weight):
                weight.copy_(torch.randn(V, H, generator=draw, dtype=torch.float64) / 4)
            frozen.weight.copy_(self.head.weight)
        noise = torch.rand(N, 1, generator=draw, dtype=torch.float64) * distance
        old = torch.randn(N, H, generator=draw, dtype=torch.float64)
        self.hidden = (old + noise * torch.randn(N, H, generator=draw, dtype=torch.float64)).requires_grad_()
        self.old = PolicySnapshot(old, frozen.requires_grad_(False))
        self.targets = torch.randint(V, (N,), generator=draw)

    def found(self, **arguments: Any) -> Any:
        return token_statistics(
            self.hidden, self.targets, self.head, vocab_size=V, temperature=0.7, old=self.old, limit=LIMIT, **arguments
        )

    def logps(self, temperature: float = 0.7) -> tuple[Tensor, Tensor]:
        new = (self.head(self.hidden) / temperature).log_softmax(-1)
        return new, (self.old.head(self.old.hidden) / temperature).log_softmax(-1)

    def dense(self) -> dict[str, Tensor]:
        new, old = self.logps()
        projected = project_onto_kl_ball(new, old, LIMIT)
        at = lambda logps: logps.gather(-1, self.targets[:, None])[:, 0]  # noqa: E731
        fixed = projected.detach()
        return {
            "logp": at(new), "old_kl": (old.exp() * (old - new)).sum(-1), "projected_logp": at(projected),
            "projected_kl": (new.exp() * (new - fixed)).sum(-1),
        }  # fmt: skip


@pytest.mark.parametrize("piece", [projection.PIECE, V, 2 * V])
def test_values_and_gradients_equal_the_dense_ones(piece, small_chunks, monkeypatch):
    monkeypatch.setattr(projection, "PIECE", piece)
    example = Example()
    weights = torch.randn(len(COLUMNS), N, dtype=torch.float64)
    results = []
    for found in (example.found()._asdict(), example.dense()):
        columns = [found[name] for name in COLUMNS]
        loss = sum((w * column).sum() for w, column in zip(weights, columns, strict=True))
        gradients = torch.autograd.grad(loss, [example.hidden, example.head.weight])
        results.append([*(column.detach() for column in columns), *gradients])
    for mine, dense in zip(*results, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-12)


def test_some_tokens_are_outside_and_end_at_the_limit(small_chunks):
    example = Example()
    found, (new, old) = example.found(), example.logps()
    kl = (new.exp() * (new - old)).sum(-1)
    outside = kl > LIMIT
    assert 5 < outside.sum() < N - 5
    assert torch.equal(found.projected_scale < 1, outside)
    inside = ~outside
    assert torch.equal(found.projected_logp[inside], found.logp[inside])
    assert (found.projected_kl[inside] == 0).all() and (found.projected_pull[inside] == 0).all()
    assert (found.projected_kept[inside] == 1).all()


def test_kept_and_pull_are_components_along_the_gradient_of_the_log_probability(small_chunks):
    """Each gradient with respect to the logits of a token by autograd, in an inner product with that of log π(token)."""
    example = Example()
    found = example.found()
    logits = (example.head(example.hidden) / 0.7).detach().requires_grad_()
    old = example.logps()[1].detach()
    new = logits.log_softmax(-1)
    projected = project_onto_kl_ball(new, old, LIMIT)
    rows = torch.arange(N)
    quantities = {
        "plain": new[rows, example.targets],
        "kept": projected[rows, example.targets],
        "pull": (new.exp() * (new - projected.detach())).sum(-1),
    }
    gradients = {
        name: torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for name, each in quantities.items()
    }
    square = gradients["plain"].square().sum(-1)
    for name in ("kept", "pull"):
        expected = (gradients[name] * gradients["plain"]).sum(-1) / square
        torch.testing.assert_close(getattr(found, f"projected_{name}"), expected, rtol=1e-8, atol=1e-10)


def test_without_a_token_outside_the_gradient_is_that_of_the_log_probability(small_chunks):
    """Bit for bit, and the old policy's head is not run again."""
    example = Example(distance=0.0)
    calls: list[int] = []
    head = example.old.head
    example.old = example.old._replace(head=lambda hidden: calls.append(len(hidden)) or head(hidden))
    weights = torch.randn(N, dtype=torch.float64)
    found = example.found()
    assert torch.equal(found.projected_logp, found.logp) and (found.projected_scale == 1).all()
    forward = len(calls)
    (mine,) = torch.autograd.grad((weights * found.projected_logp + found.projected_kl).sum(), example.hidden)
    assert len(calls) == forward
    (plain,) = torch.autograd.grad((weights * example.found().logp).sum(), example.hidden)
    assert torch.equal(mine, plain)


def test_measurements_have_no_gradient(small_chunks):
    found = Example().found()
    assert found.projected_logp.requires_grad and found.projected_kl.requires_grad
    for name in ("projected_kept", "projected_pull", "projected_scale"):
        assert not getattr(found, name).requires_grad


def test_a_certain_token_has_no_gradient_to_keep():
    """p(token) is 1 to the last bit, so that ∇log π(token) = 0."""
    logps = torch.tensor([[0.0, -200.0]])
    found = projection.statistics(logps, torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0]]), LIMIT)
    assert found["projected_scale"] < 1
    assert found["projected_kept"] == 1 and found["projected_pull"] == 0
    assert all(each.isfinite().all() for each in found.values())


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 2.5e-7])
def test_the_components_are_right_in_single_precision_where_the_policy_is_nearly_certain(rest):
    """1 − p and 1 − 2p + Σp² would be rounding errors there."""
    draw = torch.Generator().manual_seed(0)

    def certain(p: float) -> Tensor:
        others = torch.rand(1, 5_000, generator=draw, dtype=torch.float64) ** 4
        return torch.cat([torch.tensor([[p]], dtype=torch.float64), (1 - p) * others / others.sum()], -1).log()

    new, old, target = certain(1 - rest), certain(0.8), torch.tensor([[0]])
    exact = projection.statistics(new, old, target, 0.01)
    found = projection.statistics(new.float(), old.float(), target, 0.01)
    assert exact["projected_scale"] < 1 and exact["projected_pull"].abs() > 0.1
    torch.testing.assert_close(found["projected_pull"].double(), exact["projected_pull"], rtol=0.02, atol=0)
    torch.testing.assert_close(found["projected_kept"].double(), exact["projected_kept"], rtol=0.05, atol=1e-3)
