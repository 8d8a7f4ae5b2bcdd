"""Activation checkpointing by the names of the installed transformers, without its warnings about old names."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
from peft import get_peft_model

from tests import tiny
from tests.processes import ROOT
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.trl_compat import activation_checkpointing

CODE = """
import sys, warnings
warnings.simplefilter("error", FutureWarning)
from tests import tiny
for checkpoints in (True, False):
    for peft in ({}, {"peft_config": None}):
        changes = {"gradient_checkpointing": checkpoints, "max_steps": 1}
        trainer = tiny.trainer(sys.argv[1], changes=changes, **peft)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpoints
        trainer.model.gradient_checkpointing_disable()
        assert not trainer.model.is_gradient_checkpointing
        trainer.model.gradient_checkpointing_enable()
        assert trainer.model.is_gradient_checkpointing
"""


@pytest.mark.processes
def test_a_run_causes_no_future_warning(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FutureWarning" not in done.stderr


@pytest.mark.parametrize("peft", [False, True])
def test_it_is_switched_on_and_off(peft):
    model: Any = tiny.llama()
    if peft:
        model = get_peft_model(model, tiny.lora())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert not activation_checkpointing.is_enabled(model)
        activation_checkpointing.enable(model, {"use_reentrant": False})
        assert activation_checkpointing.is_enabled(model)
        activation_checkpointing.disable(model)
        assert not activation_checkpointing.is_enabled(model)


class Args:
    """A configuration of an earlier transformers, or one with the new names."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def test_the_new_fields_get_the_values_of_the_old_ones_unless_they_are_set():
    old = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    args = Args(**old)
    activation_checkpointing.adopt_fields(args)
    assert vars(args) == old
    args = Args(**old, activation_checkpointing=None, activation_checkpointing_kwargs=None)
    activation_checkpointing.adopt_fields(args)
    assert args.activation_checkpointing is True and args.activation_checkpointing_kwargs == {"use_reentrant": True}
    args = Args(**old, activation_checkpointing=False, activation_checkpointing_kwargs={})
    activation_checkpointing.adopt_fields(args)
    assert args.activation_checkpointing is False and args.activation_checkpointing_kwargs == {}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_a_configuration_takes_both_names(tmp_path, name, value):
    if name not in TrustKLPPOConfig.__dataclass_fields__:
        pytest.skip("this transformers does not have the new name")
    args = TrustKLPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})
    assert args.gradient_checkpointing is args.activation_checkpointing is value
