"""What transformers offers and this version rejects."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode
from trl import BEMACallback, SyncRefModelCallback

from tests import sharded, tiny
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer
from trl_trustkl.errors import ConfigError, NotAvailableYetError
from trl_trustkl.ppo.unsupported import reject_unsharded

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


STAGES = [{"zero_optimization": {"stage": stage}} for stage in (2, 3)]


def assert_says_what_works(error: Any) -> None:
    message = str(error.value)
    assert message.startswith("DeepSpeed is not available yet") and "DDP" in message and "FSDP2" in message
    for name in ("examples/accelerate/fsdp2.yaml", "multi_gpu.yaml", "cpu_gloo.yaml"):
        assert name in message


@pytest.mark.parametrize("stage", [*STAGES, "zero3.json"])
def test_deepspeed_requested_in_the_configuration_is_rejected(tmp_path, stage):
    with pytest.raises(NotAvailableYetError) as error:
        tiny.config(tmp_path, deepspeed=stage)
    assert_says_what_works(error)


def test_deepspeed_requested_by_the_launcher_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(NotAvailableYetError) as error:
        tiny.config(tmp_path)
    assert_says_what_works(error)


def test_an_accelerator_with_deepspeed_is_rejected(tmp_path, monkeypatch):
    made = TrustKLPPOTrainer.create_accelerator_and_postprocess

    def sharding(self: Any) -> None:
        made(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(TrustKLPPOTrainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(NotAvailableYetError) as error:
        tiny.trainer(tmp_path)
    assert_says_what_works(error)


@pytest.mark.parametrize("asked", [{"fsdp": "full_shard"}, {"fsdp": True}, {}], ids=["name", "flag", "launcher"])
def test_fsdp_on_a_cpu_is_rejected(tmp_path, asked, monkeypatch):
    if not asked:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotAvailableYetError, match="`use_cpu` got True with FSDP, which accelerate would ignore"):
        tiny.config(tmp_path, **asked)


class Sharded(TrustKLPPOConfig):
    """A configuration in one of several processes."""

    parallel_mode = ParallelMode.DISTRIBUTED


def test_fsdp_in_one_process_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="`fsdp` got True in a run of one process"):
        tiny.config(tmp_path, fsdp=True, use_cpu=False)


@pytest.fixture
def launched(monkeypatch):
    """A process that `accelerate launch` started with TRL's configuration for FSDP2, but for the given variables."""

    def launch(**changes: str) -> None:
        for name, value in (sharded.EXAMPLE | changes).items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("variables", "fields", "pieces"),
    [
        ({"FSDP_VERSION": "1"}, {}, ("`fsdp_version` got 1", "only 2 is available")),
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
        ({}, {"use_vllm": True}, ("`use_vllm` got True", "leave it False")),
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
    launched(**variables)
    settings = {"output_dir": str(tmp_path), "bf16": False, "report_to": "none"}
    with pytest.raises(NotAvailableYetError) as error:
        Sharded(**settings | fields)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


def test_the_example_configuration_is_accepted(tmp_path, launched):
    launched()
    Sharded(output_dir=str(tmp_path), bf16=False, report_to="none")


def quantised() -> Any:
    model = tiny.llama()
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"model": quantised}, ("`model` is quantised", "quantization_config")),
        ({"ref_model": quantised}, ("`ref_model` is quantised",)),
        ({"value_model": quantised}, ("`value_model` is quantised",)),
        ({"model": lambda: tiny.tuned(tiny.gpt2(), bias="all")}, ("`peft_config` trains", "bias at 'none'")),
        ({"optimizer": lambda: torch.optim.RAdam([torch.zeros(1)])}, ("`optimizers` got a RAdam", "AdamW")),
        ({"engine": object}, ("`rollout_engine` got a object", "Leave it None")),
    ],
)
def test_what_cannot_be_sharded_is_rejected(changes, pieces):
    given = {"model": tiny.llama, "ref_model": lambda: None, "value_model": lambda: None} | changes
    built = {name: build() for name, build in given.items()}
    optimizer, engine = built.pop("optimizer", None), built.pop("engine", None)
    with pytest.raises(NotAvailableYetError) as error:
        reject_unsharded(built, optimizer, engine)
    assert all(piece in str(error.value) for piece in pieces), str(error.value)


def test_what_can_be_sharded_is_accepted():
    weight = torch.nn.Parameter(torch.zeros(1))
    for model in (tiny.llama(), tiny.tuned()):
        models = {"model": model, "ref_model": tiny.llama(), "value_model": None}
        for optimizer in (None, torch.optim.AdamW([weight]), torch.optim.SGD([weight])):
            reject_unsharded(models, optimizer, None)


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
