"""Expected gradients of an update without sampling error, by enumeration, and the same by autograd.

The policy is a table of logits. Its probabilities are multiples of 1/6, so that 6^T equally likely responses contain every
response in proportion to its probability. The gradient of one update on all of them is therefore the expected gradient. The
advantages come from `ppo.shaping` and the gradient from `Optimisation.run`, up to the optimizer's step, in float64.

p = π, q = π_ref, u = q/p at a token; τ is the temperature; γ = λ = 1 throughout. Context 0 is the empty response; token v
leads from context c to context c·V + 1 + v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn

from tests import formulas, tiny
from trl_trustkl.advantages import value_positions
from trl_trustkl.divergences import KLEstimatorName, Placement, gradient_kind
from trl_trustkl.errors import ConfigError
from trl_trustkl.importance import importance_weights
from trl_trustkl.parallel.processes import Processes
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.policy.reference import Reference
from trl_trustkl.policy.value_head import PolicyAndValue
from trl_trustkl.ppo.optimise import Optimisation
from trl_trustkl.ppo.shaping import shaped
from trl_trustkl.types import Batch, PolicySnapshot, Rollout, Scored

V, T = 3, 3
TEMPERATURE = 0.7
COEF = 0.3
EXACTLY = 1e-10
CLEARLY = 1e-3
PLACEMENTS = get_args(Placement)


OPTIONS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in get_args(KLEstimatorName)),
    ("alpha", {"order": 2.0}),
]


NAMES = ["-".join([name, *map(str, options.values())]) for name, options in OPTIONS]
OF_THE_KL = ("k1", "k2", "k3", "exact")
every_estimator = pytest.mark.parametrize("name, options", OPTIONS, ids=NAMES)
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
fixed_and_own_length = pytest.mark.parametrize("stops", [False, True], ids=["length T", "ends on token 0"])


# -- Policies and their populations --------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Logits [contexts, V] of policy and reference. Responses have `length` tokens; with `stops` they end at token 0."""

    policy: Tensor
    ref: Tensor
    length: int = T
    stops: bool = False


def tables(seed: int = 0, length: int = T, stops: bool = False) -> Tables:
    """A policy with the probabilities 1/6, 2/6, 3/6 or 1/6, 1/6, 4/6 in each context, and a random reference."""
    generator = torch.Generator().manual_seed(seed)
    contexts = (V**length - 1) // (V - 1)
    sixths = torch.tensor([[3, 2, 1], [4, 1, 1]])[torch.randint(2, (contexts,), generator=generator)]
    order = torch.rand(contexts, V, generator=generator).argsort(-1)
    policy = sixths.gather(-1, order).double().div(6).log() * TEMPERATURE
    return Tables(policy, torch.randn(contexts, V, generator=generator, dtype=torch.float64), length, stops)


def population(world: Tables) -> Tensor:
    """The policy's responses [6^T, T], each in proportion to its probability."""
    sixths = (6 * (world.policy / TEMPERATURE).softmax(-1)).round().long()
    tokens = [torch.arange(sixths.shape[1]).repeat_interleave(row).tolist() for row in sixths]
    rows = []
    for picks in itertools.product(range(6), repeat=world.length):
        context, row = 0, []
        for pick in picks:
            row.append(tokens[context % len(tokens)][pick])
            context = context * sixths.shape[1] + 1 + row[-1]
        rows.append(row)
    return torch.tensor(rows)


def response_mask(rows: Tensor, stops: bool) -> Tensor:
    """True up to and including the first token 0 if `stops`, else True everywhere."""
    before = (rows == 0).long().cumsum(1) - (rows == 0).long()
    return (before == 0) | torch.tensor(not stops)


def contexts_of(rows: Tensor, vocab: int = V) -> Tensor:
    """The context before each token and the one after the last token: [n, T + 1]."""
    columns = [torch.zeros_like(rows[:, 0])]
    for column in rows.T:
        columns.append(columns[-1] * vocab + 1 + column)
    return torch.stack(columns, 1)


class TablePolicy(nn.Module):
    """A causal language model whose logits are rows of a table, after a prompt of one token."""

    base_model_prefix = "backbone"  # it has no backbone: its logits take the place of the hidden states

    class Config:
        def __init__(self, vocab: int) -> None:
            self.vocab_size = self.hidden_size = vocab

        def get_text_config(self) -> TablePolicy.Config:
            return self

    class Output(NamedTuple):
        logits: Tensor
        hidden_states: tuple[Tensor, ...]

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        self.config = self.Config(logits.shape[1])

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def forward(self, input_ids: Tensor, use_cache: bool = False, output_hidden_states: bool = False) -> Output:
        context = contexts_of(input_ids[:, 1:], self.config.vocab_size).clamp(max=len(self.table) - 1)
        return self.Output(self.table[context], (self.table[context].detach(),))


