"""Sampling with a recorded pass: the samples of a dynamic cache, and one recording for all batches of a rollout.

Without a GPU, a recorded pass is a call of the forward method with the recorded inputs, which puts its outputs into the memory
of the first ones.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import families, tiny
from tests.sampled import PROMPTS, assert_same, engine
from trl_trustkl.rollout import captured_pass
from trl_trustkl.rollout.captured_pass import CapturedPass, can_capture
from trl_trustkl.rollout.engine import Samples

pytestmark = pytest.mark.filterwarnings("ignore")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = tiny.FAMILIES | {"qwen3": lambda: families.build("Qwen3"), "lora": tiny.tuned}
CAPTURED = ["llama", "gpt2", "qwen3", "lora"]
DYNAMIC = {"cache_implementation": "dynamic"}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Treats the CPU as a device whose kernels can be recorded, and lists the recorded passes."""
    made: list[Any] = []

    def record(call: Any) -> Any:
        made.append(call)
        first: list[Any] = []

        def replay() -> Any:
            outputs = call()
            if not first:
                first.append(outputs)
            first[0].logits.copy_(outputs.logits)
            return first[0]

        return replay

    monkeypatch.setattr(captured_pass, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured_pass, "cuda_graph", record)
    monkeypatch.setattr(captured_pass, "synchronisations", lambda: contextlib.nullcontext([]))
    return made


def filled_cache() -> Any:
    cache = captured_pass.StaticCache(config=tiny.llama().config, max_cache_len=4)
    for layer in cache.layers:
        layer.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    return cache


def sampled(model: Any, seed: int, options: dict[str, Any] | None = None, **changes: Any) -> Samples:
    prompts = [prompt.to(next(model.parameters()).device) for prompt in PROMPTS]
    return engine(model, options, **changes).generate(prompts, tiny.seeds(prompts, seed))


@pytest.mark.parametrize("name", CAPTURED)
def test_samples_are_those_of_a_dynamic_cache(name, recordings):
    model = MODELS[name]().eval()
    capturing = engine(model)
    for seed in (1, 2):
        found = capturing.generate(PROMPTS, tiny.seeds(PROMPTS, seed))
        assert_same(found, sampled(model, seed, DYNAMIC))
    # Three batches, of which the last is shorter, in each of two rollouts.
    assert len(recordings) == 2


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_a_family_that_can_be_recorded_is_recorded(name, recordings):
    model = families.build(name).eval()
    assert_same(sampled(model, 1), sampled(model, 1, DYNAMIC))
    assert len(recordings) == can_capture(model)


def test_new_weights_of_an_adapter_are_used(recordings):
    model = tiny.tuned()
    capturing = engine(model)
    before = capturing.generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    after = capturing.generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    assert_same(after, sampled(model, 1, DYNAMIC))
    assert not all(map(torch.equal, before.logps, after.logps))


