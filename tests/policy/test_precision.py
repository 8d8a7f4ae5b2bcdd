"""The precision on a CPU with and without bf16 instructions, as configurations choose it and models are loaded in it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf

from tests import tiny
from tests.watched import run
from trl_trustkl import TrustKLGRPOConfig, TrustKLGRPOTrainer, TrustKLPPOConfig, TrustKLRLOOConfig
from trl_trustkl.policy import cpu, loading, precision

pytestmark = pytest.mark.filterwarnings("ignore")

EACH = pytest.mark.parametrize("config", [TrustKLPPOConfig, TrustKLGRPOConfig, TrustKLRLOOConfig])
NAME = precision.__name__


@pytest.fixture
def slow(monkeypatch):
    """A CPU without bf16 instructions, and no GPU."""
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    hf.warning_once.cache_clear()
    yield
    hf.warning_once.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == NAME and each.levelno == logging.WARNING]


# -- the configurations ------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("use_cpu", [True, False])
def test_bf16_is_off_by_default_and_one_warning_says_so(slow, caplog, config, use_cpu):
    for _ in range(2):
        assert config("run", use_cpu=use_cpu).bf16 is False
    (line,) = said(caplog)
    assert line.startswith("`bf16` is False: this CPU has no avx512_bf16 instructions") and "Set bf16=True" in line


@EACH
@pytest.mark.parametrize("engine", [None, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_without_a_gpu_a_cpu_with_bf16_instructions_trains_in_bf16(monkeypatch, config, engine):
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = SimpleNamespace(fp16=False, bf16=None, use_cpu=False, fsdp=None, deepspeed=None)
    if engine is not None:  # which accelerate does not start with `use_cpu`
        monkeypatch.setenv(engine, "true")
        precision.choose_bf16(args)
        assert args.use_cpu is False
        return
    monkeypatch.setenv("WORLD_SIZE", "2")
    precision.choose_bf16(args)
    assert args.use_cpu is False
    monkeypatch.delenv("WORLD_SIZE")
    made = config("run")
    assert made.bf16 is True and made.use_cpu is True and made.device.type == "cpu"
    for given in ({"bf16": False}, {"fp16": True}, {"bf16": True}):
        args = SimpleNamespace(**vars(args) | given)
        precision.choose_bf16(args)
        assert args.use_cpu is False, given


@EACH
def test_a_bf16_that_was_asked_for_is_kept_and_warned_about(slow, caplog, config):
    assert config("run", use_cpu=True, bf16=True).bf16 is True
    (line,) = said(caplog)
    assert line.startswith("`bf16` got True, but this CPU has no") and "Leave it out" in line


@EACH
@pytest.mark.parametrize(("given", "bf16"), [({"bf16": False}, False), ({"fp16": True}, False)], ids=str)
def test_another_precision_that_was_chosen_is_kept_in_silence(slow, caplog, config, given, bf16):
    args = config("run", use_cpu=True, **given)
    assert (args.bf16, args.fp16) == (bf16, "fp16" in given) and not said(caplog)


@EACH
def test_trls_default_stays_with_bf16_instructions_and_with_a_gpu(slow, caplog, monkeypatch, config):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    args = config("run", use_cpu=True, bf16=False)
    args.use_cpu, args.bf16 = False, None
    precision.choose_bf16(args)
    assert args.bf16 is None  # TRL makes it True
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: True)
    assert config("run", use_cpu=True).bf16 is True and not said(caplog)


@EACH
def test_a_saved_configuration_has_the_choice(slow, config):
    saved = config("run", use_cpu=True).to_dict()
    assert saved["bf16"] is False and config("run", use_cpu=True, bf16=saved["bf16"]).bf16 is False


# -- the models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path) -> dict[str, str]:
    """Folders of a policy and of a sequence classifier, whose weights are in bf16."""
    for name, model in (("policy", tiny.llama()), ("scalar", tiny.scalar_model(tiny.llama()))):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("policy", "scalar")}


def trained_by_name(folder: Path, named: dict[str, str], **changes: Any) -> list[torch.dtype]:
    """The dtypes of policy, reference, value and reward of a run of one update on models that are given by name."""
    trainer, records = run(
        folder, named["policy"], processing_class=None, ref_model=named["policy"], value_model=named["scalar"],
        reward_funcs=named["scalar"], changes={"max_steps": 1, **changes},
    )  # fmt: skip
    assert len(records) == 1
    models = trainer.model.policy, trainer.reference.model, trainer.model.value_model, trainer.reward_funcs[0].model
    return [model.get_input_embeddings().weight.dtype for model in models]


def test_models_by_name_are_loaded_in_float32(slow, tmp_path, named):
    assert trained_by_name(tmp_path / "run", named) == [torch.float32] * 4


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_was_named_is_kept(slow, tmp_path, named, key):
    changes = {"model_init_kwargs": {key: "bfloat16"}}
    assert trained_by_name(tmp_path / "run", named, **changes) == [torch.bfloat16] * 4


def test_with_bf16_instructions_models_by_name_have_the_dtype_of_their_files(tmp_path, named, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: True)
    assert trained_by_name(tmp_path / "run", named) == [torch.bfloat16] * 4


def test_an_argument_that_was_given_is_kept_beside_the_dtype(slow, tmp_path):
    args = tiny.config(tmp_path, model_init_kwargs={"revision": "main"})
    assert loading.init_kwargs_of(args) == {"dtype": torch.float32, "revision": "main"}
    assert args.model_init_kwargs == {"revision": "main"}


def four_bit_in_bf16(folder: Path) -> Any:
    """A 4-bit Llama as `from_pretrained` gives it for a checkpoint in bf16 and that compute type."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.llama().to(torch.bfloat16).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def dtypes(model: torch.nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Those of the weights that are not in 4 bits, and those that 4-bit layers compute in."""
    layers = [each for each in model.modules() if "compute_dtype" in vars(each)]
    assert layers
    weights = {each.dtype for each in model.parameters() if each.is_floating_point()}
    return weights, {each.compute_dtype for each in layers}


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_a_quantised_model_computes_in_float32(slow, tmp_path, caplog, trainer):
    pytest.importorskip("bitsandbytes")
    model = four_bit_in_bf16(tmp_path / "model")
    if trainer == "ppo":
        built, records = run(tmp_path / "run", model, changes={"max_steps": 1})
        model = built.model.policy
        assert records[0]["anchor"]["kl_exact"] == 0.0
    else:
        args = TrustKLGRPOConfig(str(tmp_path), **tiny.QUIET)
        data, lora = tiny.prompts(), tiny.lora()
        model = TrustKLGRPOTrainer(model, tiny.good_words, args, data, None, tiny.tokenizer(), peft_config=lora).model
    assert dtypes(model) == ({torch.float32}, {torch.float32})
    (line,) = said(caplog)
    assert line.startswith("`model` is quantised and computes in float32 instead of bf16: this CPU has no")


