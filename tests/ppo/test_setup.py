"""The sizes of batches, checks of trackers and evaluation, and warnings of unused fields, the anchor and the sampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.messages import assert_says
from trl_trustkl.errors import ConfigError
from trl_trustkl.ppo import setup

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("changes", "processes", "sizes"),
    [
        ({"max_steps": 3}, 1, (8, 8, 3)),
        ({"max_steps": 3}, 2, (8, 16, 3)),
        ({"max_steps": -1, "total_episodes": 33}, 1, (8, 8, 5)),
        ({"max_steps": -1, "total_episodes": 33}, 4, (8, 32, 2)),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 1, (8, 8, 7)),  # 2.5 × 21 rows are 53 episodes
    ],
)
def test_the_sizes_of_batches_follow_from_rows_and_processes(tmp_path, changes, processes, sizes):
    args = tiny.config(tmp_path, **changes)
    assert setup.set_batch_sizes(args, rows=21, processes=processes)[:3] == sizes
    assert (args.local_batch_size, args.batch_size, args.num_total_batches) == sizes
    assert (args.world_size, args.micro_batch_size) == (processes, 4 * processes)
    assert (args.local_mini_batch_size, args.mini_batch_size) == (4, 4 * processes)


def test_a_size_that_is_replaced_is_named(tmp_path, caplog):
    args = tiny.config(tmp_path, batch_size=128, mini_batch_size=4, local_batch_size=8)
    setup.set_batch_sizes(args, rows=21, processes=1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "`batch_size` got 128 and is replaced by 8, which is computed from per_device_train_batch_size × "
        "gradient_accumulation_steps × processes; set those instead."
    )
    caplog.clear()
    setup.set_batch_sizes(args, rows=21, processes=1)
    assert not caplog.records, "a configuration that was used before was warned about"


def test_sizes_of_a_batch_that_no_dataset_fills_are_found_at_once(tmp_path):
    args = tiny.config(
        tmp_path, per_device_train_batch_size=2**61 - 1, gradient_accumulation_steps=2, num_mini_batches=2
    )
    assert setup.set_batch_sizes(args, rows=21, processes=1).batch == 2 * (2**61 - 1)
    args = tiny.config(
        tmp_path, per_device_train_batch_size=2**61 - 1, gradient_accumulation_steps=1, num_mini_batches=1
    )
    assert setup.set_batch_sizes(args, rows=21, processes=1).micro_batch == 1, "2**61 - 1 is a prime"


@pytest.mark.parametrize(
    ("changes", "evaluation", "pieces"),
    [
        ({"report_to": "tensorbord"}, None, ("`report_to`", "'tensorbord'", "'tensorboard'", "'none'", "Did you mean")),
        ({"report_to": ["tensorboard", None]}, None, ("`report_to`", "None")),
        ({"report_to": ["comet_ml"]}, None, ("`report_to`", "'comet_ml'", "Install comet_ml")),
        ({"eval_strategy": "epoch"}, None, ("`eval_strategy`", "'epoch'", "without an `eval_dataset`", "'no'")),
        ({"eval_strategy": "epoch", "report_to": ["none"]}, tiny.prompts(2), None),
        ({}, None, None),
    ],
)
def test_a_tracker_or_an_evaluation_that_cannot_be_had_is_named(tmp_path, monkeypatch, changes, evaluation, pieces):
    monkeypatch.setattr(setup.integration_utils, "is_comet_available", lambda: False)
    if pieces is None:
        setup.check_inputs(tiny.config(tmp_path, **changes), evaluation)
        return
    with pytest.raises(ConfigError) as error:
        setup.check_inputs(tiny.config(tmp_path, **changes), evaluation)
    assert_says(error, *pieces)


def test_trackers_and_evaluation_are_checked_before_anything_is_loaded(tmp_path):
    for changes in ({"report_to": "x"}, {"eval_strategy": "steps"}):
        with pytest.raises(ConfigError, match=f"`{next(iter(changes))}`"):
            tiny.trainer(tmp_path, "no such model", changes=changes)


def test_fields_without_effect_that_were_set_are_named_in_one_warning(tmp_path, caplog):
    tiny.trainer(tmp_path, changes={"eval_strategy": "steps"}, eval_dataset=tiny.prompts(2))
    assert "no effect" not in caplog.text
    tiny.trainer(tmp_path, changes={"dataloader_num_workers": 2, "label_names": ["label"], "do_train": True})
    (said,) = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert said == (
        "These fields have no effect here. `dataloader_num_workers`: the trainer reads its batches from the dataset itself, "
        "without a data loader; `label_names`: prompts have no labels; `do_train`: a script's switch; call trainer.train() or "
        "trainer.evaluate()."
    )


def test_a_horizon_is_checked_against_the_responses_of_all_processes(tmp_path):
    args = tiny.config(tmp_path, kl_controller="adaptive", kl_target=1.0, kl_horizon=3)
    setup.set_batch_sizes(args, rows=21, processes=1)
    with pytest.raises(ConfigError, match="`kl_horizon` got 3"):
        setup.set_batch_sizes(args, rows=21, processes=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_horizon": 3}, "one update of 8 responses change the coefficient by up to 53% (0.2 × 8 / 3)"),
        ({"kl_horizon": 4}, None),
        ({"max_steps": 30}, "the 30 updates of this run, of 8 responses each, change the coefficient by 0.5% at most"),
        ({"kl_horizon": 480, "max_steps": 30}, None),
        ({"kl_controller": "pid"}, None),
    ],
)
def test_a_horizon_that_does_not_suit_the_run_is_named(tmp_path, caplog, changes, said):
    args = tiny.config(tmp_path, **{"kl_controller": "adaptive", "kl_target": 1.0, "max_steps": 30} | changes)
    setup.warn_of_horizons(args, setup.set_batch_sizes(args, rows=21, processes=1))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None)
    assert said is None or (messages[0].startswith("kl_controller='adaptive': horizon=") and said in messages[0])


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"anchor_max_kl": 5.0}, True),
        ({"anchor_max_kl": 5.0, "kl_coef": 0.0}, True),
        ({"anchor_max_kl": 5.0, "kl_controller": "dual", "kl_target": 5.0}, True),
        ({"anchor_max_kl": 5.0, "kl_controller": "dual", "kl_target": 4.0}, False),
        ({"kl_coef": 0.0}, False),
    ],
)
def test_a_limit_of_the_anchor_at_which_training_may_stop_is_named(tmp_path, caplog, changes, warned):
    setup.warn_of_frozen_anchor(tiny.config(tmp_path, **changes))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert not warned or "`anchor_max_kl` got 5 without a controller whose target is below it" in said[0]
    assert not warned or "Set kl_controller='dual' with kl_target=2.5" in said[0]


@pytest.mark.parametrize(
    ("estimator", "placement", "kind"),
    [("k3", "reward", "biased"), ("exact", "loss", "partial"), ("k1", "reward", None), ("exact", "both", None)],
)
def test_an_anchor_whose_gradient_is_not_the_kls_is_named_once(tmp_path, caplog, estimator, placement, kind):
    args = tiny.config(tmp_path, kl_estimator=estimator, kl_placement=placement)
    setup.warn_of_gradient(args)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (kind is not None)
    assert (
        kind is None
        or f"kl_placement={placement!r} gives the KL penalty to the reference (the anchor) a {kind}" in said[0]
    )
    caplog.clear()
    setup.warn_of_gradient(tiny.config(tmp_path, kl_estimator=estimator, kl_placement=placement, kl_coef=0.0))
    assert not caplog.records, "a warning without an anchor"


@pytest.mark.parametrize(
    ("kl", "generation_kwargs", "truncated", "warned"),
    [
        (0.051, None, None, "Use prompts of equal length"),
        (0.049, None, None, None),
        (float("nan"), None, None, None),
        (None, None, None, None),
        (1.0, {"top_k": 5}, None, None),
        (0.051, None, 0.0, "of an earlier update, or of another model"),
        (0.051, {"top_k": 5}, 0.25, "filters tokens by `generation_kwargs`"),
        (0.049, None, 0.25, None),
        (float("nan"), {"top_k": 5}, 0.25, None),
    ],
)
def test_a_sampler_that_is_not_the_policy_is_named(tmp_path, caplog, kl, generation_kwargs, truncated, warned):
    """A correction is no explanation of a difference, and padding none of one that was corrected."""
    record = SimpleNamespace(update=3, sampler=SimpleNamespace(kl=kl, truncated=truncated))
    args = tiny.config(tmp_path, generation_kwargs=generation_kwargs)
    assert setup.warn_of_sampler(record, args) == (warned is not None)
    assert len(caplog.records) == (warned is not None)
    if warned is not None:
        assert "update 3" in caplog.text and "0.051 nats per token" in caplog.text and warned in caplog.text
        assert ("padding" in caplog.text) == (truncated is None)


@pytest.mark.parametrize(
    ("per_device", "accumulation", "mini_batches", "size"),
    [(4, 2, 2, 4), (4, 2, 8, 1), (3, 2, 2, 3), (4, 3, 2, 3), (5, 2, 5, 2), (8, 1, 1, 8), (7, 4, 2, 7)],
)
def test_micro_batches_divide_a_mini_batch(tmp_path, per_device, accumulation, mini_batches, size):
    changes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    changes |= {"num_mini_batches": mini_batches, "num_ppo_epochs": 1}
    model, rows = tiny.llama(), []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            rows.append(len(kwargs["input_ids"]))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    tiny.trainer(tmp_path, model, changes=changes, train_dataset=tiny.prompts(28)).train()
    assert rows == [size] * (per_device * accumulation // size)
