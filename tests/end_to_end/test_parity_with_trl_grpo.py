"""The policy's gradients equal those of TRL's GRPO and RLOO trainers on the same samples, up to the factor that the table of
docs/migrating.md names.

Both trainers get the same model, the same responses and the same rewards. Both score them under the same π_old; then the
weights are moved, so that the ratios are not 1, and the gradients of TRL's loss and of ours are compared there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.trl_trainers import trainer_of
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.types import Batch, Prompts, Rollout

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, LENGTH = 4, 6
PROMPTS = [1, 3]
"""Rows of the dataset: prompts of two and of four tokens."""
LENGTHS = [6, 2, 4, 1, 5, 6, 3, 2]
REWARDS = [1.0, 2.5, -1.0, 0.25, 3.0, 3.5, 0.0, 7.0]
EQUAL_AND_MISSING = [1.0, None, -1.0, 0.25, 2.0, 2.0, None, 2.0]
TOLERANCE = 1e-5
MOVED = 0.05


def responses() -> list[list[int]]:
    """Forced responses; those that are shorter than LENGTH end with the end of the sequence."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, tiny.VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    return [row if len(row) == LENGTH else [*row[:-1], tiny.EOS] for row in rows]


def rewards_of(given: list[float | None]) -> Callable[..., list[float | None]]:
    def reward(prompts: list, completions: list, **_: Any) -> list[float | None]:
        return given

    return reward


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by a name that does not depend on who wrapped them."""
    return {
        name[name.index("layers.") :].replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def move(model: nn.Module, moved: float) -> None:
    """Set the adapter of any trainer's model to the same policy π_old, `moved` in the same direction."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapter(model).items()):
            old, direction = torch.randn((2, *parameter.shape), generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.2 * old + moved * direction)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(adapter(model).items()) if p.grad is not None])


def trls(folder: Any, kind: str, rewards: list[float | None], moved: float, changes: dict[str, Any]) -> Tensor:
    """The gradient of TRL's loss."""
    settings = {
        "per_device_train_batch_size": len(LENGTHS), "gradient_accumulation_steps": 1, "num_generations": SIZE,
        "max_completion_length": LENGTH, "beta": 0.0, "num_iterations": 2,
    } | changes  # fmt: skip
    trainer = trainer_of(kind, folder / "trl", reward_funcs=rewards_of(rewards), **settings)
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[row] for row in PROMPTS for _ in range(SIZE)]
    given = responses()
    trainer._generate_single_turn = lambda *_, **__: (given, None) if kind == "grpo" else given
    move(trainer.model, 0.0)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(rows)
    move(trainer.model, moved)
    trainer.compute_loss(trainer.model, inputs).backward()
    return gradients(trainer.model)


class Forced(TrustKLPPOTrainer):
    """A trainer whose responses are given."""

    def rollout(self, prompts: Prompts) -> Rollout:
        rows = [row + [tiny.PAD] * (LENGTH - len(row)) for row in responses()]
        mask = torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
        return Rollout(prompts.ids, prompts.mask, torch.tensor(rows), mask, None, prompts.rows)


