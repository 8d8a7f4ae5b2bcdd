"""Conversations as text: tools, arguments of the template, continued messages, and what is rejected."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl.data_utils import apply_chat_template

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.rollout.chat_template import check_template_kwargs, ends_with_assistant, render, template_kwargs_of
from trl_trustkl.rollout.prompts import TokenLimits, prepare_datasets
from trl_trustkl.rollout.rewards import as_text

pytestmark = pytest.mark.filterwarnings("ignore")
TEMPLATE = (
    "{% for tool in tools or [] %}<bos> w7 {{ tool['function']['name'] }} w{{ tool['function'] | length }} <eos> {% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}w8 {% endif %}"
    "{% if style is defined %}{{ style }} {% endif %}" + tiny.CHAT_TEMPLATE
)
ASKED = [{"role": "user", "content": "w1 w2"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "w3 w4"}]
TOOL = {"type": "function", "function": {"name": "w9", "parameters": {"type": "object", "properties": {}}}}


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def encoded(rows: dict[str, list[Any]], **args: Any) -> list[str]:
    """The prompts of a dataset with these columns, as text again."""
    settings = SimpleNamespace(dataset_num_proc=None, response_length=3, **args)
    limits = TokenLimits(tiny.VOCAB, 128, "model")
    found, _ = prepare_datasets(Dataset.from_dict(rows), None, tokenizer(), limits, settings)
    return [tokenizer().decode(ids) for ids in found["input_ids"]]


def test_a_question_is_answered_and_an_answer_that_has_begun_is_continued():
    assert render(ASKED, tokenizer()) == "<bos> user w1 w2 <eos> <bos> assistant"
    assert render(BEGUN, tokenizer()) == "<bos> user w1 w2 <eos> <bos> assistant w3 w4"
    assert [ends_with_assistant(messages) for messages in (ASKED, BEGUN)] == [False, True]
    assert encoded({"prompt": [ASKED, BEGUN]})[1].endswith("assistant w3 w4")


@pytest.mark.parametrize("messages", [ASKED, BEGUN], ids=["asked", "begun"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=str)
def test_conversations_are_rendered_as_trl_does(messages, tools, kwargs):
    expected = apply_chat_template({"prompt": messages}, tokenizer(), tools=tools, **kwargs)["prompt"]
    assert render(messages, tokenizer(), tools=tools, template_kwargs=kwargs) == expected


@pytest.mark.parametrize("as_json", [False, True], ids=["list", "JSON"])
def test_each_row_has_its_own_tools(as_json):
    other = {"type": "function", "function": {"name": "w5", "strict": True, "description": "w6"}}
    tools = [[TOOL], [other], None]
    given = [None if each is None else json.dumps(each) for each in tools] if as_json else tools
    found = encoded({"prompt": [ASKED] * 3, "tools": given})
    expected = [render(ASKED, tokenizer(), tools=each) for each in tools]
    assert found == expected and len(set(found)) == 3, "keys of other rows were not left out"


def test_the_arguments_of_a_row_come_before_those_of_the_configuration():
    rows = {"prompt": [ASKED] * 3, "chat_template_kwargs": [{"style": "w5"}, {"enable_thinking": True}, None]}
    start = "<bos> user w1 w2 <eos> <bos> assistant"
    assert encoded(rows) == [f"w5 {start}", start, start]
    assert encoded(rows, chat_template_kwargs={"enable_thinking": False}) == [f"w8 w5 {start}", start, f"w8 {start}"]
    as_json = {"prompt": [ASKED], "chat_template_kwargs": [json.dumps({"style": "w6"})]}
    assert encoded(as_json) == [f"w6 {start}"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"enable_thinkin": False}, "'enable_thinkin', which the tokenizer's chat template does not use; leave it out. Did "
         "you mean 'enable_thinking'?"),
        ({"unheard": 1}, "'unheard', which the tokenizer's chat template does not use; leave it out."),
        ({"tools": []}, "'tools'; leave it out: it is given by the column 'tools'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt'; leave it out: the trainer depends on its value"),
        ({"tokenize": True}, "'tokenize'"),
        ({"continue_final_message": True}, "'continue_final_message'"),
    ],
)  # fmt: skip
def test_arguments_that_would_be_ignored(given, said):
    with pytest.raises(ConfigError) as error:
        check_template_kwargs(given, tokenizer(), "`chat_template_kwargs`")
    assert f"`chat_template_kwargs` got {said}" in str(error.value)
    with pytest.raises(ConfigError):
        encoded({"prompt": [ASKED]}, chat_template_kwargs=given)
    with pytest.raises(ConfigError, match="`train_dataset` row 0, 'chat_template_kwargs' got"):
        encoded({"prompt": [ASKED], "chat_template_kwargs": [json.dumps(given)]})


@pytest.mark.parametrize("given", [{"style": "w5"}, {"documents": []}, {"chat_template": tiny.CHAT_TEMPLATE}, {}])
def test_arguments_that_are_used(given):
    check_template_kwargs(given, tokenizer(), "`chat_template_kwargs`")


@pytest.mark.parametrize("rows", [{"prompt": ["w1 w2"]}, {"input_ids": [[3, 4]]}], ids=["text", "ids"])
def test_arguments_without_messages_are_an_error(rows):
    with pytest.raises(ConfigError, match="`chat_template_kwargs` got .*which no chat template renders"):
        encoded(rows, chat_template_kwargs={"style": "w5"})


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("tools", "[{", "row 0 got '\\[{' in the column 'tools', which is not JSON"),
        ("tools", '"w1"', "row 0 got 'w1' in the column 'tools'; it must be a list of JSON schemas"),
        ("chat_template_kwargs", "[1]", "it must be a dict of arguments"),
        ("images", ["a.png"], "has the column 'images', and this trainer passes no images to the policy"),
        ("image", "a.png", "has the column 'image'"),
    ],
)
def test_columns_that_cannot_be_used(column, value, said):
    with pytest.raises(DataError, match=said):
        encoded({"prompt": [ASKED], column: [value]})


def test_a_message_with_an_image_is_an_error():
    parts = [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "w1"}]}]]
    with pytest.raises(DataError, match="row 0 has a message with a part of the type 'image'"):
        encoded({"prompt": parts})


def test_columns_of_text_prompts_are_left_to_the_reward_functions():
    assert encoded({"prompt": ["w1 w2"], "tools": ["w3"]}) == ["w1 w2"]


def test_a_reward_model_reads_a_continued_message_as_one():
    text = as_text(BEGUN, [{"role": "assistant", "content": " w5"}], tiny.tokenizer())
    assert text == "<bos> user w1 w2 <eos> <bos> assistant w3 w4 w5 <eos> "


def test_the_template_of_a_row_may_be_without_arguments():
    assert template_kwargs_of({}, tokenizer(), None, "row") == {}


def test_a_run_with_tools_arguments_and_begun_answers(tmp_path):
    rows = {
        "prompt": [ASKED, BEGUN] * 8,
        "tools": [[TOOL], None] * 8,
        "chat_template_kwargs": [None, {"style": "w5"}] * 8,
    }
    changes = {"chat_template_kwargs": '{"enable_thinking": false}', "max_steps": 1}
    trainer = tiny.trainer(
        tmp_path, changes=changes, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer(),
        reward_funcs=lambda completions, **_: [float(len(each[0]["content"])) for each in completions],
    )  # fmt: skip
    found = {tokenizer().decode(ids) for ids in trainer.train_dataset["input_ids"]}
    start = "<bos> user w1 w2 <eos> <bos> assistant"
    assert found == {f"<bos> w7 w9 w2 <eos> w8 {start}", f"w8 w5 {start} w3 w4"}
    trainer.train()
    assert load_records(tmp_path)[0]["score"] is not None
