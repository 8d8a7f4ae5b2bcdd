"""Sampling with a static cache, also compiled: the samples of a dynamic cache, and no compilation for a new batch or update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GenerationConfig

from tests import tiny
from tests.sampled import PROMPTS, assert_same, engine
from trl_trustkl.errors import ConfigError
from trl_trustkl.rollout.static_decoding import STEP, StaticDecoding

pytestmark = pytest.mark.filterwarnings("ignore")
STATIC = {"cache_implementation": "static"}
COMPILED = STATIC | {"compile_config": {"backend": "eager"}}
MODELS = tiny.FAMILIES | {"lora": tiny.tuned}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def update(model: Any, learning_rate: float = 0.05) -> None:
    """An optimizer's step on all trained weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=learning_rate)
    loss = model(input_ids=torch.arange(3, 23).view(2, 10)).logits.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("options", [STATIC, STATIC | {"prefill_chunk_size": 4}, COMPILED], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_a_dynamic_cache(name, options):
    model = MODELS[name]().eval()
    static = engine(model, options)
    for seed in (1, 2):
        assert_same(
            static.generate(PROMPTS, tiny.seeds(PROMPTS, seed)),
            engine(model).generate(PROMPTS, tiny.seeds(PROMPTS, seed)),
        )


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_a_pass_is_compiled_once_for_all_batches_prompts_and_updates(name):
    """The second update has longer prompts, the third one prompt less, and the last only one short prompt."""
    model = MODELS[name]()
    compiled, plain = engine(model, COMPILED), engine(model)
    changes = []
    batches = [PROMPTS, [torch.cat([ids, ids]) for ids in PROMPTS], PROMPTS[1:], PROMPTS[:1]]
    for seed, prompts in enumerate(batches):
        found, wanted = (
            compiled.generate(prompts, tiny.seeds(prompts, seed)),
            plain.generate(prompts, tiny.seeds(prompts, seed)),
        )
        assert_same(found, wanted)
        before = [p.detach().clone() for p in model.parameters()]
        update(model)
        changed = plain.generate(prompts, tiny.seeds(prompts, seed))
        changes.append(all(map(torch.equal, changed.logps, found.logps)))
        assert not all(map(torch.equal, before, model.parameters()))
    assert not any(changes), "an update did not change the log-probabilities"
    assert graphs() == 1


def test_the_pass_is_compiled_again_where_a_prompt_needs_a_longer_cache():
    model = tiny.llama(max_position_embeddings=512)
    compiled = engine(model, COMPILED)
    longer = [torch.arange(3, 33).repeat(5), *PROMPTS]
    for prompts in (PROMPTS, longer, PROMPTS, longer):
        assert_same(
            compiled.generate(prompts, tiny.seeds(prompts, 1)), engine(model).generate(prompts, tiny.seeds(prompts, 1))
        )
    assert graphs() == 2


@pytest.mark.parametrize("options", [STATIC, STATIC | {"prefill_chunk_size": 4}, COMPILED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_under_autocast(dtype, options):
    """With weights in float32, keys are in float32 and values in bf16. Log-probabilities are the model's up to rounding."""
    model = tiny.tuned(tiny.llama().to(dtype))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    static = engine(model, options, autocast=autocast, stop_ids=[])
    for seed in range(3):
        found = static.generate(PROMPTS, tiny.seeds(PROMPTS, seed))
        for prompt, ids, logps in zip(PROMPTS, found.ids, found.logps, strict=True):
            with autocast(), torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
            wanted = (logits.float() / 0.7).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            assert (logps - wanted).abs().mean() < 0.1
        update(model, learning_rate=0.01)
    assert graphs() <= 1 or "prefill_chunk_size" in options


@pytest.mark.slow
def test_samples_of_inductor_are_those_of_a_dynamic_cache():
    model = tiny.tuned()
    compiled = engine(model, STATIC | {"compile_config": {}})
    for seed in range(3):
        assert_same(
            compiled.generate(PROMPTS, tiny.seeds(PROMPTS, seed)),
            engine(model).generate(PROMPTS, tiny.seeds(PROMPTS, seed)),
        )
        update(model)
    assert graphs() == 1


def test_weights_that_transformers_cannot_compile_are_an_error(tmp_path):
    model = tiny.four_bit(tmp_path)
    with pytest.raises(ConfigError, match=r"compile_config.* got a value with a model that is quantised by Bnb4Bit"):
        engine(model, COMPILED)
    assert_same(
        engine(model, STATIC).generate(PROMPTS, tiny.seeds(PROMPTS, 1)),
        engine(model).generate(PROMPTS, tiny.seeds(PROMPTS, 1)),
        atol=1e-4,
    )


def test_the_cache_is_kept_until_the_engine_is_closed():
    static = engine(tiny.llama(), STATIC)
    static.generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    _, cache = static._static._cache
    static.generate(PROMPTS, tiny.seeds(PROMPTS, 2))
    assert static._static._cache[1] is cache and cache.layers[0].keys.shape[:3] == (3, 2, STEP)
    static.close()
    assert static._static._cache is None
    assert_same(
        static.generate(PROMPTS, tiny.seeds(PROMPTS, 1)), engine(tiny.llama()).generate(PROMPTS, tiny.seeds(PROMPTS, 1))
    )


def test_the_length_of_the_cache_grows_in_steps_beyond_the_one_that_is_set():
    decoding, config = StaticDecoding(tiny.llama()), GenerationConfig(max_new_tokens=10, max_cache_len=50)
    lengths = [decoding.config(config, length).max_cache_len for length in (5, 40, 41, 118, 119, 7)]
    assert lengths == [50, 50, STEP, STEP, 2 * STEP, 2 * STEP] and config.max_cache_len == 50


def test_rows_are_filled_up_with_the_first_prompt():
    decoding = StaticDecoding(tiny.llama())
    assert decoding.rows(3) == [0, 1, 2] and decoding.rows(2) == [0, 1, 0] and decoding.rows(1) == [0, 0, 0]
    assert decoding.rows(4) == [0, 1, 2, 3] and decoding.rows(3) == [0, 1, 2, 0]


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


def double(layer: Layer, factor: Tensor, x: Tensor) -> Tensor:
    return factor * x


def test_a_replaced_forward_is_kept_only_where_it_does_the_same():
    model, factor, other = nn.Sequential(Layer(), Layer()), torch.tensor(2.0), torch.tensor(2.0)
    decoding = StaticDecoding(model)
    layer = model[0]
    layer.forward = first = partial(double, layer, factor)
    decoding.keep_forwards()
    assert layer.forward is first and factor._dynamo_static_input_type == "unguarded"
    layer.forward = partial(double, layer, factor)
    decoding.keep_forwards()
    assert layer.forward is first
    for new in (partial(double, layer, other), partial(double, layer), partial(print, layer, factor)):
        layer.forward = new
        decoding.keep_forwards()
        assert layer.forward is new
    assert "forward" not in vars(model[1])
