"""The intended differences from TRL 1.12's PPO trainer: each test shows TRL's behaviour and this package's.

The numbers are those of the table in docs/upstream_defects.md.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from tests import tiny
from tests.stock_ppo import (
    EOS,
    LENGTH,
    MOVED,
    ROWS,
    SCRIPT,
    TOLERANCE,
    UPDATES,
    Script,
    ScriptedTrainer,
    difference,
    fill_adapter,
    left_padding_tokenizer,
    models,
    our_trainer,
    ppo_trainer,
    rows,
    run,
    stock_trainer,
)
from trl_trustkl.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fast_stock_trainer")]


# -- the update --------------------------------------------------------------------------------------------------------


def test_difference_1_max_grad_norm_is_applied(stock, ours):
    start = models()
    settings = {"num_ppo_epochs": 1, "total_episodes": ROWS, "learning_rate": 1.0, "max_grad_norm": 1e-4}
    theirs, mine = stock(start, settings), ours(start, settings)
    assert theirs.moved() > MOVED
    assert 1e-6 < mine.moved() <= 1e-4
    assert mine.logs[0]["gradient/scale"] < 0.1


def count_steps(trainer: Any) -> list[int]:
    """Train; returns the number of optimizer steps of each update."""
    steps, updates = 0, []

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    class EndOfUpdate(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            updates.append(steps - sum(updates))

    trainer.add_callback(EndOfUpdate())
    hook = register_optimizer_step_post_hook(step)
    try:
        trainer.train()
    finally:
        hook.remove()
    return updates


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_difference_2_each_mini_batch_makes_an_optimizer_step(tmp_path, monkeypatch, mini_batches):
    """TRL's steps depend on the end of the dataset, not on mini-batches: one, then one per micro-batch."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": mini_batches}
    settings |= {"num_ppo_epochs": 1, "total_episodes": 16, "learning_rate": 1e-3}
    monkeypatch.setattr(ppo_trainer, "batch_generation", SCRIPT.as_generation())
    assert count_steps(stock_trainer(tmp_path, start, settings, train_dataset=rows(16))) == [1, 4]
    ours = our_trainer(tmp_path, start, settings, train_dataset=rows(16))
    assert count_steps(ours) == [mini_batches, mini_batches]


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_difference_3_statistics_are_means_over_what_was_there(stock, ours, mini_batches):
    """At a learning rate of 0 the ratio is 1. TRL averages over entries that it never fills."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": mini_batches}
    settings |= {"learning_rate": 0.0, "total_episodes": 8}
    theirs, mine = (trainer(start, settings, train_dataset=rows(8)).logs[0] for trainer in (stock, ours))
    assert theirs["val/ratio"] == pytest.approx(1 / mini_batches, rel=1e-3)
    assert mine["val/ratio"] == 1.0
    assert mine["policy/approxkl_avg"] == 0.0


def test_difference_4_statistics_leave_padding_out(stock, ours):
    """The sum of squared log-ratios is divided by the number of tokens. TRL counts the padding too."""
    start = models()
    theirs, mine = stock(start), ours(start)
    for one, other in zip(theirs.logs, mine.logs, strict=True):
        share = other["length"] / LENGTH
        assert share < 0.9
        assert other["policy/approxkl_avg"] * share == pytest.approx(one["policy/approxkl_avg"], rel=1e-3)
        assert 1 + (other["val/ratio"] - 1) * share == pytest.approx(one["val/ratio"], rel=1e-4)


def test_difference_in_accumulation_the_split_into_micro_batches_changes_nothing(stock, ours):
    """A mini-batch's loss is the mean over its tokens. In TRL it is the mean of the means of its micro-batches."""
    start = models()
    one = {"num_ppo_epochs": 1, "total_episodes": ROWS}
    two = one | {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
    np.random.seed(0)
    # Two batches of prompts, because TRL does not accumulate gradients in the last one of the dataset.
    theirs = [stock(start, settings, train_dataset=rows(2 * ROWS)) for settings in (one, two)]
    mine = [ours(start, settings, train_dataset=rows(2 * ROWS)) for settings in (one, two)]
    assert difference(theirs[0].after, theirs[1].after) > TOLERANCE
    assert difference(mine[0].after, mine[1].after) <= 1e-6


def test_difference_5_a_callback_can_stop_the_run(stock, ours):
    class StopAtOnce(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    theirs, mine = (trainer(models(), callbacks=[StopAtOnce()]).logs for trainer in (stock, ours))
    assert [len(theirs), len(mine)] == [UPDATES, 1]


class PadFirst(Script):
    """Every response starts with a sampled padding token."""

    def response(self, prompt: list[int], update: int) -> list[int]:
        return [self.pad, *super().response(prompt, update)[1:]]


def test_difference_10_a_sampled_padding_token_is_a_token(stock, ours):
    """TRL treats the first padding token as the end; a response that starts with one has the length −1."""
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        stock(models(), script=PadFirst(ends=(None,)))
    mine = ours(models(), script=PadFirst(ends=(None,)))
    assert mine.moved() > MOVED
    assert all(weight.isfinite().all() for weight in mine.after.values())
    assert [entry["length"] for entry in mine.logs] == [LENGTH] * UPDATES


def test_difference_11_the_score_can_land_on_the_last_token(stock, ours):
    """This is an option, off by default. If no response ends early, TRL puts the score on the last token too."""
    start, settings = models(), {"score_position": "eos"}
    assert difference(stock(start).after, ours(start, settings).after) > TOLERANCE
    full = Script(ends=(None, LENGTH))
    assert difference(stock(start, script=full).after, ours(start, settings, script=full).after) <= TOLERANCE


def test_difference_12_the_missing_eos_penalty_looks_for_the_stop_token(stock, ours):
    """Every response ends with the stop token, which is not the tokenizer's eos token. TRL penalizes all of them."""
    settings = {"stop_token": None, "stop_token_id": 5, "total_episodes": ROWS}
    script = Script(ends=(3,), stop=5)
    for trainer, expected in ((stock, 10.0), (ours, 0.0)):
        scores = [
            trainer(models(), settings | {"missing_eos_penalty": penalty}, script=script).logs[0]["objective/scores"]
            for penalty in (None, 10.0)
        ]
        assert scores[0] - scores[1] == pytest.approx(expected, abs=1e-4)


def test_difference_21_one_seed_gives_one_run(stock, ours):
    """TRL shuffles mini-batches with NumPy's global state, which it does not seed."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "total_episodes": ROWS}
    ends = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        ends[name] = []
        for seed in (1, 2):
            np.random.seed(seed)
            random.seed(seed)
            torch.manual_seed(seed)
            ends[name].append(trainer(start, settings).after)
    assert difference(*ends["stock"]) > TOLERANCE
    assert difference(*ends["ours"]) == 0.0


# -- sampling ----------------------------------------------------------------------------------------------------------

AT_REST = {"learning_rate": 0.0, "total_episodes": ROWS, "num_ppo_epochs": 1, "temperature": 1.0}
"""With a learning rate of 0 the policy does not change, so that every divergence must be 0."""


def test_difference_6_processed_scores_are_not_the_policy(tmp_path):
    start = models()
    start.policy.generation_config.repetition_penalty = 1.3
    theirs = run(stock_trainer(tmp_path, start, AT_REST)).logs[0]
    assert theirs["policy/approxkl_avg"] > 1e-3
    assert abs(theirs["objective/kl"]) > 1e-2
    mine = run(our_trainer(tmp_path, start, AT_REST)).logs[0]
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0
    assert mine["sampler/kl"] < 1e-6


def test_difference_6_requesting_processed_scores_affects_only_the_sampler(tmp_path):
    settings = AT_REST | {"generation_kwargs": {"repetition_penalty": 1.3}}
    mine = run(our_trainer(tmp_path, models(), settings)).logs[0]
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0
    assert mine["sampler/kl"] > 1e-3


def test_difference_7_the_ratio_is_1_in_mixed_precision_too(tmp_path, monkeypatch):
    """TRL generates, and computes the old log-probabilities, outside the autocast wrapper."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = stock_trainer(tmp_path, models(), AT_REST)
    assert trainer.accelerator.mixed_precision == "bf16"
    theirs = run(trainer).logs[0]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    mine = run(our_trainer(tmp_path, models(), AT_REST | {"bf16": True})).logs[0]
    our_trainer(tmp_path, models())  # resets the accelerator's global state for other tests
    assert theirs["policy/approxkl_avg"] > 1e-7
    assert mine["val/ratio"] == 1.0
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0


def test_difference_8_bf16_reaches_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    # The accelerator's state is global: read it before the next trainer is made, and reset it for other tests.
    precision = [
        make(tmp_path, models(), {"bf16": True}).accelerator.mixed_precision for make in (stock_trainer, our_trainer)
    ]
    our_trainer(tmp_path, models())
    assert precision == ["no", "bf16"]


def test_difference_9_the_terminal_eos_is_trained_where_it_is_the_padding_too(stock, ours, monkeypatch):
    """Every response has three tokens including eos, which a mask derived from the padding token's id leaves out."""
    trained: dict[str, list[int]] = {"stock": [], "ours": []}
    whiten, advantages = ppo_trainer.masked_whiten, ScriptedTrainer.advantages

    def counting_whiten(values, mask, **kwargs):
        trained["stock"].append(int(mask.sum()))
        return whiten(values, mask, **kwargs)

    def counting_advantages(self, scored):
        trained["ours"].append(int(scored.loss_mask.sum()))
        return advantages(self, scored)

    monkeypatch.setattr(ppo_trainer, "masked_whiten", counting_whiten)
    monkeypatch.setattr(ScriptedTrainer, "advantages", counting_advantages)
    for trainer in (stock, ours):
        tokenizer = left_padding_tokenizer(pad=False)
        tokenizer.pad_token = tokenizer.eos_token
        script = Script(ends=(3,), pad=EOS)
        trainer(models(), {"total_episodes": ROWS}, script=script, processing_class=tokenizer)
    assert trained == {"stock": [2 * ROWS], "ours": [3 * ROWS]}


def test_difference_9_an_eos_inside_a_prompt_is_read_where_it_is_the_padding_too(stock, ours):
    """An eos token inside a prompt is one of its tokens. TRL masks it out."""
    seen: dict[str, list[Tensor]] = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        tokenizer = left_padding_tokenizer(pad=False)
        tokenizer.pad_token = tokenizer.eos_token
        start = models()
        seen[name] = []
        start.policy.model.register_forward_pre_hook(
            lambda _, args, kwargs, to=seen[name]: to.append((kwargs["input_ids"], kwargs["attention_mask"])),
            with_kwargs=True,
        )
        dataset = Dataset.from_dict({"input_ids": [[8 + i, EOS, 9] for i in range(ROWS)]})
        trainer(start, AT_REST, script=Script(ends=(None,)), processing_class=tokenizer, train_dataset=dataset)
    for name, read in (("stock", False), ("ours", True)):
        ids, mask = seen[name][-1]
        assert ((ids[:, 1] == EOS) & (mask[:, 1] == 1)).all() == read


@pytest.mark.parametrize("stop_token", [None, "eos"])
def test_difference_13_the_models_generation_config_stays_as_it_was(tmp_path, stop_token):
    start = models()
    theirs, mine = (
        make(tmp_path, start, AT_REST | {"stop_token": stop_token}) for make in (stock_trainer, our_trainer)
    )
    for trainer in (theirs, mine):
        trainer.train()
    assert theirs.model.policy.generation_config.eos_token_id == (EOS if stop_token else None)
    assert mine.model.policy.generation_config.to_dict() == start.policy.generation_config.to_dict()


# -- models and data ---------------------------------------------------------------------------------------------------


def test_difference_15_gradient_checkpointing_is_switched_on(tmp_path):
    found = [make(tmp_path, models(), {"gradient_checkpointing": True}) for make in (stock_trainer, our_trainer)]
    assert [trainer.model.policy.is_gradient_checkpointing for trainer in found] == [False, True]


def test_difference_16_no_pass_keeps_all_hidden_states(stock, ours):
    asked: dict[str, set] = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        start = models()
        asked[name] = set()
        for model in (start.policy.model, start.value.model):  # copies keep their hooks
            model.register_forward_pre_hook(
                lambda _, args, kwargs, to=asked[name]: to.add(bool(kwargs.get("output_hidden_states"))),
                with_kwargs=True,
            )
        trainer(start, {"total_episodes": ROWS})
    assert asked == {"stock": {True}, "ours": {False}}


def test_difference_18_a_model_with_an_adapter_starts_at_its_own_reference(stock, ours):
    """The reference is the model as it was given. In TRL it is the model without the adapter."""
    start = models()
    adapted = get_peft_model(copy.deepcopy(start.policy), tiny.lora())
    fill_adapter(adapted)
    theirs, mine = (trainer(start._replace(policy=adapted)) for trainer in (stock, ours))
    assert theirs.before.keys() == mine.before.keys()  # the copy of the adapter that is the reference is not trained
    assert abs(theirs.logs[0]["objective/kl"]) > 0.1
    assert mine.logs[0]["objective/kl"] == 0.0
    assert mine.logs[0]["anchor/kl_exact"] == 0.0
    assert mine.logs[-1]["anchor/kl_exact"] > 0.0


def test_difference_22_a_dataset_shorter_than_a_batch_is_an_error(tmp_path):
    """TRL's data loader then has no batch, and its loop never ends."""
    theirs = stock_trainer(tmp_path, models(), train_dataset=rows(ROWS - 1))
    assert len(theirs.dataloader) == 0
    with pytest.raises(DataError, match=f"`train_dataset` has {ROWS - 1} rows, fewer than one batch of {ROWS}"):
        our_trainer(tmp_path, models(), train_dataset=rows(ROWS - 1))
