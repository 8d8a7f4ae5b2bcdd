"""Every number of a record, computed again from the definitions in docs/metrics.md."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.certificates import by_definition
from tests.dense import dense_kl, row_logps, unpadded
from tests.tiny import EOS
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.policy.loading import trainable
from trl_trustkl.records import BoundRecord
from trl_trustkl.types import Batch, Scored

pytestmark = pytest.mark.filterwarnings("ignore")


class Witness(TrustKLPPOTrainer):
    """Keeps a float64 copy of the policy at each point that a record describes, and checks the record against them."""

    def rollout(self, prompts: Any) -> Any:
        self.old = copy.deepcopy(self.model).double()
        return super().rollout(prompts)

    def advantages(self, scored: Scored) -> Batch:
        self.batch = super().advantages(scored)
        return self.batch

    def optimise(self, batch: Batch) -> Any:
        self.steps: list[tuple[nn.Module, Tensor]] = []
        backward = self.parts.optimisation._backward

        def kept(batch: Batch, mini: list[int], *rest: Any) -> Tensor:
            rows = torch.cat([batch.scored.micro_batches[index].rows for index in mini])
            self.steps.append((copy.deepcopy(self.model).double(), rows))
            return backward(batch, mini, *rest)

        self.parts.optimisation._backward = kept
        stats = super().optimise(batch)
        del self.parts.optimisation._backward
        self.proposed = copy.deepcopy(self.model).double()
        return stats

    def record(self, *args: Any) -> BoundRecord:
        record = super().record(*args)
        for key, value in recomputed(self).items():
            found = record
            for part in key.split("/"):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            expected = None if value is None else pytest.approx(float(value), rel=3e-4, abs=2e-5)
            assert found == expected, f"{key} of update {record.update}"
        self.seen.append(record)
        return record


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {  # of log u, u = π_ref/π
    "k1": lambda x: -x,
    "k3": lambda x: x.exp() - 1 - x,
}
RULES: dict[str, Callable[..., Tensor]] = {
    "ppo": lambda w, a, low, high: torch.min(w * a, w.clamp(1 - low, 1 + high) * a),
    "spo": lambda w, a, low, high: w * a - a.abs() * (w - 1) ** 2 / (2 * torch.where(a > 0, high, low)),
    "cispo": lambda w, a, low, high: w.detach().clamp(1 - low, 1 + high) * a * w.log(),
}


def recomputed(t: Witness) -> dict[str, Any]:
    """The numbers of a record by their definitions, in float64 and row by row, from complete forward passes without padding."""
    args, rollout, scores = t.args, t.batch.scored.rollout, t.batch.scored.scores.double()
    prompts, responses = unpadded(rollout)
    rows, width = len(responses), rollout.response_ids.shape[1]

    def distributions(model: nn.Module, which: Any = range(rows)) -> list[Tensor]:
        return [row_logps(model, prompts[i], responses[i], args.temperature) for i in which]

    with torch.no_grad():
        old, new, proposed = (distributions(m.policy) for m in (t.old, copy.deepcopy(t.model).double(), t.proposed))
        if t.is_peft_model:
            with t.old.policy.disable_adapter():
                ref = distributions(t.old.policy)
        else:
            ref = distributions(copy.deepcopy(t.reference.model).double())
        states = [
            t.old.policy(input_ids=torch.cat(pair)[None], output_hidden_states=True).hidden_states[-1][0]
            for pair in zip(prompts, responses, strict=True)
        ]
    at = [torch.arange(len(r)) for r in responses]
    old_logp = [p[i, r] for p, i, r in zip(old, at, responses, strict=True)]
    log_u = [q[i, r] - p for q, i, r, p in zip(ref, at, responses, old_logp, strict=True)]
    contexts = [dense_kl(p, q) for p, q in zip(old, ref, strict=True)]
    estimates = contexts if args.kl_estimator == "exact" else [ESTIMATES[args.kl_estimator](x) for x in log_u]
    per_response = torch.stack([each.sum() for each in contexts])
    kls = torch.cat([dense_kl(p, q) for p, q in zip(old, new, strict=True)])
    ratios = torch.cat([q[i, r] - p for q, i, r, p in zip(new, at, responses, old_logp, strict=True)]).exp()
    advantages, explained, share, spread = advantages_by_hand(t, prompts, responses, states, estimates, width)
    out = {
        "score": scores[~scores.isnan()].mean(),
        "length": sum(map(len, responses)) / rows,
        "eos_rate": sum(int(r[-1]) == EOS for r in responses) / rows,
        "entropy": torch.cat([-(p.exp() * p).sum(-1) for p in old]).mean(),
        "anchor/kl": torch.stack([each.sum() for each in estimates]).mean(),
        "anchor/kl_exact": per_response.mean(),
        "anchor/kl_stderr": per_response.std() / math.sqrt(rows),
        "anchor/share": share,
        "trust/kl": kls.mean(),
        "trust/kl_max": kls.max(),
        "trust/kl_proposed": torch.cat([dense_kl(p, q) for p, q in zip(old, proposed, strict=True)]).mean(),
        "trust/tv": torch.cat([(p.exp() - q.exp()).abs().sum(-1) / 2 for p, q in zip(old, new, strict=True)]).mean(),
        "trust/max_ratio": ratios.max(),
        "trust/ratio_quantiles/0.25": ratios.log().quantile(0.25).exp(),
        "trust/ratio_quantiles/0.95": ratios.log().quantile(0.95).exp(),
        "trust/epochs": len(t.steps) / args.num_mini_batches,
        "value/explained_variance": explained,
        "sampler/kl": 0.0,
    }
    whole = by_definition(scores, torch.cat(old), torch.cat(new), rollout, horizon=args.response_length)
    out |= {f"trust/certificate/{name}": value for name, value in whole.items() if name != "smallest"}
    return out | steps_by_hand(t, distributions, responses, advantages, old, ref, spread)


def steps_by_hand(
    t: Witness,
    distributions: Callable[..., list[Tensor]],
    responses: list[Tensor],
    advantages: Any,
    old: list[Tensor],
    ref: list[Tensor],
    spread: float,
) -> dict[str, Any]:
    """The share of the gradient that the clip rule removed, and the gradient's norm, of each step at its own weights."""
    args, scores = t.args, t.batch.scored.scores
    at = [torch.arange(len(r)) for r in responses]
    old_logp = [p[i, r] for p, i, r in zip(old, at, responses, strict=True)]
    weights, gated, low, norms = 0.0, 0.0, 0.0, []
    for model, which in t.steps:
        found = distributions(model.policy, which)
        loss, count = 0.0, 0
        for p, i in zip(found, which.tolist(), strict=True):
            if scores[i].isnan():
                continue
            w, a = (p[at[i], responses[i]] - old_logp[i]).exp(), advantages[i]
            leaf = w.detach().requires_grad_()
            ends = torch.tensor([args.low, args.high], dtype=w.dtype)
            slope = torch.autograd.grad(RULES[args.clip_rule](leaf, a, *ends).sum(), leaf)[0]
            removed = torch.where(a == 0, 0.0, (1 - slope / torch.where(a == 0, 1.0, a)).clamp(0, 1))
            weight = leaf.detach() * a.abs()
            weights, gated = weights + weight.sum(), gated + (removed * weight).sum()
            low += (removed * weight)[leaf < 1].sum()
            loss = loss - RULES[args.clip_rule](w, a, *ends).sum() + t.batch.trust_coef * dense_kl(old[i], p).sum()
            if args.anchor_in_loss:
                loss = loss + t.batch.anchor.coef * spread * dense_kl(p, ref[i]).sum()
            count += len(w)
        grads = torch.autograd.grad(loss / count, trainable(model.policy))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    limit = args.max_grad_norm or math.inf
    return {
        "trust/gated": gated / weights,
        "trust/gated_low": low / weights,
        "trust/gated_high": (gated - low) / weights,
        "gradient/norm": sum(norms) / len(norms),
        "gradient/scale": sum(min(1.0, limit / norm) for norm in norms) / len(norms),
    }


