"""The trust region on TRL's GRPO trainer: a small callback that uses the parts unchanged, and a witness in float64.

The witness builds its own float64 model and uses its complete forward pass: a copy of the trainer's model would share its
`forward`, which TRL wraps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests import tiny
from tests.dense import dense_kl, rollout_logps
from trl_trustkl.policy.exact_kl import token_statistics
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.policy.split_lm import SplitLM
from trl_trustkl.policy.value_head import spread
from trl_trustkl.trust.limits import Limits, TrustRegion
from trl_trustkl.trust.measurement import measure
from trl_trustkl.trust.snapshot import UpdateSnapshot
from trl_trustkl.types import Enforcement, Measurement, MicroBatch, PolicySnapshot, Rollout, TokenOutputs

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 0.02
ROUNDING = 1e-6  # of a KL in float32


def generated(trainer: GRPOTrainer) -> Rollout:
    """The responses that GRPO generated last."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    ids, mask, new, new_mask = (torch.cat([part[name] for part in trainer._buffered_inputs]) for name in names)
    return Rollout(ids, mask.bool(), new, new_mask.bool())


class HoldsTheLimit(TrainerCallback):
    """Keeps every step within `max_kl` of the policy that generated the responses."""

    def __init__(self, trainer: GRPOTrainer, max_kl: float) -> None:
        self.trainer = trainer
        self.region = TrustRegion(Limits(max_kl=max_kl))
        self.split_lm = SplitLM(trainer.model)
        self.buffer: Any = None
        self.found: list[Enforcement] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer._buffered_inputs is not self.buffer:
            self.buffer = self.trainer._buffered_inputs
            self.begin(generated(self.trainer))

    def begin(self, rollout: Rollout) -> None:
        self.snapshot = UpdateSnapshot(trainable(self.trainer.model), [], self.trainer.optimizer)
        self.micros = [micro_batch(rollout, rows) for rows in torch.arange(len(rollout.response_ids)).split(3)]
        self.mask = rollout.response_mask
        head = self.split_lm.frozen_head()
        with torch.no_grad():
            self.old = [PolicySnapshot(self.split_lm.hidden_states(micro), head) for micro in self.micros]
        self.old_logp = torch.zeros(self.mask.shape)
        for micro, old in zip(self.micros, self.old, strict=True):
            self.old_logp[micro.rows, : micro.response_ids.shape[1]] = self.compare(micro, old).logp

    @torch.no_grad()
    def compare(self, micro: MicroBatch, old: PolicySnapshot) -> TokenOutputs:
        hidden, mask = self.split_lm.hidden_states(micro), micro.response_mask
        token = token_statistics(
            hidden, micro.response_ids[mask], self.split_lm.head, vocab_size=self.split_lm.vocab_size,
            temperature=self.trainer.temperature, old=old,
        )  # fmt: skip
        logp, kl, tv = (spread(values, mask) for values in (token.logp, token.old_kl, token.old_tv))
        return TokenOutputs(logp, values=hidden.new_zeros(0), hidden=hidden, old_kl=kl, old_tv=tv)

    def measure(self) -> Measurement:
        return measure(self.compare, self.micros, self.old, self.old_logp, self.mask, gather=lambda rows: rows)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(self.region.enforce(self.snapshot, self.measure, self.measure()))