# -- One update through the trainer's phases -----------------------------------------------------------------------------


class OneProcess:
    """The part of an accelerator that the phases use."""

    device = torch.device("cpu")
    process_index = 0
    num_processes = 1
    is_main_process = True
    scaler = None
    optimizer_step_was_skipped = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class KeepGradient:
    """An optimizer whose step leaves the parameter unchanged and keeps its gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.gradient = torch.zeros_like(parameter)

    def step(self) -> None:
        if self.parameter.grad is not None:
            self.gradient = self.parameter.grad.clone()

    def zero_grad(self) -> None:
        self.parameter.grad = None


def configuration(folder: Path, name: str = "exact", placement: str = "both", **changes: Any) -> Any:
    """A configuration of one exact step: no whitening, no discount, no gradient clipping, no value loss."""
    settings = {
        "kl_coef": COEF,
        "kl_estimator": name,
        "kl_placement": placement,
        "gamma": 1.0,
        "lam": 1.0,
        "whiten_advantages": False,
        "temperature": TEMPERATURE,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "max_grad_norm": None,
        "vf_coef": 0.0,
    } | changes
    if gradient_kind(name, placement) == "zero" and settings["kl_coef"]:
        # The configuration rejects an anchor whose expected gradient is zero; the tests show that it is zero.
        with pytest.raises(ConfigError, match="the expected gradient of that term is zero"):
            tiny.config(folder, **settings)
        args = tiny.config(folder, **settings | {"kl_estimator": "k3"})
        args.kl_estimator = name
        return args
    return tiny.config(folder, **settings)


class Update(NamedTuple):
    """The gradient of the loss per response [contexts, V], and the batch that the loss was computed from."""

    gradient: Tensor
    batch: Batch


def update(
    args: Any,
    world: Tables,
    rows: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    baseline: bool = True,
    moved_to: Tensor | None = None,
    sampler: Tensor | None = None,
) -> Update:
    """One step on `rows`, responses of the policy in `world`; None: the population.

    The step is taken at that policy, or at the logits `moved_to`. `baseline`: whether the values are other than 0; they depend
    on the context only, which changes no expected gradient. `sampler`: the logits of another policy, of which the rows are
    responses; the loss is then corrected as `args` say.
    """
    rows = population(world) if rows is None else rows
    scores = torch.zeros(len(rows), dtype=torch.float64) if scores is None else scores
    sampled = response_mask(rows, world.stops)
    mask = sampled & ~scores.isnan()[:, None]
    model = PolicyAndValue(TablePolicy(world.policy), None, temperature=args.temperature)
    reference = Reference(model.policy, model.split_lm, TablePolicy(world.ref), None)
    rollout = Rollout(torch.zeros_like(rows[:, :1]), torch.ones_like(sampled[:, :1]), rows, sampled)
    micros = [micro_batch(rollout, part) for part in torch.arange(len(rows)).split(72)]
    ref_snapshots = [reference.snapshot(micro) for micro in micros]
    columns = {name: torch.zeros(rows.shape, dtype=torch.float64) for name in ("logp", "ref_logp", "ref_kl", "entropy")}
    old_snapshots = []
    for micro, snapshot in zip(micros, ref_snapshots, strict=True):
        with torch.no_grad():
            out = model(micro, entropy=True, ref=snapshot)
        old_snapshots.append(PolicySnapshot(out.hidden, model.split_lm.frozen_head()))
        for name, column in columns.items():
            column[micro.rows, : micro.response_ids.shape[1]] = getattr(out, name)
    values = 0.1 * contexts_of(rows, world.policy.shape[1])[:, :-1].double().cos() * baseline
    value_mask = value_positions(mask, args.score_position)
    scored = Scored(
        rollout=rollout,
        micro_batches=micros,
        old_snapshots=old_snapshots,
        ref_snapshots=ref_snapshots,
        values=torch.where(value_mask, values, 0.0),
        loss_mask=mask,
        value_mask=value_mask,
        scores=scores,
        completions=[],
        rewards={},
        sampler_weights=None if sampler is None else weights_of(args, sampler, rows, sampled, columns["logp"]),
        **columns,
    )
    processes = Processes(OneProcess())
    batch = shaped(scored, args, processes, kl_coef=args.kl_coef, trust_coef=args.trust_coef)
    table = model.policy.table
    if moved_to is not None:
        with torch.no_grad():
            table.copy_(moved_to)
    optimizer, optimisation = KeepGradient(table), Optimisation(args, model, OneProcess(), processes)
    optimisation.prepare(model, optimizer)
    optimisation.run(batch, torch.Generator(), None)
    # The loss is a mean over the tokens that count; the enumerated divergences are per response.
    return Update(optimizer.gradient * (mask.sum().item() / mask.any(1).sum().item()), batch)


def sampled_logps(logits: Tensor, rows: Tensor) -> Tensor:
    """log p of each token of the rows under a table of logits, [n, T]."""
    logp = (logits / TEMPERATURE).log_softmax(-1)
    return logp[contexts_of(rows, logits.shape[1])[:, :-1]].gather(-1, rows[..., None]).squeeze(-1)


def weights_of(args: Any, sampler: Tensor, rows: Tensor, mask: Tensor, old_logp: Tensor) -> Tensor:
    """The importance weights by the fields of `args`."""
    bounds = {"low": args.vllm_importance_sampling_clip_min, "high": args.vllm_importance_sampling_clip_max}
    mode = args.vllm_importance_sampling_mode
    return importance_weights(old_logp, sampled_logps(sampler, rows), mask, mode, **bounds).weights


def anchor_gradient(args: Any, world: Tables, **arguments: Any) -> Tensor:
    """The expected gradient of only the anchor, at a coefficient of 1."""
    return update(args, world, **arguments).gradient / COEF


# -- The same by autograd on the enumerated tree -------------------------------------------------------------------------


Cost = Callable[[Tensor, Tensor], Tensor]


def definition(name: str) -> Cost:
    """One sample of a divergence by its definition, from log p and log q; "alpha-2.0" is alpha with the order 2."""
    name, _, order = name.partition("-")
    return lambda p, q: formulas.sample(name, q - p, float(order or 0.5))


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


class Tree:
    """Divergences of the policy, summed over its contexts weighted by the probability of reaching them, and their gradients."""

    def __init__(self, world: Tables) -> None:
        self.theta = world.policy.clone().requires_grad_()
        self.logp = (self.theta / TEMPERATURE).log_softmax(-1)
        self.logq = (world.ref / TEMPERATURE).log_softmax(-1)
        reach = [torch.ones((), dtype=torch.float64)]
        for child in range(1, len(self.theta)):
            parent, token = divmod(child - 1, self.theta.shape[1])
            ended = world.stops and token == 0
            reach.append(reach[parent] * (0.0 if ended else self.logp[parent, token].exp()))
        self.reach = torch.stack(reach)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]

    def total(self, of_context: Tensor) -> Tensor:
        """∇ of the sum over contexts, through the probabilities of reaching them too."""
        return self.gradient((self.reach * of_context).sum())

    def present(self, of_context: Tensor) -> Tensor:
        """∇ of the same with the probabilities of the contexts held fixed: the effect on the divergence of the same context."""
        return self.gradient((self.reach.detach() * of_context).sum())

    def expected(self, cost: Cost) -> Tensor:
        """E_p[cost] in every context."""
        return (self.logp.exp() * cost(self.logp, self.logq)).sum(-1)

    def pathwise(self, cost: Cost) -> Tensor:
        """The same with the distribution held fixed, so that its gradient is E_p[∇cost]."""
        return (self.logp.detach().exp() * cost(self.logp, self.logq)).sum(-1)

    def own_divergence(self, name: str) -> Tensor:
        """∇ of the divergence that `gradient_kind` refers to."""
        kl_of_contexts = self.expected(definition("k1"))
        return self.total(kl_of_contexts if name in OF_THE_KL else self.expected(definition(name)))

    def terms(self, name: str) -> dict[str, Tensor]:
        """The theoretical gradient of each placement: E[∇k] in the loss, E[k·∇log p] in the reward, and their sum."""
        if name == "exact":
            loss, both = self.present(kl(self.logp, self.logq)), self.total(kl(self.logp, self.logq))
        else:
            loss, both = self.present(self.pathwise(definition(name))), self.total(self.expected(definition(name)))
        return {"loss": loss, "reward": both - loss, "both": both}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACTLY)


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def some_scores(rows: Tensor) -> Tensor:
    """A score that depends on every token of the response up to its end."""
    return 1.0 + contexts_of(rows * response_mask(rows, True))[:, -1].double().sin()
