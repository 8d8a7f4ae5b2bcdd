"""What FSDP2 and DeepSpeed offer and this version rejects."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.training_args import ParallelMode

from tests import sharded, tiny
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.errors import ConfigError, NotAvailableYetError
from trl_trustkl.ppo.sharding_checks import reject_launch, reject_sharding_options, reject_unsharded

pytestmark = pytest.mark.filterwarnings("ignore")


class Asked(SimpleNamespace):
    """A configuration that asks for one of the engines."""

    def __init__(self, engine: str) -> None:
        super().__init__(fsdp=engine == "fsdp", deepspeed=engine == "deepspeed", use_cpu=False)


@pytest.mark.parametrize(
    ("asked", "engine"),
    [
        ({"fsdp": "full_shard"}, "FSDP2"),
        ({"fsdp": True}, "FSDP2"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP2"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ],
)
def test_sharding_on_a_cpu_is_rejected(tmp_path, asked, engine, monkeypatch):
    if isinstance(asked, str):
        monkeypatch.setenv(asked, "true")
        asked = {}
    with pytest.raises(NotAvailableYetError, match=f"`use_cpu` got True with {engine}, which accelerate would ignore"):
        tiny.config(tmp_path, **asked)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", None])
def test_deepspeed_of_a_version_that_was_not_tested_is_rejected(version, monkeypatch):
    def installed(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", installed)
    said = "DeepSpeed is not installed" if version is None else f"DeepSpeed {version} is not available"
    with pytest.raises(ConfigError if version is None else NotAvailableYetError, match=f"{said}.*pip install"):
        reject_launch(Asked("deepspeed"))


def test_deepspeed_of_a_tested_version_is_accepted(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.8")
    reject_launch(Asked("deepspeed"))


class Sharded(TrustKLPPOConfig):
    """A configuration in one of several processes."""

    parallel_mode = ParallelMode.DISTRIBUTED


def test_sharding_in_one_process_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="FSDP2 is configured in a run of one process"):
        tiny.config(tmp_path, fsdp=True, use_cpu=False)


@pytest.fixture
def launched(monkeypatch):
    """A process that `accelerate launch` started with TRL's configuration for an engine, but for the given variables."""

    def launch(engine: str, **changes: str) -> None:
        for name, value in (sharded.ENGINES[engine] | changes).items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("variables", "fields", "pieces"),
    [
        ({"FSDP_VERSION": "1"}, {}, ("`fsdp_version` got 1", "set fsdp_version: 2")),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, ("`fsdp_offload_params` got True", "leave it false")),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            ("`fsdp_activation_checkpointing` got True", "set gradient_checkpointing=True instead"),
        ),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}, ("`fsdp_auto_wrap_policy` got 'NO_WRAP'", "TRANSFORMER_BASED_WRAP")),
        (
            {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"},
            {},
            ("`fsdp_auto_wrap_policy` got 'size_based_auto_wrap_policy'", "TRANSFORMER_BASED_WRAP"),
        ),
        ({}, {"fp16": True}, ("`fp16` got True", "bf16=True")),
        ({}, {"optim": "adamw_8bit"}, ("`optim` got 'adamw_8bit'", "adamw_torch")),
        ({}, {"optim": "adafactor"}, ("`optim` got 'adafactor'", "adamw_torch")),
        ({}, {"sync_ref_model": True}, ("`sync_ref_model` got True", "leave it False")),
        (
            {},
            {"generation_kwargs": {"cache_implementation": "static"}},
            ("`generation_kwargs` got {'cache_implementation': 'static'}", "leave out cache_implementation"),
        ),
    ],
)
def test_what_fsdp2_does_not_support_is_rejected_before_anything_is_loaded(
    tmp_path, launched, variables, fields, pieces
):
    launched("fsdp2", **variables)
    settings = {"output_dir": str(tmp_path), "bf16": False, "report_to": "none"}
    with pytest.raises(NotAvailableYetError) as error:
        Sharded(**settings | fields)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"zero_optimization": {"stage": 0}}, ("`zero_stage` got 0", "use 2 or 3")),
        ({"zero_optimization": {"stage": 1}}, ("`zero_stage` got 1", "use 2 or 3")),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ("`offload_optimizer_device` got 'cpu'", "leave it none"),
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ("`offload_param_device` got 'nvme'", "leave it none"),
        ),
        ({"gradient_clipping": 0.5}, ("`gradient_clipping` got 0.5", "`max_grad_norm` limits")),
        ({"bf16": {"enabled": True}}, ("`bf16` got True", "`bf16` is False")),
        ({"fp16": {"enabled": True}}, ("`fp16` got True", "use bf16, or float32")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, ("`optimizer` got {'type': 'AdamW'", "set `optim`")),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ("`scheduler` got", "set `lr_scheduler_type`")),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ("`zero_hpz_partition_size` got 2",)),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("`zero_quantized_weights` got True",)),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            ("`zero_quantized_gradients` got True",),
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ("`mics_shard_size` got 2",)),
        ({"torch_autocast": {"enabled": True}}, ("`torch_autocast` got",)),
        ({"tensor_parallel": {"autotp_size": 2}}, ("`tensor_parallel` got",)),
        ({"sequence_parallel_size": 2}, ("`sequence_parallel_size` got 2",)),
        ({"fields": {"fp16": True}}, ("`fp16` got True", "bf16=True")),
        ({"fields": {"optim": "adamw_8bit"}}, ("`optim` got 'adamw_8bit'", "adamw_torch")),
        ({"fields": {"sync_ref_model": True}}, ("`sync_ref_model` got True", "with DeepSpeed")),
    ],
)
def test_what_deepspeed_offers_and_is_not_supported_is_rejected_before_anything_is_loaded(changes, pieces, tmp_path):
    fields = changes.pop("fields", {})
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}} | changes
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True} | fields
    args = Sharded(**settings)
    args.deepspeed, args.deepspeed_plugin = config, SimpleNamespace(deepspeed_config=config)
    with pytest.raises(NotAvailableYetError) as error:
        reject_sharding_options(args)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_clipping": 1.0}, {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_offers_and_is_supported_is_accepted(changes, stage, tmp_path):
    config = {"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}}} | changes
    args = Sharded(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    args.deepspeed, args.deepspeed_plugin = config, SimpleNamespace(deepspeed_config=config)
    reject_sharding_options(args)


@pytest.mark.parametrize("engine", sharded.ENGINES)
def test_the_example_configurations_are_accepted(tmp_path, launched, engine):
    sharded.require(engine)
    launched(engine)
    Sharded(output_dir=str(tmp_path), bf16=False, report_to="none")


def quantised() -> Any:
    model = tiny.llama()
    model.is_loaded_in_8bit = True
    return model


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"model": quantised}, ("`model` is quantised", "quantization_config")),
        ({"ref_model": quantised}, ("`ref_model` is quantised",)),
        ({"value_model": quantised}, ("`value_model` is quantised",)),
        ({"model": lambda: tiny.tuned(tiny.gpt2(), bias="all")}, ("`peft_config` trains", "bias at 'none'")),
        ({"optimizer": lambda: torch.optim.RAdam([torch.zeros(1)])}, ("`optimizers` got a RAdam", "AdamW")),
    ],
)
def test_what_cannot_be_sharded_is_rejected(changes, pieces):
    given = {"model": tiny.llama, "ref_model": lambda: None, "value_model": lambda: None} | changes
    built = {name: build() for name, build in given.items()}
    optimizer = built.pop("optimizer", None)
    with pytest.raises(NotAvailableYetError) as error:
        reject_unsharded(Asked("fsdp"), built, optimizer)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