@pytest.mark.parametrize("why", ["bf16=True", "instructions"])
def test_a_quantised_model_stays_in_bf16_where_that_is_asked_for_or_fast(slow, tmp_path, caplog, monkeypatch, why):
    pytest.importorskip("bitsandbytes")
    args = tiny.config(tmp_path, bf16=why == "bf16=True")
    if why == "instructions":
        monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: True)
    caplog.clear()
    model = four_bit_in_bf16(tmp_path / "model")
    precision.avoid_bf16(model, args)
    assert dtypes(model) == ({torch.bfloat16}, {torch.bfloat16}) and not said(caplog)


def test_weights_in_bf16_that_are_saved_are_left_and_warned_about(slow, tmp_path, caplog):
    model = tiny.llama().to(torch.bfloat16)
    tiny.trainer(tmp_path, model, ref_model=tiny.llama().to(torch.bfloat16))
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert [line.split(" has weights in bf16")[0] for line in said(caplog)] == ["`model`", "`ref_model`"]
    assert all("dtype=torch.float32" in line for line in said(caplog))


def test_weights_in_float32_need_no_warning(slow, tmp_path, caplog):
    tiny.trainer(tmp_path)
    assert not said(caplog)


# -- the dtype of an engine that samples elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_engine_samples_in_the_dtype_of_the_weights_or_of_autocast(tmp_path, dtype):
    model = tiny.llama().to(dtype)
    assert precision.sampling_dtype(model, tiny.config(tmp_path)) == dtype
    assert precision.sampling_dtype(model, tiny.config(tmp_path, bf16=True)) == torch.bfloat16
    assert precision.sampling_dtype(model, SimpleNamespace(bf16=False, fp16=True)) == torch.float16


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_engine_samples_in_the_dtype_that_4_bit_layers_compute_in(tmp_path, compute):
    """The weights that are not in 4 bits, such as those of the norms, may have another one."""
    pytest.importorskip("bitsandbytes")
    model = tiny.four_bit(tmp_path)
    for layer in model.modules():
        if "compute_dtype" in vars(layer):
            layer.compute_dtype = compute
    assert next(model.parameters()).dtype == torch.float32
    assert precision.sampling_dtype(model, tiny.config(tmp_path)) == compute