class KeepsGradient(torch.optim.SGD):
    """Keeps the gradient instead of making a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(list(adapter(model).values()), lr=0.0)
        self.model = model

    def step(self, closure: Any = None) -> None:
        self.kept = gradients(self.model)


class InOrder:
    batches_per_pass = 1

    def rows(self, update: int) -> list[int]:
        return [row for row in PROMPTS for _ in range(SIZE)]


def ours(
    folder: Any, kind: str, rewards: list[float | None], moved: float, changes: dict[str, Any]
) -> tuple[Tensor, Batch]:
    """The gradient of this package's loss, and its batch."""
    settings = {
        "per_device_train_batch_size": len(LENGTHS) // 2, "gradient_accumulation_steps": 2, "num_mini_batches": 1,
        "num_ppo_epochs": 1, "max_grad_norm": None, "response_length": LENGTH, "kl_coef": 0.0,
        "advantage_estimator": kind, "num_generations": SIZE,
    } | changes  # fmt: skip
    trainer = tiny.trainer(folder / "ours", kind=Forced, changes=settings, reward_funcs=rewards_of(rewards))
    trainer.parts.order = InOrder()
    trainer.parts.scoring._checked_start = True  # π_old is not the reference
    trainer._loop.begin()
    move(trainer.model.policy, 0.0)
    batch = trainer.advantages(trainer.score(trainer.rollout(trainer.next_prompts())))
    move(trainer.model.policy, moved)
    optimizer = KeepsGradient(trainer.model.policy)
    trainer.parts.optimisation.prepare(trainer.model, optimizer)
    trainer.parts.optimisation.run(batch, torch.Generator(), None)
    return optimizer.kept, batch


def difference(theirs: Tensor, mine: Tensor) -> float:
    """The largest difference relative to the largest number."""
    return float((theirs - mine).abs().max() / theirs.abs().max())


GRPO: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "loss_type=grpo": ({"loss_type": "grpo"}, {"loss_aggregation": "sequence_mean"}, 1),
    "loss_type=bnpo": ({"loss_type": "bnpo"}, {}, 1),
    "loss_type=dapo": ({"loss_type": "dapo"}, {}, 1),
    "loss_type=dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_aggregation": "sequence_sum"}, 1),
    "loss_type=cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"clip_rule": "cispo", "cliprange": 1 - 1e-9, "cliprange_high": 0.1},
        1,
    ),
    "loss_type=sapo": ({"loss_type": "sapo"}, {"clip_rule": "sapo", "loss_aggregation": "sequence_mean"}, 1),
    "loss_type=luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02},
        {"clip_rule": "gspo", "loss_aggregation": "sequence_sum", "cliprange": 0.02},
        LENGTH,
    ),
    "importance_sampling_level=sequence": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02},
        {"clip_rule": "gspo", "cliprange": 0.02},
        1,
    ),
    "epsilon, epsilon_high": ({"epsilon": 0.05, "epsilon_high": 0.1}, {"cliprange": 0.05, "cliprange_high": 0.1}, 1),
    "delta": ({"delta": 1.2, "epsilon": 0.1}, {"clip_rule": "dual", "clip_kwargs": {"c": 1.2}, "cliprange": 0.1}, 1),
    "scale_rewards=batch": ({"scale_rewards": "batch"}, {"scale_rewards": "batch"}, 1),
    "scale_rewards=none": ({"scale_rewards": "none"}, {"scale_rewards": "none"}, 1),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}, 1),
}
"""TRL's options, ours, and TRL's gradient as a multiple of ours. TRL's default of `loss_type` is dapo."""
IN_THE_LOSS = {"kl_coef": 0.3, "kl_estimator": "k3", "kl_placement": "loss"}
for name in ("grpo", "bnpo", "dapo", "dr_grpo"):
    theirs, mine, factor = GRPO[f"loss_type={name}"]
    GRPO[f"loss_type={name}, beta"] = (
        theirs | {"beta": 0.3, "use_bias_correction_kl": False},
        mine | IN_THE_LOSS,
        factor,
    )

RLOO: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "default": ({}, {}, LENGTH),
    "beta": ({"beta": 0.3}, {"kl_coef": 0.3}, LENGTH),
    "normalize_advantages": ({"normalize_advantages": True}, {"whiten_advantages": True}, LENGTH),
    "normalize_advantages, beta": (
        {"normalize_advantages": True, "beta": 0.3},
        {"whiten_advantages": True, "kl_coef": 0.3},
        LENGTH,
    ),
}


def compared(
    folder: Any, kind: str, case: Any, rewards: list[float | None], moved: float
) -> tuple[Tensor, Tensor, Batch]:
    theirs, mine, factor = case
    if kind == "rloo":
        mine = {"loss_aggregation": "sequence_sum"} | mine
    found, batch = ours(folder, kind, rewards, moved, mine)
    return trls(folder, kind, rewards, moved, theirs), factor * found, batch


