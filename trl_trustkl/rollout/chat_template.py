"""Conversations as text, by the tokenizer's chat template."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, did_you_mean, shown

_SET_ELSEWHERE = {
    "conversation": "the column 'prompt'",
    "tools": "the column 'tools'",
    "tokenize": "",
    "return_dict": "",
    "add_generation_prompt": "",
    "continue_final_message": "",
}
"""Arguments of apply_chat_template that are passed to it, and what determines them; the trainer sets those without a text."""


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages such as [{"role": "user", "content": "..."}]."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str)


def is_message(message: Any) -> bool:
    """Whether it is a dict with a role and a content: text, a list of parts, or nothing next to tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and bool(content)) or bool(message.get("tool_calls"))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, or the texts among its parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in content)


def unread_part(message: Mapping[str, Any]) -> str | None:
    """The type of the first part of a message that is not text, such as "image"; None if there is none."""
    content = message.get("content")
    types = (
        (part.get("type", "text") for part in content if isinstance(part, dict)) if isinstance(content, list) else ()
    )
    return next((each for each in types if each != "text"), None)


def ends_with_assistant(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a response continues the last message, instead of adding one."""
    return messages[-1]["role"] == "assistant"


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation that the policy continues: with the beginning of an answer, or, where the last message is the
    assistant's, without the end of that message. tools: JSON schemas; template_kwargs: further arguments of the template."""
    continued = ends_with_assistant(messages)
    text = tokenizer.apply_chat_template(
        list(messages), tools=tools or None, tokenize=False, add_generation_prompt=not continued,
        continue_final_message=continued, **template_kwargs or {},
    )  # fmt: skip
    assert isinstance(text, str)
    return text


def tools_of(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The column `tools` of a row, or None: a list of JSON schemas, or one as JSON. DataError for anything else."""
    found = _column(row, "tools", where)
    if found is not None and not isinstance(found, list):
        raise DataError(
            f"{where} got {shown(found)} in the column 'tools'; it must be a list of JSON schemas, or None."
        )
    return found


def template_kwargs_of(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, common: Mapping[str, Any] | None, where: str
) -> dict[str, Any]:
    """`common`, the arguments of the configuration, and those of the row's column `chat_template_kwargs`, which come first."""
    own = _column(row, "chat_template_kwargs", where)
    if own is not None and not isinstance(own, dict):
        raise DataError(
            f"{where} got {shown(own)} in the column 'chat_template_kwargs'; it must be a dict of arguments, or None."
        )
    if own:
        check_template_kwargs(own, tokenizer, f"{where}, 'chat_template_kwargs'")
    return dict(common or {}) | (own or {})


def check_template_kwargs(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """ConfigError for an argument that the trainer sets, or that the chat template does not use."""
    template = tokenizer.chat_template
    text = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    valid = {"chat_template", *inspect.signature(tokenizer.apply_chat_template).parameters} - {
        *_SET_ELSEWHERE,
        "kwargs",
    }
    for name in given:
        if name in _SET_ELSEWHERE:
            instead = _SET_ELSEWHERE[name]
            fix = f"it is given by {instead}." if instead else "the trainer depends on its value."
            raise ConfigError(f"{where} got {name!r}; leave it out: {fix}")
        if name not in valid and not re.search(rf"\b{re.escape(name)}\b", text):
            hint = did_you_mean(name, {*valid, *re.findall(r"[a-z]\w*_\w+", text)} - {*_SET_ELSEWHERE})
            raise ConfigError(
                f"{where} got {name!r}, which the tokenizer's chat template does not use; leave it out.{hint}"
            )


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column, parsed if it is JSON, without the keys that are None: a dataset adds those of other rows."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{where} got {shown(value)} in the column {name!r}, which is not JSON ({error})."
            ) from None
    return _without_none(value) or None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
