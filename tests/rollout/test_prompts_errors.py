"""Datasets and prompts that cannot be used, and both sides of padding."""

from __future__ import annotations

import pytest
import transformers
from datasets import Dataset, DatasetDict

from tests import tiny
from tests.messages import assert_says
from tests.survival import without_clock
from trl_trustkl import load_records
from trl_trustkl.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")


def long_prompt(words: int) -> str:
    return " ".join(["w1"] * words)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("dataset", "pieces"),
    [
        (Dataset.from_dict({"prompt": []}), ("is empty", "at least one row")),
        (Dataset.from_dict({"text": ["w1"] * 8}), ("['text']", "'prompt'", "'input_ids'")),
        ([{"prompt": "w1"}] * 8, ("got list", "datasets.Dataset")),
        (Dataset.from_dict({"prompt": ["w1"] * 7 + [""]}), ("row 7", "no tokens", "''", "bos token")),
        (Dataset.from_dict({"prompt": [1] * 8}), ("row 0", "1", "text or a list of")),
        (Dataset.from_dict({"prompt": ["w1", None] * 4}), ("row 1", "None", "text or a list of")),
        (Dataset.from_dict({"prompt": [[]] * 8}), ("row 0", "[]", "text or a list of")),
        (Dataset.from_dict({"input_ids": [[3]] * 6 + [[]] * 2}), ("row 6", "no token", "at least one")),
        (
            Dataset.from_dict({"prompt": ["w1"] * 3 + [long_prompt(123)] * 5}),
            ("row 3", "123 prompt tokens", "response_length=6", "context of `model`, 128", "shorten or drop", "lower"),
        ),
        (Dataset.from_dict({"input_ids": [[3] * 123] * 8}), ("row 0", "123 prompt tokens", "context of `model`, 128")),
    ],
    ids=[
        "empty", "no usable column", "list", "empty prompt", "number", "None", "no message", "no ids",
        "text too long", "ids too long",
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_used_is_named_with_the_row(tmp_path, which, dataset, pieces):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, **{which: dataset})
    assert_says(error, f"`{which}`", *pieces)


def test_a_split_of_several_is_asked_for(tmp_path):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, train_dataset=DatasetDict(train=tiny.prompts()))
    assert_says(error, "`train_dataset` got DatasetDict", "one split", "dataset['train']")


def test_the_longest_prompt_that_fits_the_context_is_accepted(tmp_path):
    trainer = tiny.trainer(
        tmp_path, train_dataset=Dataset.from_dict({"prompt": [long_prompt(122)] * 8}), changes={"max_steps": 1}
    )
    trainer.train()
    assert load_records(tmp_path)[0]["length"] > 0


@pytest.mark.parametrize("which", ["ref_model", "value_model", "reward_funcs[0]"])
def test_a_prompt_has_to_fit_every_model_that_reads_its_tokens(tmp_path, which):
    kind = transformers.GPT2LMHeadModel if which == "ref_model" else transformers.GPT2ForSequenceClassification
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, **{which.removesuffix("[0]"): tiny.short_gpt2(kind)})
    assert_says(error, "`train_dataset` row 2", "3 prompt tokens", "response_length=6", f"the context of `{which}`, 8")


@pytest.mark.parametrize("rows", [1, 7])
def test_a_dataset_shorter_than_a_batch_is_an_error_and_no_endless_loop(tmp_path, rows):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, train_dataset=tiny.prompts(rows))
    assert_says(error, "`train_dataset`", f"{rows} rows", "one batch of 8", "add prompts or shrink the batch")


def test_chat_prompts_without_a_chat_template_are_an_error(tmp_path):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, processing_class=tiny.tokenizer(chat=False), train_dataset=tiny.prompts(chat=True))
    assert_says(error, "`train_dataset` row 0", "chat template", "give prompts as text")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collator_may_pad_on_either_side(tmp_path, side):
    """Most tokenizers pad on the right, and transformers' collator does as the tokenizer."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    tiny.trainer(tmp_path / "with", data_collator=transformers.DataCollatorWithPadding(tokenizer)).train()
    tiny.trainer(tmp_path / "without").train()
    one, other = ([without_clock(r) for r in load_records(tmp_path / name)] for name in ("with", "without"))
    assert one == other