class Witness(TrainerCallback):
    """What each step proposed, and how far it leaves the model from the policy that generated the responses."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        model = get_peft_model(tiny.llama(), tiny.lora()) if isinstance(trainer.model, PeftModel) else tiny.llama()
        self.model = model.double().requires_grad_(False)
        self.buffer: Any = None
        self.kls: list[float] = []
        self.old: list[list[Tensor]] = []
        self.proposed: list[list[Tensor]] = []
        self.kept: list[list[Tensor]] = []

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in trainable(self.trainer.model)]

    def at(self, weights: list[Tensor]) -> Tensor:
        names = [name for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        own = dict(self.model.named_parameters())
        for name, weight in zip(names, weights, strict=True):
            own[name].copy_(weight)
        return rollout_logps(self.model, generated(self.trainer), self.trainer.temperature)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        new = self.trainer._buffered_inputs is not self.buffer
        self.buffer = self.trainer._buffered_inputs
        self.old.append(self.weights() if new else self.old[-1])

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.proposed.append(self.weights())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.kept.append(self.weights())
        self.kls.append(float(dense_kl(self.at(self.old[-1]), self.at(self.kept[-1])).mean()))


def grpo(folder: Any, *, lora: bool, **changes: Any) -> GRPOTrainer:
    """A GRPO trainer with a learning rate that is far too high."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 5,
        "temperature": 0.8,
        "learning_rate": 0.1 if lora else 0.02,
        "lr_scheduler_type": "constant",
        **tiny.QUIET,
    }
    return GRPOTrainer(
        model=tiny.llama(), reward_funcs=tiny.good_words, args=GRPOConfig(**settings | changes),
        train_dataset=tiny.prompts(), processing_class=tiny.tokenizer(), peft_config=tiny.lora() if lora else None,
    )  # fmt: skip


def trained(folder: Any, max_kl: float | None, **settings: Any) -> tuple[Witness, HoldsTheLimit | None]:
    trainer = grpo(folder, **settings)
    witness, callback = Witness(trainer), None if max_kl is None else HoldsTheLimit(trainer, max_kl)
    trainer.add_callback(witness)  # before the callback, so that it sees what the optimizer proposed
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    assert len(witness.kls) == trainer.args.max_steps
    return witness, callback


CASES = {
    "LoRA": {"lora": True},
    "full": {"lora": False},
    "several steps for a batch": {"lora": True, "num_iterations": 2, "learning_rate": 0.01},
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_of_grpo_stays_within_the_limit(case, tmp_path):
    witness, callback = trained(tmp_path, LIMIT, **CASES[case])
    assert len(callback.found) == len(witness.kls)
    assert sum(found.scale < 1 for found in callback.found) >= 2, "fewer than two steps exceeded the limit"
    for step, (found, dense) in enumerate(zip(callback.found, witness.kls, strict=True)):
        assert found.rejected is None and found.measured.complete
        assert dense <= LIMIT + ROUNDING, f"step {step + 1} is beyond the limit"
        assert found.measured.kl == pytest.approx(dense, rel=1e-3, abs=ROUNDING)
        if found.scale < 1:
            assert dense > 0.5 * LIMIT, "the step was shortened far more than necessary"
        ends = zip(witness.kept[step], witness.old[step], witness.proposed[step], strict=True)
        assert all(torch.equal(kept, torch.lerp(old, new, found.scale)) for kept, old, new in ends)


@pytest.mark.parametrize("case", CASES)
def test_without_the_callback_grpo_exceeds_the_limit(case, tmp_path):
    free, _ = trained(tmp_path / "free", None, **CASES[case])
    assert max(free.kls) > 4 * LIMIT
    _, callback = trained(tmp_path / "held", LIMIT, **CASES[case])
    assert callback.found[0].kl_proposed == pytest.approx(free.kls[0], rel=1e-3, abs=ROUNDING), (
        "the two runs differ in their first step"
    )


def test_before_the_first_step_nothing_has_moved_bit_for_bit(tmp_path):
    seen = []

    class Early(HoldsTheLimit):
        def begin(self, rollout: Rollout) -> None:
            super().begin(rollout)
            seen.append(self.measure())

    trainer = grpo(tmp_path, lora=True, max_steps=2)
    trainer.add_callback(Early(trainer, LIMIT))
    trainer.train()
    assert len(seen) == 2
    assert all(found.kl == found.kl_max == found.tv == 0 and found.max_ratio == 1 for found in seen)
