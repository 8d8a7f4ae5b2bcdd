"""The penalty λ·KL(π_old‖π): its value, its gradient, and its effect on an update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.tiny import FAST, LIMIT
from trl_trustkl import load_records
from trl_trustkl.divergences import ESTIMATORS
from trl_trustkl.policy.dropout import disable_dropout
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.policy.value_head import PolicyAndValue
from trl_trustkl.ppo.losses import Penalties, kl_terms
from trl_trustkl.types import MicroBatch, PolicySnapshot, Rollout

pytestmark = pytest.mark.filterwarnings("ignore")


def example(seed: int = 0) -> MicroBatch:
    """Three prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompt_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    prompt_ids = torch.randint(3, tiny.VOCAB, (3, 3), generator=generator) * prompt_mask
    response_ids = torch.randint(2, tiny.VOCAB, (3, 4), generator=generator) * response_mask
    return micro_batch(Rollout(prompt_ids, prompt_mask, response_ids, response_mask), torch.arange(3))


class Pair:
    """A small float64 policy and an old one nearby, at the tokens of `example`."""

    def __init__(self) -> None:
        self.micro = example()
        policy = tiny.gpt2().double()
        disable_dropout(policy)
        self.model = PolicyAndValue(policy, None, temperature=0.7)
        out = self.model(self.micro)
        self.old = PolicySnapshot(out.hidden, self.model.split_lm.frozen_head())
        self.old_logp = out.logp.detach()
        self.dense_old = dense_logps(self.model.policy, self.micro, 0.7)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trainable(self.model.policy):
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def term(self, estimator: str, coef: float = 3.0) -> Tensor:
        function = None if estimator == "exact" else ESTIMATORS[estimator]
        out = self.model(self.micro, old=self.old if estimator == "exact" else None)
        penalties = Penalties(trust_coef=coef, trust_estimator=function)
        mask = self.micro.response_mask
        return kl_terms(out, self.old_logp, torch.zeros_like(out.logp), mask, mask, penalties)


def test_the_penalty_is_the_dense_kl_and_its_estimators_at_the_sampled_tokens():
    pair = Pair()
    mask = pair.micro.response_mask
    new = dense_logps(pair.model.policy, pair.micro, 0.7)
    log_ratio = (new - pair.dense_old).gather(-1, pair.micro.response_ids.unsqueeze(-1)).squeeze(-1)[mask]
    assert log_ratio.abs().min() > 1e-3
    expected = {
        "exact": dense_kl(pair.dense_old, new)[mask].sum(),
        "k1": -log_ratio.sum(),
        "k3": (log_ratio.exp() - 1 - log_ratio).sum(),
    }
    for estimator, value in expected.items():
        assert float(pair.term(estimator)) == pytest.approx(3.0 * float(value), rel=1e-10), estimator


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_the_gradient_of_the_penalty_is_its_finite_difference(estimator):
    pair = Pair()
    params = trainable(pair.model.policy)
    pair.term(estimator).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
    generator = torch.Generator().manual_seed(2)
    step = 1e-6
    for _ in range(4):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

        def at(scale: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                for p, d in zip(params, direction, strict=True):
                    p.add_(scale * d)
                value = float(pair.term(estimator))
                for p, d in zip(params, direction, strict=True):
                    p.sub_(scale * d)
            return value

        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_at_the_old_policy_the_penalty_and_its_exact_gradient_are_0():
    pair = Pair()
    out = pair.model(pair.micro)
    pair.old = PolicySnapshot(out.hidden, pair.model.split_lm.frozen_head())
    pair.old_logp = out.logp.detach()
    for estimator in ("exact", "k3"):
        pair.model.zero_grad()
        term = pair.term(estimator)
        term.backward()
        assert abs(float(term)) < 1e-12
        assert max(float(p.grad.abs().max()) for p in trainable(pair.model.policy) if p.grad is not None) < 1e-12


# Plain gradient descent in steps small enough for a penalty of 100: larger ones would overshoot and hide its effect.
DESCENT = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-4,
    "num_ppo_epochs": 12,
    "num_mini_batches": 1,
    "max_grad_norm": 0,
    "clip_rule": "none",
    "kl_coef": 0.0,
    "max_steps": 1,
    "seed": 1,
}


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_the_larger_the_penalty_the_smaller_the_update(estimator, tmp_path):
    kls = []
    for coef in (0, 1, 10, 100):
        folder = tmp_path / str(coef)
        changes = DESCENT | {"trust_coef": coef, "trust_estimator": estimator}
        tiny.trainer(folder, tiny.llama(), changes=changes, peft_config=None).train()
        record = load_records(folder)[0]
        assert record["trust"]["coef"] == coef
        kls.append(record["trust"]["kl"])
    assert kls[0] > kls[1] > kls[2] > kls[3] > 0
    assert kls[3] < 0.2 * kls[0]


def test_the_penalty_by_k1_makes_the_sampled_tokens_likelier_and_the_update_larger(tmp_path):
    """k1 = log π_old − log π is the KL only in expectation; on one batch it rewards the likelihood of what was sampled."""
    updates = []
    for coef in (0, 10, 100):
        changes = DESCENT | {"trust_coef": coef, "trust_estimator": "k1"}
        tiny.trainer(tmp_path / str(coef), tiny.llama(), changes=changes, peft_config=None).train()
        updates.append(load_records(tmp_path / str(coef))[0]["trust"])
    medians = [update["ratio_quantiles"]["0.5"] for update in updates]
    assert medians[0] < medians[1] < medians[2]
    assert 10 * updates[0]["kl"] < updates[1]["kl"] < updates[2]["kl"]


def test_the_coefficient_reaches_the_loss(tmp_path):
    """Runs with a fixed λ and with the same λ from a controller are equal; one without a penalty differs."""
    fixed = tiny.trainer(tmp_path / "fixed", changes=FAST | {"max_steps": 1, "trust_coef": 5.0})
    fixed.train()
    steered = FAST | {"max_steps": 1, "trust_coef": 5.0, "trust_controller": "threshold", "trust_target": LIMIT}
    other = tiny.trainer(tmp_path / "steered", changes=steered)
    other.train()
    assert all(map(torch.equal, trainable(fixed.model), trainable(other.model)))
    none = tiny.trainer(tmp_path / "none", changes=FAST | {"max_steps": 1})
    none.train()
    assert not all(map(torch.equal, trainable(fixed.model), trainable(none.model)))
