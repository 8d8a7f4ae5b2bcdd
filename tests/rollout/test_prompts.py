"""Prompts: encoding, checks, padding, and the order of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests import tiny
from trl_trustkl.errors import DataError
from trl_trustkl.rollout.prompts import (
    Collator,
    PromptOrder,
    TokenLimits,
    check_prompts,
    collate,
    collate_nothing,
    context_length,
    encode_prompt,
    is_chat,
    prepare_datasets,
    prompt_texts,
    token_limits,
    tokenize_prompts,
)
from trl_trustkl.types import Rollout

CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "w1 w2"}]


def test_text_and_messages_are_distinguished_and_encoded():
    tokenizer = tiny.tokenizer()
    assert is_chat(CHAT) and not is_chat("w1") and not is_chat(None)
    assert tokenizer.decode(encode_prompt("w1 w2", tokenizer)).split()[-2:] == ["w1", "w2"]
    assert tokenizer.decode(encode_prompt(CHAT, tokenizer)) == "<bos> user w1 w2 <eos> <bos> assistant"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (7, "row got the prompt 7; it must be text or a list of {'role': …, 'content': …}"),
        ([], r"row got the prompt \[\]"),
        ([{"content": "w1"}], "it must be text or a list of"),
        ([{"role": "user", "content": None}], "it must be text or a list of"),
        ("", r"row has a prompt of no tokens \(''\)"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_named(prompt, said):
    with pytest.raises(DataError, match=said):
        encode_prompt(prompt, tiny.tokenizer(), where="row")


def test_messages_need_a_chat_template_that_takes_them():
    with pytest.raises(DataError, match="is a list of messages, but the tokenizer has no chat template"):
        encode_prompt(CHAT, tiny.tokenizer(chat=False))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="which the tokenizer or its chat template rejects: no"):
        encode_prompt(CHAT, tokenizer)


def test_a_dataset_gets_token_ids_where_it_has_prompts():
    dataset = Dataset.from_dict({"prompt": ["w1", "w2 w3"], "attention_mask": [[1], [1]], "wanted": [1, 2]})
    found = tokenize_prompts(dataset, tiny.tokenizer(), name="train_dataset")
    assert found.column_names == ["prompt", "wanted", "input_ids"]
    assert [len(row) for row in found["input_ids"]] == [1, 2]
    ids = Dataset.from_dict({"input_ids": [[3, 4]]})
    assert tokenize_prompts(ids, tiny.tokenizer(), name="train_dataset") is ids


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ([{"prompt": "w1"}], "`d` got list; it must be a datasets.Dataset"),
        (Dataset.from_dict({"prompt": []}), "`d` is empty"),
        (Dataset.from_dict({"text": ["w1"]}), r"`d` has the columns \['text'\]"),
    ],
)
def test_a_dataset_without_prompts_is_named(dataset, said):
    with pytest.raises(DataError, match=said):
        tokenize_prompts(dataset, tiny.tokenizer(), name="d")


def test_both_datasets_are_prepared_and_named_in_errors():
    args, limits = SimpleNamespace(dataset_num_proc=None, response_length=3), TokenLimits(tiny.VOCAB, 8, "model")
    good, bad = Dataset.from_dict({"input_ids": [[3, 4]]}), Dataset.from_dict({"input_ids": [[3] * 6]})
    train, evaluation = prepare_datasets(good, {"a": good}, tiny.tokenizer(), limits, args)
    assert train is good and evaluation == {"a": good}
    assert prepare_datasets(good, None, tiny.tokenizer(), limits, args)[1] is None
    with pytest.raises(DataError, match=r"`eval_dataset\['b'\]` row 0 has 6 prompt tokens"):
        prepare_datasets(good, {"a": good, "b": bad}, tiny.tokenizer(), limits, args)
    with pytest.raises(DataError, match="`train_dataset` row 0 has 6 prompt tokens"):
        prepare_datasets(bad, good, tiny.tokenizer(), limits, args)


def test_the_limits_are_those_of_the_shortest_context():
    policy, short = tiny.llama(), tiny.llama(max_position_embeddings=16)
    assert token_limits(policy, {"ref_model": short, "value_model": None}) == (tiny.VOCAB, 16, "ref_model")
    assert token_limits(policy, {}) == (tiny.VOCAB, 128, "model")
    assert context_length(SimpleNamespace()) == math.inf


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"input_ids": [[3], [3, 43]]}, "`d` row 1 has the token id 43; the model's vocabulary is 0 to 42"),
        ({"input_ids": [[-1]]}, "`d` row 0 has the token id -1"),
        ({"input_ids": [[3], []]}, "`d` row 1 has no token in 'input_ids'"),
        ({"input_ids": [[3] * 6]}, "with response_length=3 that is more than the context of `model`, 8"),
        ({"input_ids": [["w1"]]}, "`d` row 0, 'input_ids' got .*; it must be a list of integers"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1]]}, r"has the attention_mask \[1\] for 2 tokens"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1, 2]]}, "it must be 0 or 1 for each"),
        ({"input_ids": [[3, 4]], "attention_mask": [[0, 0]]}, "`d` row 0 has no token"),
    ],
)
def test_token_ids_that_no_model_could_read_are_named(columns, said):
    limits = TokenLimits(tiny.VOCAB, 8, "model")
    check_prompts(Dataset.from_dict({"input_ids": [[3] * 5]}), limits, 3, name="d")
    masked = {"input_ids": [[99, 99, *[3] * 5]], "attention_mask": [[0, 0, *[1] * 5]]}
    check_prompts(Dataset.from_dict(masked), limits, 3, name="d")
    with pytest.raises(DataError, match=said):
        check_prompts(Dataset.from_dict(columns), limits, 3, name="d")


def test_batches_are_padded_on_the_left_with_a_mask_of_the_tokens():
    rows = [
        {"input_ids": [0, 3], "x": 1},
        {"input_ids": [4, 5, 6, 0], "attention_mask": [0, 1, 1, 0]},
        {"input_ids": [7]},
    ]
    found = collate(rows, 0, CPU)
    assert found.ids.tolist() == [[0, 0, 0, 3], [0, 0, 5, 6], [0, 0, 0, 7]]
    assert found.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert found.rows is rows and collate_nothing(rows) is rows


def test_the_padding_of_a_users_collator_is_moved_to_the_left():
    seen = []

    def on_the_right(rows):
        seen.extend(rows)
        return {"input_ids": torch.tensor([[3, 4], [5, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}

    rows = [{"input_ids": [3, 4], "x": 1}, {"input_ids": [5], "x": 2}]
    found = Collator(on_the_right, 9, CPU)(rows)
    assert found.ids.tolist() == [[3, 4], [9, 5]] and found.mask.tolist() == [[True, True], [False, True]]
    assert found.rows == rows and seen == [{"input_ids": [3, 4]}, {"input_ids": [5]}]
    assert Collator(None, 0, CPU)(rows).ids.tolist() == [[3, 4], [0, 5]]
    with pytest.raises(DataError, match="`data_collator` returned `input_ids` of prompts of different lengths"):
        Collator(lambda rows: {"input_ids": [[3, 4], [5]]}, 0, CPU)(rows)


def test_prompts_are_given_back_as_the_dataset_has_them_or_decoded():
    ids, mask = torch.tensor([[0, 10], [8, 9]]), torch.tensor([[False, True], [True, True]])
    rollout = Rollout(ids, mask, ids, mask, rows=[{"prompt": CHAT}, {"prompt": CHAT}])
    assert prompt_texts(rollout, tiny.tokenizer()) == [CHAT, CHAT]
    without = rollout._replace(rows=[{"input_ids": [10]}, {"input_ids": [8, 9]}])
    assert prompt_texts(without, tiny.tokenizer()) == ["w3", "w1 w2"]


def test_every_pass_is_a_new_permutation_that_depends_only_on_the_seed():
    order = PromptOrder(10, 3, seed=5)
    passes = [[row for update in range(3 * i, 3 * i + 3) for row in order.rows(update)] for i in range(4)]
    assert all(len(set(rows)) == 9 and set(rows) <= set(range(10)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 4
    again, other = PromptOrder(10, 3, seed=5), PromptOrder(10, 3, seed=6)
    assert again.rows(7) == order.rows(7) and [other.rows(i) for i in range(3)] != [order.rows(i) for i in range(3)]
    with pytest.raises(DataError, match="`train_dataset` has 2 rows, fewer than one batch of 3"):
        PromptOrder(2, 3, seed=5)