@pytest.mark.parametrize(("asked", "rejected"), [("deepspeed", True), ("fsdp", False)])
def test_an_adapter_on_the_output_head_is_rejected_with_deepspeed(asked, rejected):
    models = {"model": tiny.tuned(target_modules=["q_proj", "lm_head"]), "ref_model": None, "value_model": None}
    with pytest.raises(NotAvailableYetError, match="adapts the output head") if rejected else nullcontext():
        reject_unsharded(Asked(asked), models, None)


@pytest.mark.parametrize(("asked", "rejected"), [("deepspeed", True), ("fsdp", False)])
def test_dampening_is_rejected_with_deepspeed(asked, rejected):
    models = {"model": tiny.llama(), "ref_model": None, "value_model": None}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(NotAvailableYetError, match="SGD with dampening") if rejected else nullcontext():
        reject_unsharded(Asked(asked), models, optimizer)


def test_what_can_be_sharded_is_accepted():
    weight = torch.nn.Parameter(torch.zeros(1))
    for model in (tiny.llama(), tiny.tuned()):
        models = {"model": model, "ref_model": tiny.llama(), "value_model": None}
        for optimizer in (None, torch.optim.AdamW([weight]), torch.optim.SGD([weight])):
            reject_unsharded(Asked("fsdp"), models, optimizer)