def advantages_by_hand(
    t: Witness,
    prompts: list[Tensor],
    responses: list[Tensor],
    states: list[Tensor],
    estimates: list[Tensor],
    width: int,
) -> tuple[list[Tensor], Any, Any, float]:
    """Advantages of each response, the explained variance, the anchor's share, and the factor of whitening."""
    args, scores, coef = t.args, t.batch.scored.scores.double(), t.batch.anchor.coef
    linear = t.old.value.linear
    counted = [i for i in range(len(responses)) if not scores[i].isnan()]
    complete: dict[int, Tensor] = {}
    pull: dict[int, Tensor] = {}
    errors, returns = [], []
    for i in counted:
        length, first = len(responses[i]), len(prompts[i]) - 1
        end = min(length, width - 1) if args.score_position == "after_eos" else length - 1
        steps = max(length, end + 1)
        value = torch.zeros(steps + 1, dtype=torch.float64)
        value[:steps] = (states[i][first : first + steps] @ linear.weight[0] + linear.bias).detach()
        paid = torch.zeros(steps, dtype=torch.float64)
        if args.kl_placement != "loss":
            moved = estimates[i][1:] if args.kl_estimator == "exact" else estimates[i]
            paid[: len(moved)] -= coef * moved
        reward = paid.clone()
        reward[end] += scores[i]
        errors_of = reward + args.gamma * value[1:] - value[:-1]
        decay = args.gamma * args.lam
        total = torch.stack([sum(decay ** (k - s) * errors_of[k] for k in range(s, steps)) for s in range(steps)])
        part = torch.stack([sum(decay ** (k - s) * paid[k] for k in range(s, steps)) for s in range(steps)])
        returns.append(total + value[:-1])
        errors.append(total)
        complete[i], pull[i] = total[:length], part[:length]
    means = [
        torch.stack([p[s] for p in pull.values() if len(p) > s]).mean() for s in range(max(map(len, pull.values())))
    ]
    anchor = torch.cat([p - torch.stack(means[: len(p)]) for p in pull.values()])
    everything = torch.cat([*complete.values()])
    both = anchor.abs().sum() + (everything - anchor).abs().sum()
    share = None if args.kl_placement == "loss" else anchor.abs().sum() / both
    explained = 1 - torch.cat(errors).var() / torch.cat(returns).var()
    mean, spread = everything.mean(), torch.sqrt(everything.var() + 1e-8)
    if not args.whitens_advantages:
        mean, spread = torch.zeros(()), torch.ones(())
    return (
        [(complete[i] - mean) / spread if i in complete else torch.zeros(0) for i in range(len(responses))],
        explained,
        share,
        float(1 / spread),
    )


