"""Special tokens that the tokenizer adds to a text, that the text has itself, and that a user's token ids have."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests import tiny
from tests.tiny import BOS, EOS
from tests.watched import run
from trl_trustkl.errors import DataError
from trl_trustkl.rollout.prompts import TokenLimits, encode_prompt, prepare_datasets
from trl_trustkl.rollout.rewards import RewardModel

W1, W2 = tiny.tokenizer()("w1 w2")["input_ids"]


def adding(template: str, *, eos_is_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that adds special tokens to a text, such as "<bos> $A <eos>"."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    if eos_is_bos:
        tokenizer.eos_token = "<bos>"
    return tokenizer


@pytest.mark.parametrize("template", ["$A", "<bos> $A"])
@pytest.mark.parametrize("text", ["w1 w2", "w1", "w1 <bos> w2", "w1 <eos>", "<eos> w1"])
def test_a_text_without_a_bos_token_is_tokenized_as_by_trl(template, text):
    tokenizer = adding(template)
    assert encode_prompt(text, tokenizer) == tokenizer(text=[text])["input_ids"][0]  # as TRL's GRPO trainer does


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<bos> $A", "<bos> w1 w2", [BOS, W1, W2]),
        ("<bos> $A", " <bos> w1", [BOS, W1]),
        ("<bos> $A", "<bos>", [BOS]),
        ("<bos> $A", "<bos> <bos> w1", [BOS, BOS, W1]),  # both are the text's own
        ("$A", "<bos> <bos> w1", [BOS, BOS, W1]),
        ("$A", "<bos> w1", [BOS, W1]),
        ("<bos> $A", "w1 <bos>", [BOS, W1, BOS]),
    ],
)
def test_a_bos_token_that_the_text_begins_with_is_not_added_again(template, text, expected):
    assert encode_prompt(text, adding(template)) == expected


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A <eos>", "w1 w2", [W1, W2]),
        ("<bos> $A <eos>", "w1", [BOS, W1]),
        ("<bos> $A <eos>", "<bos> w1", [BOS, W1]),
        ("<bos> $A <eos>", "", [BOS]),
        ("$A <eos>", "w1 <eos>", [W1, EOS]),  # the text's own stays
        ("$A", "w1 <eos>", [W1, EOS]),
        ("<bos> $A", "<bos> w1 <eos> <eos>", [BOS, W1, EOS, EOS]),
    ],
)
def test_an_eos_token_that_the_tokenizer_appends_is_left_out(template, text, expected):
    assert encode_prompt(text, adding(template)) == expected


def test_a_text_of_no_token_but_the_eos_that_is_appended_has_no_tokens():
    with pytest.raises(DataError, match="a prompt of no tokens"):
        encode_prompt("", adding("$A <eos>"))


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<bos> $A", "", [BOS]),
        ("<bos> $A", "<bos>", [BOS]),
        ("<bos> $A", "w1 <bos>", [BOS, W1, BOS]),
        ("<bos> $A <bos>", "w1", [BOS, W1]),
        ("<bos> $A <bos>", "", [BOS]),
        ("$A", "<bos>", [BOS]),
    ],
)
def test_one_token_may_be_bos_and_eos(template, text, expected):
    assert encode_prompt(text, adding(template, eos_is_bos=True)) == expected


def test_messages_keep_what_the_chat_template_writes():
    messages = [{"role": "user", "content": "w1"}]
    assert encode_prompt(messages, adding("<bos> $A <eos>")) == encode_prompt(messages, tiny.tokenizer())


def test_the_prompts_of_a_run_have_one_bos_and_no_eos_at_the_end(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["<bos> w1", "w1"] * 8})
    changes = {"max_steps": 1}
    trainer, _ = run(tmp_path, changes=changes, processing_class=adding("<bos> $A <eos>"), train_dataset=dataset)
    assert trainer.seen["rollout"][0].prompt_ids.tolist() == [[BOS, W1]] * 8


# -- token ids of the user ---------------------------------------------------------------------------------------------


def warnings_of(caplog, dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    args, limits = SimpleNamespace(dataset_num_proc=None, response_length=3), TokenLimits(tiny.VOCAB, 99, "model")
    prepared, _ = prepare_datasets(dataset, None, tokenizer, limits, args)
    if "prompt" not in dataset.column_names:
        assert prepared is dataset
    return [record.getMessage() for record in caplog.records]


def test_rows_with_two_bos_tokens_or_an_eos_at_the_end_are_counted_and_used_unchanged(caplog):
    rows = [[BOS, BOS, W1], [W1], [BOS, BOS, EOS], [BOS, W1, EOS], [W1, EOS]]
    (message,) = warnings_of(caplog, Dataset.from_dict({"input_ids": rows}), tiny.tokenizer())
    assert "`train_dataset` has 'input_ids' of 2 of 5 rows with two bos tokens ('<bos>') at the start and" in message
    assert "3 of 5 rows with the eos token ('<eos>') at the end" in message and "They are used unchanged" in message


def test_only_what_was_found_is_said(caplog):
    (message,) = warnings_of(caplog, Dataset.from_dict({"input_ids": [[W1, EOS], [W1]]}), tiny.tokenizer())
    assert "'input_ids' of 1 of 2 rows with the eos token" in message and "bos" not in message


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [[BOS, W1], [W1, EOS, W2], [W1]]},
        {"input_ids": [[BOS, BOS, W1], [W1, EOS, EOS]], "attention_mask": [[0, 1, 1], [1, 0, 0]]},
        {"prompt": ["<bos> <bos> w1 <eos>"]},
    ],
    ids=["usual", "padding", "text"],
)
def test_there_is_no_warning_without_a_cause(caplog, columns):
    assert warnings_of(caplog, Dataset.from_dict(columns), tiny.tokenizer()) == []


def test_a_prompt_of_only_the_bos_token_is_usual_where_it_is_the_eos_too(caplog):
    tokenizer = adding("$A", eos_is_bos=True)
    assert warnings_of(caplog, Dataset.from_dict({"input_ids": [[BOS], [BOS, W1]]}), tokenizer) == []


def test_a_reward_model_reads_one_bos_token_too():
    seen = []

    class Judge(LlamaForSequenceClassification):
        def forward(self, input_ids, **inputs):
            seen.append(input_ids.tolist())
            return super().forward(input_ids, **inputs)

    tokenizer = adding("<bos> $A")
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = 1
    RewardModel(Judge(config), tokenizer).score_text(["<bos> w1", "w2"], [" w3", " w4"])
    rows = [tokenizer.decode(row, skip_special_tokens=False).replace("<pad>", "").split() for row in seen[0]]
    assert rows == [["<bos>", "w1", "w3"], ["<bos>", "w2", "w4"]]
