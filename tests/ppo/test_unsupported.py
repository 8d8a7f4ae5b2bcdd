"""What transformers offers and this version rejects."""

from __future__ import annotations

import dataclasses

import pytest
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import BEMACallback, SyncRefModelCallback

from tests import tiny
from trl_trustkl.errors import ConfigError, NotAvailableYetError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True},
        {"torch_compile_backend": "eager"},
        {"torch_compile_mode": "default"},
        {"torch_compile_mode": ""},  # transformers compiles for any mode but None
        {"use_liger_kernel": True},
        {"liger_kernel_config": {"rope": True}},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
    ],
)
def test_other_kernels_and_loops_are_rejected_and_not_ignored(tmp_path, changes):
    with pytest.raises(NotAvailableYetError, match=rf"`{next(iter(changes))}`") as error:
        tiny.config(tmp_path, **changes)
    if "compile" in str(changes):
        said = "generation_kwargs={'cache_implementation': 'static', 'compile_config': {}} compiles sampling alone"
        assert said in str(error.value)


def test_a_launcher_that_compiles_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(NotAvailableYetError, match="dynamo_backend"):
        tiny.config(tmp_path)


def test_a_launcher_that_shards_by_other_means_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(NotAvailableYetError, match="parallelism_config"):
        tiny.config(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"split_batches": True},
        '{"gradient_accumulation_kwargs": {"num_steps": 2}}',
        AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 2}),
    ],
)
def test_an_accelerator_configuration_that_changes_the_batches_is_rejected(tmp_path, given):
    with pytest.raises(NotAvailableYetError, match="`accelerator_config` got .*gradient_accumulation_steps"):
        tiny.config(tmp_path, accelerator_config=given)
    tiny.config(tmp_path, accelerator_config={"split_batches": False, "gradient_accumulation_kwargs": None})


@pytest.mark.parametrize("given", [1, True, 1.5, b"file", ["a"], AcceleratorConfig])
def test_an_accelerator_configuration_of_another_type_is_rejected(tmp_path, given):
    """transformers opens a number as a file descriptor, and closes it: 1 is the standard output."""
    with pytest.raises(ConfigError, match="`accelerator_config` got .* must be an AcceleratorConfig, a dict, JSON"):
        tiny.config(tmp_path, accelerator_config=given)


@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 0.0},
        {"debug": []},
        {"include_num_input_tokens_seen": False},
        {"include_num_input_tokens_seen": "no"},
        {"average_tokens_across_devices": True},
        {"label_smoothing_factor": 0},
        {"liger_kernel_config": {}},
    ],
    ids=str,
)
def test_a_field_that_asks_for_nothing_is_accepted(tmp_path, changes):
    args = tiny.config(tmp_path, **changes)
    assert dataclasses.replace(args).to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"optim": "lomo"}, ("`optim`", "'lomo'", "backward", "'adafactor'")),
        ({"optim": "galore_adamw_layerwise"}, ("`optim`", "'galore_adamw_layerwise'", "rolled back")),
        ({"optim": "schedule_free_adamw"}, ("`optim`", "other weights")),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            ("`lr_scheduler_type`", "plateau", "`trust_lr_target`"),
        ),
    ],
)
def test_optimizers_and_schedules_that_cannot_work_are_rejected_before_the_run(tmp_path, changes, pieces):
    with pytest.raises(NotAvailableYetError) as error:
        tiny.config(tmp_path, **changes)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda trainer: SyncRefModelCallback(trainer.reference.model, trainer.accelerator),
            "set `sync_ref_model=True` instead",
        ),
        (lambda trainer: BEMACallback(), "which holds policy and value"),
    ],
    ids=["sync", "BEMA"],
)
@pytest.mark.parametrize("arguments", [{}, {"peft_config": None}], ids=["adapter", "full"])
def test_callbacks_of_trl_that_cannot_work_are_rejected_before_the_first_rollout(build, said, arguments, tmp_path):
    trainer = tiny.trainer(tmp_path, **arguments)
    trainer.add_callback(callback := build(trainer))
    with pytest.raises(NotAvailableYetError, match=f"`callbacks` got a {type(callback).__name__}.*{said}"):
        trainer.train()
    assert not (tmp_path / "bounds.jsonl").exists()