@pytest.mark.parametrize(
    "options",
    [
        DYNAMIC,
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "compile_config": {"backend": "eager"}},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_options_that_choose_another_pass(options, recordings):
    model = tiny.llama()
    assert_same(sampled(model, 1, options), sampled(model, 1, DYNAMIC))
    assert not recordings


def test_an_engine_whose_weights_move_does_not_record(recordings):
    model = tiny.llama()
    assert_same(sampled(model, 1, capture=False), sampled(model, 1, DYNAMIC))
    assert not recordings


@pytest.mark.parametrize(
    "changes",
    [{"guidance_scale": 1.5}, {"top_k": 5, "repetition_penalty": 1.2}, {"cache_implementation": "static"}],
    ids=str,
)
def test_other_options_have_their_effect(changes, recordings):
    model = tiny.llama().eval()
    assert_same(sampled(model, 1, changes), sampled(model, 1, changes | DYNAMIC))
    assert len(recordings) == 1


def test_a_cache_is_not_longer_for_an_earlier_rollout(recordings, monkeypatch):
    lengths: list[int] = []
    config = captured_pass.StaticDecoding.config

    def seen(self: Any, *args: Any) -> Any:
        lengths.append(config(self, *args).max_cache_len)
        return config(self, *args)

    monkeypatch.setattr(captured_pass.StaticDecoding, "config", seen)
    model = tiny.llama(max_position_embeddings=512)
    capturing, shapes = engine(model, batch_size=8), []
    update = captured_pass.StaticLayer.update
    monkeypatch.setattr(
        captured_pass.StaticLayer,
        "update",
        lambda self, *args: shapes.append(self.max_cache_len) or update(self, *args),
    )
    for prompts in ([torch.arange(3, 43).repeat(5)], PROMPTS):
        capturing.generate(prompts, tiny.seeds(prompts, 1))
    assert sorted(set(lengths)) == sorted(set(shapes)) == [128, 256]


def test_prompts_of_one_token_are_not_taken_for_a_recorded_pass(recordings):
    model, prompts = tiny.llama().eval(), [torch.tensor([3]), torch.tensor([5])]
    for seed in (1, 2):
        found = engine(model).generate(prompts, tiny.seeds(prompts, seed))
        assert_same(found, engine(model, DYNAMIC).generate(prompts, tiny.seeds(prompts, seed)))
    assert len(recordings) == 2


def test_which_models_are_recorded(recordings):
    assert can_capture(tiny.llama())
    windows = tiny.llama()
    windows.config.layer_types = ["sliding_attention", "full_attention"]
    windows.config.sliding_window = 4
    assert not can_capture(windows)
    other = tiny.llama()
    other.config._attn_implementation = "flash_attention_2"
    assert not can_capture(other)
    split = tiny.llama()
    split.lm_head.to("meta")
    assert not can_capture(split)
    assert not can_capture(families.build("Bloom")), "its positions are in the mask"
    data_dependent = tiny.llama()
    data_dependent._can_compile_fullgraph = False
    assert not can_capture(data_dependent)


def test_no_model_on_a_cpu_is_recorded():
    assert not can_capture(tiny.llama())


def test_the_forward_method_is_restored_and_the_cache_is_released(recordings, monkeypatch):
    model = tiny.llama()
    caches: list[Any] = []

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            caches.append(weakref.ref(kwargs["past_key_values"].layers[0]))
        return call(self, *args, **kwargs)

    call = CapturedPass.__call__
    monkeypatch.setattr(CapturedPass, "__call__", seen)
    own = vars(model)["forward"] = partial(type(model).forward, model)
    sampled(model, 1)
    assert vars(model)["forward"] is own
    del vars(model)["forward"]
    sampled(model, 1)
    assert "forward" not in vars(model) and len(recordings) == 2
    recordings.clear()
    gc.collect()
    assert caches and all(ref() is None for ref in caches)


def test_a_pass_that_reads_from_the_device_is_not_recorded(recordings, monkeypatch):
    monkeypatch.setattr(captured_pass, "synchronisations", lambda: contextlib.nullcontext(["synchronizing"]))
    model = tiny.llama()
    capturing = engine(model)
    for seed in (1, 2):
        found = capturing.generate(PROMPTS, tiny.seeds(PROMPTS, seed))
        assert_same(found, sampled(model, seed, DYNAMIC))
        assert not capturing._may_capture
    assert not recordings


def test_passes_with_other_inputs_are_recorded_by_themselves(recordings):
    """Of one row and of two, each at its second call."""

    def forward(**kwargs: Any) -> Any:
        return SimpleNamespace(logits=kwargs["input_ids"].clone() + (kwargs["offset"] or 0))

    cache = filled_cache()
    recorded = CapturedPass(forward)
    found = [
        recorded(input_ids=torch.full((rows, 1), step), past_key_values=cache, offset=offset).logits.tolist()
        for step in range(4)
        for rows, offset in ((1, None), (2, None), (1, 5))
    ]
    assert found == [value for step in range(4) for value in ([[step]], [[step], [step]], [[step + 5]])]
    assert len(recordings) == 3


def test_prompts_dynamic_caches_and_unknown_inputs_are_passed_on(recordings):
    def forward(*args: Any, **kwargs: Any) -> Any:
        return kwargs.get("input_ids", args)

    recorded = CapturedPass(forward)
    cache = filled_cache()
    one = torch.ones(2, 1)
    for kwargs in (
        {"input_ids": torch.ones(2, 3), "past_key_values": cache},
        {"input_ids": one, "past_key_values": None},
        {"input_ids": one, "past_key_values": captured_pass.StaticCache(config=tiny.llama().config, max_cache_len=4)},
        {"input_ids": one, "past_key_values": cache, "more": object()},
    ):
        for _ in range(3):
            assert recorded(**kwargs) is kwargs["input_ids"]
    assert recorded(one) == (one,)
    assert not recordings


# -- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recorded graphs."""
    made: list[Any] = []
    record = captured_pass.cuda_graph

    def kept(call: Any) -> Any:
        made.append(record(call))
        return made[-1]

    monkeypatch.setattr(captured_pass, "cuda_graph", kept)
    return made


@on_a_gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_samples_of_a_graph_are_those_of_a_dynamic_cache(name, graphs):
    model = MODELS[name]().eval().cuda()
    assert can_capture(model)
    for seed in (1, 2):
        assert_same(sampled(model, seed), sampled(model, seed, DYNAMIC), atol=1e-4)
    assert len(graphs) == 2


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_a_graph_under_autocast(dtype, graphs):
    """Those of the model's own pass, up to rounding, before and after an update of the adapter."""
    model = tiny.tuned(tiny.llama().to(dtype)).cuda()
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    capturing = engine(model, autocast=autocast, stop_ids=[])
    prompts = [prompt.cuda() for prompt in PROMPTS]
    for seed in range(3):
        found = capturing.generate(prompts, tiny.seeds(prompts, seed))
        for prompt, ids, logps in zip(prompts, found.ids, found.logps, strict=True):
            assert (logps - logps_of(model, prompt, ids, autocast)).abs().mean() < 0.1
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.02)
    assert len(graphs) == 3


def logps_of(model: Any, prompt: Tensor, ids: Tensor, autocast: Any) -> Tensor:
    with autocast(), torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / 0.7).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


@on_a_gpu
def test_samples_of_a_graph_of_a_quantised_model(tmp_path, graphs):
    model = tiny.four_bit(tmp_path)
    assert can_capture(model)
    assert_same(sampled(model, 1), sampled(model, 1, DYNAMIC), atol=1e-3)
    assert len(graphs) == 1


@on_a_gpu
def test_a_model_that_reads_from_the_device_samples_without_a_graph(graphs):
    model = tiny.llama().eval().cuda()
    wanted = sampled(model, 1, DYNAMIC)
    read = model.model.register_forward_hook(lambda module, inputs, output: output[0].sum().item() and None)
    assert_same(sampled(model, 1), wanted)
    read.remove()
    assert not graphs
