"""Responses that a stop string ends."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.watched import run
from trl_trustkl.errors import ConfigError
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.transformers_engine import StopStrings, TransformersEngine

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 20
PROMPTS = [torch.arange(3, 3 + length) + 2 * i for i, length in enumerate([1, 5, 3, 2, 4, 1, 6, 2])]
TOKENIZER = tiny.tokenizer()


def sampled(strings: Any = None, *, stop_ids: list[int], pad_token_id: int = 0) -> Samples:
    options = None if strings is None else {"stop_strings": strings}
    engine = TransformersEngine(
        tiny.llama(), response_length=LENGTH, temperature=1.0, stop_ids=stop_ids, pad_token_id=pad_token_id,
        batch_size=len(PROMPTS), autocast=contextlib.nullcontext, generation_kwargs=options, tokenizer=TOKENIZER,
    )  # fmt: skip
    return engine.generate(PROMPTS, tiny.seeds(PROMPTS, 2))


def text(ids: Tensor) -> str:
    return TOKENIZER.decode(ids)


def stopped_at(ids: Tensor, strings: list[str]) -> int | None:
    """The number of tokens after which the text of a response contains one of the strings; None if it never does."""
    ends = (n for n in range(1, len(ids) + 1) if any(string in text(ids[:n]) for string in strings))
    return next(ends, None)


@pytest.mark.parametrize("pad_token_id", [0, 2, 9])
@pytest.mark.parametrize("stop_ids", [[], [2, 5]], ids=["no_stop_token", "stop_tokens"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(stop_ids, pad_token_id):
    """The other responses, their log-probabilities and the stop tokens are those of a run without stop strings."""
    plain = sampled(stop_ids=stop_ids, pad_token_id=pad_token_id)
    strings = ["w20", "w31", text(plain.ids[1][:2])]
    found = sampled(strings, stop_ids=stop_ids, pad_token_id=pad_token_id)
    stopped = 0
    for ids, logps, reason, whole, whole_logps, was in zip(*found, *plain, strict=True):
        end = stopped_at(whole, strings)
        stopped += end is not None
        assert ids.tolist() == whole[:end].tolist() and reason == ("stop" if end else was)
        torch.testing.assert_close(logps, whole_logps[:end], rtol=0, atol=1e-5)
    assert 2 <= stopped < len(PROMPTS) and len(found.ids[1]) == 2


def test_a_padding_token_that_was_sampled_is_part_of_the_response():
    """The padding token is one that the second response has at its third position."""
    pad = int(sampled(stop_ids=[2, 5]).ids[1][2])
    plain = sampled(stop_ids=[2, 5], pad_token_id=pad)
    assert pad not in (2, 5) and plain.ids[1][2] == pad
    for string, length in ((text(plain.ids[1][1:3]), 3), (text(plain.ids[1][2:4]), 4)):
        found = sampled(string, stop_ids=[2, 5], pad_token_id=pad)
        assert found.ids[1].tolist() == plain.ids[1][:length].tolist() and found.finish_reasons[1] == "stop"


def test_a_string_that_begins_in_the_prompt_does_not_end_a_response():
    plain = sampled(stop_ids=[])
    strings = [text(torch.cat([prompt[-1:], ids[:1]])) for prompt, ids in zip(PROMPTS, plain.ids, strict=True)]
    found = sampled(strings, stop_ids=[])
    assert all(len(ids) > 1 for ids in found.ids)


def test_an_option_without_an_effect_on_these_stop_tokens_is_refused():
    with pytest.raises(ConfigError, match="'bad_words_ids' .* because they are stop tokens"):
        TransformersEngine(
            tiny.llama(), response_length=4, temperature=1.0, stop_ids=[2], pad_token_id=0, batch_size=2,
            autocast=contextlib.nullcontext, generation_kwargs={"bad_words_ids": [[2]]},
        )  # fmt: skip


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ConfigError, match=r"`tokenizer` got None; .* generation_kwargs\['stop_strings'\]"):
        TransformersEngine(
            tiny.llama(), response_length=4, temperature=1.0, stop_ids=[], pad_token_id=0, batch_size=2,
            autocast=contextlib.nullcontext, generation_kwargs={"stop_strings": "w1"},
        )  # fmt: skip


def spelling(decoder: Any, tokens: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=tokens[0])


@pytest.mark.parametrize(
    ("decoder", "tokens", "string", "ids", "ends"),
    [
        (decoders.ByteLevel(), ["a", "Ã", "©", "b"], "éé", [0, 1, 2, 1, 2, 3], 4),
        (decoders.ByteLevel(), ["a", "st", "op!", "b"], "top", [0, 1, 2, 3], 2),
        (decoders.Metaspace(), ["▁a", "▁b", "c", "d"], " b", [0, 2, 1, 3], 2),
        (decoders.Metaspace(), ["▁a", "▁", "b", "c"], " b", [0, 1, 2, 3], 2),
        (decoders.Metaspace(), ["▁a", "▁b", "c", "d"], "bcd", [0, 0, 0, 1, 2, 3], 5),
    ],
    ids=["bytes_of_a_character", "inside_of_tokens", "leading_space", "token_of_a_space", "several_tokens"],
)
def test_strings_are_found_in_the_decoded_text(decoder, tokens, string, ids, ends):
    criterion = StopStrings([string], spelling(decoder, tokens), prompt_length=2)
    rows = torch.tensor([[1, 2, *ids]])
    found = [bool(criterion(rows[:, : 2 + n], None)) for n in range(1, len(ids) + 1)]
    assert found.index(True) == ends
    assert torch.stack(criterion.columns, dim=1).tolist() == [found]


def test_a_response_that_a_stop_string_ended_is_not_missing_its_end(tmp_path):
    changes = {
        "max_steps": 1, "response_length": 12, "stop_token": "none", "missing_eos_penalty": 2.0,
        "generation_kwargs": {"stop_strings": ["w20", "w31"]},
    }  # fmt: skip
    trainer, (record,) = run(tmp_path, changes=changes, reward_funcs=lambda prompts, completions: [5.0] * len(prompts))
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    rows = [ids[mask] for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    ended = [stopped_at(ids, ["w20", "w31"]) == len(ids) for ids in rows]
    assert 0 < sum(ended) < 8 and record["eos_rate"] == sum(ended) / 8
    assert all(end or len(ids) == 12 for end, ids in zip(ended, rows, strict=True))
    assert scored.scores.tolist() == [5.0 if end else 3.0 for end in ended]
    assert record["sampler"]["kl"] < 1e-9


def test_an_evaluation_counts_stop_strings_as_an_end(tmp_path):
    changes = {"stop_token": "none", "response_length": 30, "generation_kwargs": {"stop_strings": "w"}}
    trainer = tiny.trainer(tmp_path, changes=changes, eval_dataset=tiny.prompts(8))
    assert trainer.evaluate()["eval_eos_rate"] > 0.9