def some_rewards(prompts: list, completions: list, **_: Any) -> list[float | None]:
    return [None if i % 3 == 1 else s for i, s in enumerate(tiny.good_words(prompts, completions))]


RECORDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "k1, ppo, LoRA": ({"temperature": 0.7, "kl_coef": 0.1}, {}),
    "k3, cispo, full, unwhitened": (
        {"clip_rule": "cispo", "kl_estimator": "k3", "whiten_advantages": False, "learning_rate": 3e-3, "gamma": 0.9},
        {"peft_config": None},
    ),
    "exact, spo, penalty and limit, some rewards": (
        {
            "clip_rule": "spo", "kl_estimator": "exact", "kl_placement": "both", "kl_coef": 0.1, "trust_coef": 0.5,
            "trust_max_kl": 5e-3, "temperature": 1.3, "max_grad_norm": 0.3, "score_position": "eos",
        },
        {"reward_funcs": some_rewards},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED)
def test_every_number_of_a_record_is_what_its_definition_gives(case, tmp_path):
    changes, arguments = RECORDED[case]
    settings = {"learning_rate": 2e-2, "max_steps": 2, "response_length": 7} | changes
    given = {"reward_funcs": tiny.good_words, "peft_config": tiny.lora(), "train_dataset": tiny.prompts()} | arguments
    trainer = Witness(
        args=tiny.config(tmp_path, **settings), model=tiny.llama(), processing_class=tiny.tokenizer(), **given
    )
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 2 and trainer.seen[1].anchor.kl_exact > 1e-3
    assert any(record.trust.gated > 0.01 for record in trainer.seen), (
        "nothing was gated, so that only zeros were compared"
    )
