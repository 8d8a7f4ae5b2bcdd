"""Generated prompts and datasets: bad ones are rejected with an error of this package, good ones become tokens."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.end_to_end.fuzzing import check_rejected, reproducible, text
from trl_trustkl.errors import DataError
from trl_trustkl.rollout.prompts import check_prompts, collate, encode_prompt, token_limits, tokenize_prompts

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZER = tiny.tokenizer()
word = st.sampled_from([f"w{i}" for i in range(30)])
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
bad_content = st.none() | st.integers() | st.floats() | st.just([]) | st.booleans()
bad_message = st.one_of(
    st.none(),
    text,
    st.integers(),
    st.just({}),
    st.builds(lambda c: {"content": c}, text),
    st.builds(lambda c: {"role": "user", "content": c}, bad_content),
    st.builds(lambda r: {"role": r, "content": "w1"}, bad_content),
    st.just({"role": "user", "content": "w1 \ud800"}),
)
good_message = st.builds(
    lambda role, c: {"role": role, "content": c}, st.sampled_from(["user", "assistant", "system"]), unicode_text
)
bad_prompt = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.binary(),
    st.just(""),
    st.text(" \t\n", max_size=9),
    st.just({}),
    st.just([]),
    st.lists(st.integers(), min_size=1, max_size=3),
    st.builds(lambda t: f"{t}\ud800w1", text),
    st.builds(lambda good, bad: [*good, bad], st.lists(good_message, max_size=2), bad_message),
)


def test_invalid_prompts_are_rejected(record_property):
    rejected = check_rejected(bad_prompt, lambda prompt: encode_prompt(prompt, TOKENIZER), DataError, 250)
    record_property("rejected", len(rejected))


@settings(reproducible, max_examples=60)
@given(st.lists(good_message, min_size=1, max_size=3) | unicode_text.filter(str.strip))
def test_any_text_and_any_conversation_become_tokens(prompt):
    ids = encode_prompt(prompt, TOKENIZER)
    assert ids and all(0 <= token < tiny.VOCAB for token in ids)


def test_an_error_of_a_chat_template_is_quoted():
    strict = tiny.tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_prompt([{"role": "user", "content": "w1"}], strict)


ids = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=20)
bad_ids = st.one_of(
    st.just([]),
    st.none(),
    st.builds(lambda good, bad: [*good, bad], ids, st.integers(tiny.VOCAB, 2**40) | st.integers(-(2**40), -1)),
    st.lists(st.floats(0, 40), min_size=1, max_size=5),
    st.lists(text, min_size=1, max_size=3),
    st.lists(ids, min_size=1, max_size=2),
    st.lists(st.just(5), min_size=123, max_size=200),
    st.integers(0, 40),
    text,
    st.lists(st.none(), min_size=1, max_size=3),
)
bad_mask = st.one_of(
    st.just([0, 0, 0]),
    st.just([]),
    st.none(),
    st.lists(st.just(1), min_size=4, max_size=9),
    st.just([1, 1]),
    st.just([1, 0, 2]),
    st.just(["1", "1", "1"]),
    st.just([0.5, 1.0, 1.0]),
    st.just([1, None, 1]),
)
# Arrow ends a column's name at the first NUL, so that datasets itself rejects such a name.
names_of_columns = text.filter(lambda t: t not in ("prompt", "input_ids") and "\x00" not in t)
bad_columns = st.one_of(
    st.builds(lambda bad: {"input_ids": [bad]}, bad_ids),
    st.builds(lambda bad: {"input_ids": [[3, 4, 5]], "attention_mask": [bad]}, bad_mask),
    st.builds(lambda name: {name: ["w1 w2"]}, names_of_columns),
    st.builds(lambda bad: {"prompt": ["w1", bad]}, st.none() | st.sampled_from(["", " ", "\n"])),
    st.builds(lambda bad: {"prompt": [[{"role": "user", "content": "w1"}], bad]}, st.none() | st.just([])),
    st.sampled_from([{"prompt": []}, {"input_ids": []}, {}, {"prompt": [1, 2]}, {"prompt": [1.5]}, {"prompt": [True]}]),
)


@pytest.fixture
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_invalid_datasets_are_rejected(record_property, quiet_datasets):
    limits = token_limits(tiny.llama(), {})

    def attempt(columns: dict[str, Any]) -> None:
        dataset = tokenize_prompts(datasets.Dataset.from_dict(columns), TOKENIZER, name="train_dataset")
        check_prompts(dataset, limits, 6, name="train_dataset")

    record_property("rejected", len(check_rejected(bad_columns, attempt, DataError, 150)))
    nothing = (
        None,
        [],
        {},
        "prompts",
        3,
        [{"prompt": "w1"}],
        datasets.IterableDataset.from_generator(lambda: iter([])),
    )
    for given_ in nothing:
        with pytest.raises(DataError):
            tokenize_prompts(given_, TOKENIZER, name="train_dataset")


@settings(reproducible, max_examples=60)
@given(st.lists(ids, min_size=1, max_size=5), st.sampled_from([list, np.array, torch.tensor]), st.booleans())
def test_collation_keeps_every_token_and_nothing_else(rows, container, masked):
    given_ = [{"input_ids": container(row), **({"attention_mask": [1] * len(row)} if masked else {})} for row in rows]
    prompts = collate(given_, pad_token_id=0, device=torch.device("cpu"))
    assert prompts.ids.shape == prompts.mask.shape == (len(rows), max(map(len, rows)))
    assert [row[mask].tolist() for row, mask in zip(prompts.ids, prompts.mask, strict=True)] == rows
    assert prompts.mask[:, -1].all(), "padding is not on the left"
