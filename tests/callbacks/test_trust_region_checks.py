"""What a TrustRegionCallback rejects at its construction, with messages that say what to do."""

from __future__ import annotations

import importlib.metadata
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trl_trainers import KINDS, trainer_of
from trl_trustkl import TrustRegionCallback
from trl_trustkl.callbacks.trust_region_checks import (
    check_options,
    check_reference,
    check_stop,
    checked_kind,
    not_repeatable,
)  # fmt: skip
from trl_trustkl.errors import ConfigError, NotAvailableYetError

pytestmark = pytest.mark.filterwarnings("ignore")
PER_TOKEN = "nats per token"
LIMITS = {
    "max_kl": PER_TOKEN, "stop": PER_TOKEN, "lr_target": PER_TOKEN, "panic_kl": PER_TOKEN, "max_kl_token": "nats",
    "max_kl_response": "nats per completion", "anchor_max_kl": "nats per completion",
}  # fmt: skip
"""Every limit with its unit."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Any:
    return trainer_of("grpo", tmp_path_factory.mktemp("checks"))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, 0.0, -0.01, math.nan, math.inf, -math.inf, True, "0.01", "none", [0.01], 10**400])
def test_a_limit_must_be_a_positive_number(name, value, trainer):
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(ConfigError) as error:
        TrustRegionCallback(trainer, **{name: value})
    assert str(error.value).startswith(f"`{name}` got ")
    assert f"it must be a positive number of {LIMITS[name]}, or None. None turns it off." in str(error.value)
    assert trainer.callback_handler.callbacks == callbacks, "the trainer was changed"


@pytest.mark.parametrize("limit", [1e-12, 1, 0.01, 1e300])
def test_every_positive_number_is_a_limit(limit):
    check_options(dict.fromkeys(LIMITS, limit), "generation", True)
    check_options(dict.fromkeys(LIMITS), "generation", False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": "steps"}, "`every` got 'steps'; it must be one of 'generation', 'step'. Did you mean 'step'?"),
        ({"every": None}, "`every` got None; it must be one of"),
        ({"every": ["step"]}, "`every` got ['step']"),
        (
            {"every": "step"},
            "`every` got 'step' without a limit to enforce after each step; set max_kl or panic_kl",
        ),
        ({"every": "step", "stop": 0.1, "lr_target": 0.1}, "`every` got 'step' without a limit"),
        ({"anchor": None}, "`anchor` got None; it must be True or False."),
        ({"anchor": 1}, "`anchor` got 1; it must be True or False."),
        ({"anchor": "yes"}, "`anchor` got 'yes'"),
    ],
)
def test_another_option_of_a_wrong_value(options, said, trainer):
    with pytest.raises(ConfigError) as error:
        TrustRegionCallback(trainer, **options)
    assert said in str(error.value)


@pytest.mark.parametrize("limit", [name for name in LIMITS if name not in ("stop", "lr_target")])
def test_limits_that_can_hold_after_each_step(limit):
    check_options(dict.fromkeys(LIMITS) | {limit: 0.1}, "step", True)


@KINDS
def test_a_limit_on_the_kl_to_the_reference_needs_a_reference_that_stays(kind, tmp_path):
    full = trainer_of(kind, tmp_path, beta=0.0, peft_config=None)
    with pytest.raises(
        ConfigError, match=r"`anchor_max_kl` got 5 without a reference: with beta=0 .* such as beta=1e-12"
    ):
        TrustRegionCallback(full, anchor_max_kl=5.0)
    anchored = trainer_of(kind, tmp_path, beta=0.1)
    with pytest.raises(ConfigError, match="with anchor=False it is not measured"):
        TrustRegionCallback(anchored, anchor_max_kl=5.0, anchor=False)
    assert TrustRegionCallback(anchored, anchor_max_kl=5.0).limits.anchor_max_kl == 5.0
    anchored.args.sync_ref_model = True
    with pytest.raises(ConfigError, match="`anchor_max_kl` got 5 with sync_ref_model=True, which moves the reference"):
        TrustRegionCallback(anchored, anchor_max_kl=5.0)


@KINDS
def test_the_kinds_of_trainers(kind, tmp_path):
    assert checked_kind(trainer_of(kind, tmp_path)) == kind


def others(folder: Any) -> dict[str, Any]:
    common = {"output_dir": str(folder), "report_to": "none", "bf16": False, "use_cpu": True}
    data = tiny.prompts().rename_column("prompt", "text")
    return {
        "Trainer": Trainer(tiny.llama(), TrainingArguments(**common)),
        "SFTTrainer": SFTTrainer(
            model=tiny.llama(), args=SFTConfig(**common), train_dataset=data, processing_class=tiny.tokenizer()
        ),
        "object": object(),
        "NoneType": None,
    }


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer", "object", "NoneType"])
def test_a_trainer_without_generation_batches(name, tmp_path):
    trainer = others(tmp_path)[name]
    with pytest.raises(ConfigError) as error:
        TrustRegionCallback(trainer, max_kl=0.1)
    assert str(error.value) == (
        f"`trainer` got a {name}; it must be TRL's GRPOTrainer or RLOOTrainer, or a subclass of these such as GMPOTrainer: "
        "TrustRegionCallback reads their generation batches."
    )


def test_a_trainer_with_the_configuration_of_grpo_that_keeps_no_batch(trainer):
    with pytest.raises(
        ConfigError, match="`trainer` got a SimpleNamespace; it must be TRL's GRPOTrainer or RLOOTrainer"
    ):
        checked_kind(SimpleNamespace(args=trainer.args))


def test_the_ppo_trainer_of_this_package_has_its_own_limits(tmp_path):
    with pytest.raises(
        ConfigError, match="which has its own trust region. Set trust_max_kl, trust_stop, trust_lr_target"
    ):
        TrustRegionCallback(tiny.trainer(tmp_path), max_kl=0.1)


def engine(stage: int | None = None, **options: Any) -> Any:
    """The state of accelerate with FSDP2, or with a stage of ZeRO."""
    if stage is None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        vars(plugin).update(options)
        return SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}} | options)
    )


@pytest.mark.parametrize(
    ("flag", "state", "fields", "said"),
    [
        ("is_fsdp_enabled", engine(), {}, None),
        ("is_fsdp_enabled", engine(fsdp_version=1), {}, "`fsdp_version` got 1"),
        ("is_fsdp_enabled", engine(cpu_offload=CPUOffloadPolicy()), {}, "`fsdp_offload_params` got True"),
        ("is_deepspeed_enabled", engine(2), {}, None),
        ("is_deepspeed_enabled", engine(3), {}, None),
        ("is_deepspeed_enabled", engine(1), {}, "`zero_stage` got 1"),
        ("is_deepspeed_enabled", engine(2, fp16={"enabled": True}), {}, "`fp16` got True"),
        ("is_deepspeed_enabled", engine(2, scheduler={"type": "WarmupLR"}), {}, "`scheduler` got {'type': 'WarmupLR'}"),
        ("is_deepspeed_enabled", engine(2), {"optim": "adamw_8bit"}, "`optim` got 'adamw_8bit'"),
        ("is_deepspeed_enabled", engine(2), {"enable_jit_checkpoint": True}, "`enable_jit_checkpoint` got True"),
    ],
)
def test_engines_that_shard(flag, state, fields, said, trainer, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.8")
    monkeypatch.setattr(trainer, flag, True)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    for name, value in fields.items():
        monkeypatch.setattr(trainer.args, name, value, raising=False)
    if said is None:
        assert checked_kind(trainer) == "grpo"
        return
    with pytest.raises(
        NotAvailableYetError, match=f"{said}, which is not available for a SpiedGRPO with a TrustRegionC.*; "
    ):
        TrustRegionCallback(trainer)


@pytest.mark.parametrize(("missing", "other"), [(False, False), (True, False), (False, True)])
def test_a_reference_without_weights_on_some_process(missing, other):
    """`other`: whether those of another process are missing."""
    reference = tiny.llama().to("meta" if missing else "cpu")
    processes: Any = SimpleNamespace(any=lambda flag: flag or other)
    with (
        nullcontext()
        if not missing | other
        else pytest.raises(ConfigError, match="fsdp_cpu_ram_efficient_loading: false")
    ):
        check_reference(SimpleNamespace(ref_model=reference), processes)
    with nullcontext() if not other else pytest.raises(ConfigError):
        check_reference(SimpleNamespace(ref_model=None), processes)


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_within_the_backward_pass(name, trainer, monkeypatch):
    monkeypatch.setattr(trainer.args, "optim", OptimizerNames(name))
    with pytest.raises(ConfigError, match="steps within the backward pass .`optim`.*Use 'adamw_torch'"):
        TrustRegionCallback(trainer)


def test_a_model_without_trainable_parameters(tmp_path):
    frozen = trainer_of("grpo", tmp_path)
    frozen.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="whose model has no trainable parameter; there is no update to limit"):
        TrustRegionCallback(frozen)


def of_batches(
    steps_per_generation: int, num_iterations: int, accumulation: int, scaler: Any = None, deepspeed: bool = False
) -> Any:
    args = SimpleNamespace(
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        gradient_accumulation_steps=accumulation,
    )
    accelerator = SimpleNamespace(scaler=scaler)
    return SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=deepspeed, _step=0)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (
            (2, 1, 2),
            "it ends the steps on a generation batch early, and there is only one. Use max_kl, or num_iterations=2",
        ),
        ((1, 1, 2), "and there is only one"),
        ((1, 2, 2), "and there is only one"),
        ((1, 2, 4), "and there is only one"),
        ((3, 1, 2), "an optimizer step then uses two generation batches, of which it cannot drop one"),
        ((2, 3, 4), "an optimizer step then uses two generation batches"),
        (
            (2, 2, 2, None, True),
            "with DeepSpeed, which makes a step within the backward pass, so that none can be dropped",
        ),
        ((2, 2, 2, object()), "with fp16=True, where a step without gradients fails in the gradient scaler; use"),
    ],
)
def test_an_early_stop_that_has_no_effect_or_cannot_be_made(batches, said):
    with pytest.raises(ConfigError) as error:
        check_stop(0.1, of_batches(*batches))
    assert str(error.value).startswith("`stop` got 0.1 with ") and said in str(error.value)
    if len(batches) == 3:
        generation, iterations, accumulation = batches
        fields = f"num_iterations={iterations}, steps_per_generation={generation} and "
        assert f"{fields}gradient_accumulation_steps={accumulation}" in str(error.value)


@pytest.mark.parametrize("batches", [(2, 2, 2), (4, 1, 2), (4, 3, 2), (1, 2, 1), (1, 4, 2)])
def test_an_early_stop_that_can_be_made(batches):
    check_stop(0.1, of_batches(*batches))


def test_an_early_stop_without_an_effect_is_an_error_at_construction(trainer):
    with pytest.raises(ConfigError, match="`stop` got 0.1 with num_iterations=1, steps_per_generation=2 and"):
        TrustRegionCallback(trainer, stop=0.1)


@pytest.mark.parametrize(
    ("kl", "usable"), [(0.0, True), (1e-6, True), (2e-4, False), (math.nan, False), (math.inf, False)]
)
def test_the_kl_between_equal_policies_must_be_small(kl, usable):
    reason = not_repeatable(kl, tiny.llama())
    assert (reason is None) == usable
    if reason is not None:
        assert "two forward passes of LlamaForCausalLM" in reason and f"a KL of {kl:.3g} nats per token" in reason
