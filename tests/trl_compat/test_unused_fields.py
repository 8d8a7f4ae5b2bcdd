"""Fields without effect: which of them a user has set."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from transformers.trainer_pt_utils import AcceleratorConfig

from tests import tiny
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.trl_compat.unused_fields import COMPUTED, WITHOUT_EFFECT, set_in_vain

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {each.name for each in dataclasses.fields(TrustKLPPOConfig)}
SET = {
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "accelerator_config": {"even_batches": False},
    "remove_unused_columns": False,
    "label_names": ["label"],
    "length_column_name": "size",
    "ignore_data_skip": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "logging_nan_inf_filter": False,
    "logging_dir": "logs",
    "skip_memory_metrics": False,
    "use_cache": True,
    "fsdp_config": {"min_num_params": 5},
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "resume_from_checkpoint": "folder",
    "sft_model_path": "model",
    "reward_model_path": "model",
}
QUIET = {"dataloader_pin_memory", "dataloader_prefetch_factor", "enable_jit_checkpoint", "local_rank", *COMPUTED}
"""Needs a GPU; needs workers, below; has its own warning; is set by launchers; have their own warnings."""


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT.keys() - QUIET))
def test_a_field_that_is_set_is_found(tmp_path, name):
    if name not in FIELDS:
        pytest.skip("another version of transformers has it")
    assert set_in_vain(tiny.config(tmp_path, **{name: SET[name]})) == {name: WITHOUT_EFFECT[name]}


def test_fields_that_are_set_together_are_found(tmp_path):
    found = set_in_vain(tiny.config(tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=4, do_train=True))
    assert list(found) == ["dataloader_num_workers", "dataloader_prefetch_factor", "do_train"]
    args = tiny.config(tmp_path)
    assert args.dataloader_pin_memory is False, "transformers sets it"
    args.use_cpu = False
    assert list(set_in_vain(args)) == ["dataloader_pin_memory"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_strategy": "steps"},  # sets do_eval
        {"local_rank": 0},
        {"accelerator_config": {"use_configured_state": False}},
        {"accelerator_config": AcceleratorConfig()},
        {"batch_size": 8, "world_size": 1},
    ],
    ids=str,
)
def test_what_the_user_has_not_set_is_not_found(tmp_path, changes):
    args = tiny.config(tmp_path, **changes)
    for each in (args, dataclasses.replace(args), copy.deepcopy(args)):
        assert set_in_vain(each) == {}


def test_what_transformers_fills_in_is_not_found(tmp_path):
    args = tiny.config(tmp_path)
    args.fsdp_config = {"min_num_params": 0, "xla": False, "xla_fsdp_grad_ckpt": False}  # transformers 5.0
    assert set_in_vain(args) == {}
    args.fsdp, args.fsdp_config = True, {"version": 2}
    assert set_in_vain(args) == {}, "with FSDP it has an effect"


def test_the_reasons_are_about_fields():
    assert WITHOUT_EFFECT.keys() - {"logging_dir"} <= FIELDS | {
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
    }
    assert COMPUTED.keys() <= WITHOUT_EFFECT.keys() and set(SET) | QUIET == WITHOUT_EFFECT.keys()