@pytest.mark.parametrize("option", GRPO)
def test_gradients_equal_those_of_trls_grpo(tmp_path, option):
    theirs, mine, _ = compared(tmp_path, "grpo", GRPO[option], REWARDS, MOVED)
    gap = difference(theirs, mine)
    print(f"\nGRPO {option}: {gap:.1e}")
    assert theirs.abs().max() > 1e-3 and gap <= TOLERANCE


@pytest.mark.parametrize("option", RLOO)
def test_gradients_equal_those_of_trls_rloo(tmp_path, option):
    """Its ratio is that of the entire response, which no rule here has, so that the gradients are compared at a ratio of 1."""
    theirs, mine, _ = compared(tmp_path, "rloo", RLOO[option], REWARDS, 0.0)
    gap = difference(theirs, mine)
    print(f"\nRLOO {option}: {gap:.1e}")
    assert theirs.abs().max() > 1e-3 and gap <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "option"),
    [("grpo", name) for name in ("loss_type=grpo", "loss_type=dapo", "loss_type=dr_grpo", "scale_rewards=batch")]
    + [("rloo", name) for name in RLOO],
)
def test_responses_without_a_reward_change_only_the_factor(tmp_path, kind, option):
    """TRL counts them in the mean of the loss, with an advantage of 0; here they are left out."""
    case = (GRPO if kind == "grpo" else RLOO)[option]
    theirs, mine, batch = compared(tmp_path, kind, case, EQUAL_AND_MISSING, MOVED if kind == "grpo" else 0.0)
    mask, every = batch.scored.loss_mask, batch.scored.rollout.response_mask
    by_tokens = option in ("loss_type=dapo", "scale_rewards=batch")
    counted = mask.sum() / every.sum() if by_tokens else mask.any(1).sum() / len(mask)
    assert difference(theirs, float(counted) * mine) <= TOLERANCE and counted < 1
    assert batch.groups is not None and batch.groups.without_signal == (0 if "beta" in option else 1)


@pytest.mark.parametrize(
    ("kind", "option", "off"),
    [
        ("grpo", "loss_type=grpo", {"loss_aggregation": "token_mean"}),
        ("grpo", "loss_type=dr_grpo", {"loss_aggregation": "sequence_mean"}),
        ("grpo", "scale_rewards=batch", {"scale_rewards": "group"}),
        ("grpo", "epsilon, epsilon_high", {"cliprange": 0.3}),
        ("grpo", "epsilon, epsilon_high", {"cliprange_high": 1e6}),
        ("grpo", "delta", {"clip_kwargs": {"c": 3.0}}),
        ("grpo", "importance_sampling_level=sequence", {"clip_rule": "ppo"}),
        ("grpo", "loss_type=dapo, beta", {"kl_coef": 0.301}),
        ("grpo", "loss_type=dapo, beta", {"kl_estimator": "k2"}),
        ("grpo", "temperature", {"temperature": 0.71}),
        ("rloo", "default", {"advantage_estimator": "grpo", "scale_rewards": "none"}),
        ("rloo", "beta", {"kl_coef": 0.301}),
        ("rloo", "beta", {"kl_estimator": "k3"}),
        ("rloo", "normalize_advantages", {"whiten_advantages": False}),
    ],
    ids=str,
)
def test_parity_can_fail(tmp_path, kind, option, off):
    """A setting that is off exceeds the tolerance; the same error in the code would too."""
    theirs, mine, factor = (GRPO if kind == "grpo" else RLOO)[option]
    moved = MOVED if kind == "grpo" else 0.0
    wanted, found, _ = compared(tmp_path, kind, (theirs, mine | off, factor), REWARDS, moved)
    assert difference(wanted, found) > 10 * TOLERANCE
