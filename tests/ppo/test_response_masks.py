"""Response masks: which responses are left out, and that nothing of them is in the gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.watched import run
from trl_trustkl.divergences import k3
from trl_trustkl.errors import ConfigError
from trl_trustkl.policy.exact_kl import TokenOutputs
from trl_trustkl.ppo.losses import LossScale, LossSums, Penalties, micro_loss
from trl_trustkl.ppo.response_masks import within
from trl_trustkl.records import load_records
from trl_trustkl.surrogates import build_surrogate

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 0.1


class Responses:
    """Four responses of up to five tokens; the second has a token above the limit, the third one only under a False mask."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.mask = torch.arange(5) < torch.tensor([[5], [4], [2], [3]])
        self.kl = torch.full((4, 5), 0.05)
        self.kl[1, 2] = 0.11
        self.kl[2, 3] = 9.0
        self.logp, self.values = (torch.randn(4, n, generator=draw).requires_grad_() for n in (5, 6))
        self.old, self.ref, self.advantages, self.returns = (torch.randn(4, 5, generator=draw) for _ in range(4))
        self.sampler: Tensor | None = None

    def batch(self) -> Any:
        scored = SimpleNamespace(
            logp=self.old, ref_logp=self.ref, values=torch.zeros(4, 5), loss_mask=self.mask, value_mask=self.mask,
            sampler_weights=None, sampler_logp=self.sampler, rollout=SimpleNamespace(response_mask=self.mask),
        )  # fmt: skip
        return SimpleNamespace(scored=scored, advantages=self.advantages, returns=self.returns)

    def outputs(self, rows: list[int]) -> TokenOutputs:
        return TokenOutputs(
            self.logp[rows], self.values[rows], hidden=torch.zeros(0), old_kl=self.kl[rows], ref_kl=self.kl[rows]
        )

    def loss(self, rows: list[int], mask_kl: float | None = LIMIT, rule: str = "ppo") -> tuple[Tensor, LossSums]:
        return micro_loss(
            self.outputs(rows), SimpleNamespace(rows=torch.tensor(rows)), self.batch(), LossScale(14.0, 14.0),
            rule=build_surrogate(rule, 0.2, 0.2), vf_coef=0.5, value_range=0.2, mask_kl=mask_kl,
            penalties=Penalties(anchor_coef=0.3, trust_coef=0.7),
        )  # fmt: skip


def kept(responses: Responses, rows: list[int], limit: float = LIMIT) -> list[bool]:
    micro = SimpleNamespace(rows=torch.tensor(rows))
    found = within(responses.outputs(rows), micro, responses.batch().scored, limit)
    assert found.shape == (len(rows), 1)
    return found.flatten().tolist()


def test_a_response_is_left_out_by_its_largest_token():
    responses = Responses()
    assert kept(responses, [0, 1, 2, 3]) == [True, False, True, True]
    assert kept(responses, [1, 0]) == [False, True]
    assert kept(responses, [0, 1, 2, 3], 0.11) == [True] * 4, "at the limit is within it"
    assert kept(responses, [0, 1, 2, 3], 0.01) == [False] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_is_above_the_limit(value):
    responses = Responses()
    responses.kl[0, 0] = value
    assert kept(responses, [0, 3]) == [False, True]


def test_with_another_sampler_the_kl_is_k3_of_its_distribution_and_the_policy():
    responses = Responses()
    draw = torch.Generator().manual_seed(1)
    responses.sampler = responses.logp.detach() + 0.3 * torch.randn(4, 5, generator=draw)
    estimate = torch.where(responses.mask, k3(responses.sampler, responses.logp.detach()), 0.0).amax(1)
    limit = float(estimate.sort().values[1:3].mean())
    assert kept(responses, [0, 1, 2, 3], limit) == (estimate <= limit).tolist()
    assert sum(kept(responses, [0, 1, 2, 3], limit)) == 2


@pytest.mark.parametrize("rule", ["ppo", "spo", "gspo"])
def test_nothing_of_a_response_that_is_left_out_is_in_the_gradient(rule):
    """Its row is exactly 0, with an anchor, a penalty and a value in the loss; the others are as they were."""
    masked, free = Responses(), Responses()
    for responses, mask_kl in ((masked, LIMIT), (free, None)):
        responses.kl.requires_grad_()
        responses.loss([0, 1, 2, 3], mask_kl, rule)[0].backward()
    for name in ("logp", "values", "kl"):
        mine, other = getattr(masked, name).grad, getattr(free, name).grad
        assert (mine[1] == 0).all() and (other[1] != 0).any()
        assert torch.equal(mine[[0, 2, 3]], other[[0, 2, 3]])


def test_a_response_with_an_infinite_kl_is_left_out_of_the_loss():
    responses = Responses()
    with torch.no_grad():
        responses.logp[1, 2], responses.kl[1, 2] = float("inf"), float("inf")
    loss, _ = responses.loss([0, 1, 2, 3])
    loss.backward()
    assert loss.isfinite() and responses.logp.grad.isfinite().all()


def test_what_is_left_out_is_counted():
    responses = Responses()
    _, sums = responses.loss([0, 1, 2, 3])
    weight = (responses.logp - responses.old).detach().exp() * responses.advantages.abs() * responses.mask
    assert float(sums.masked) == pytest.approx(float(weight[1].sum()))
    assert float(sums.weight) == pytest.approx(float(weight.sum()))
    assert (int(sums.masked_responses), int(sums.responses), int(sums.tokens)) == (1, 4, 14)
    _, none = responses.loss([0, 1, 2, 3], None)
    assert int(none.masked_responses) == 0 and float(none.masked) == 0
    assert float(none.weight) == float(sums.weight)


# -- in a run ----------------------------------------------------------------------------------------------------------

STEEP = {"learning_rate": 0.02, "max_steps": 2, "num_ppo_epochs": 3, "num_mini_batches": 2}


def test_response_masks_are_recorded_and_shorten_the_update(tmp_path):
    _, free = run(tmp_path / "free", changes=STEEP)
    _, masked = run(tmp_path / "masked", changes=STEEP | {"response_mask_kl": 0.002, "attribution_every": 1})
    for record in masked:
        trust = record["trust"]
        assert trust["mask_limit"] == 0.002
        assert 0 < trust["masked"] < 1 and 0 < trust["masked_responses"] < 1
        assert record["shares"]["response_mask"] == trust["masked"]
    assert masked[0]["trust"]["kl"] < free[0]["trust"]["kl"]
    # Without the mask, the first update is that of the run that has none.
    assert masked[0]["counterfactual"]["response_mask"] == free[0]["trust"]["kl"]
    for record in free:
        assert record["trust"]["mask_limit"] is None
        assert record["trust"]["masked"] == record["trust"]["masked_responses"] == 0


def test_with_a_single_step_no_response_can_be_left_out(tmp_path):
    single = STEEP | {"num_ppo_epochs": 1, "num_mini_batches": 1, "attribution_every": 1}
    _, records = run(tmp_path, changes=single | {"response_mask_kl": 1e-9})
    for record in records:
        assert record["trust"]["masked_responses"] == 0
        assert record["counterfactual"]["response_mask"] == record["trust"]["kl"]


def test_an_engine_without_log_probabilities_is_an_error(tmp_path):
    trainer = tiny.trainer(
        tmp_path, changes=STEEP | {"response_mask_kl": 0.1, "vllm_importance_sampling_correction": False}
    )
    trainer.parts.scoring.other_sampler = True
    sample = trainer.rollout
    trainer.rollout = lambda prompts: sample(prompts)._replace(sampler_logp=None)
    with pytest.raises(ConfigError, match=r"^`response_mask_kl` got 0.1, but the rollout engine returned no log-prob"):
        trainer.train()


def test_another_engine_is_compared_by_its_log_probabilities(tmp_path):
    """Its distribution differs from π_old's, so that responses are left out in the first step already."""
    trainer = tiny.trainer(
        tmp_path, changes=STEEP | {"response_mask_kl": 0.05, "num_ppo_epochs": 1, "num_mini_batches": 1}
    )
    trainer.parts.scoring.other_sampler = True
    sample = trainer.rollout

    def other(prompts: Any) -> Any:
        rollout = sample(prompts)
        shift = torch.zeros_like(rollout.sampler_logp)
        shift[: len(shift) // 2] = 0.5  # k3 = e^-0.5 - 1 + 0.5 = 0.107 there
        return rollout._replace(sampler_logp=rollout.sampler_logp + shift)

    trainer.rollout = other
    trainer.train()
    for record in load_records(tmp_path):
        assert record["trust"]["masked_responses"] == 0.5
