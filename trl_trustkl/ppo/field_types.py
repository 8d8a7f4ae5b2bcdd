"""Whether a value is what a configuration field is annotated with: dataclasses do not look, YAML and JSON may say anything."""

from __future__ import annotations

import os
import types
import typing
from typing import Any

from ..errors import is_finite

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a dict",
    list: "a list",
    type(None): "None",
}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` may stand where `hint` is: truth values are no numbers, and a float is finite."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(each, parts[0]) for each in value)
    if hint is Any:  # `parallelism_config` in transformers 5.0
        return True
    if hint is float:
        return is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    return isinstance(value, origin or hint)


def unquoted(value: Any) -> str:
    """The fix for a number that arrived as text; "" for anything else."""
    try:
        number = isinstance(value, str) and is_finite(float(value))
    except ValueError:
        return ""
    return "Write the number without quotes; YAML reads 1e-5 as text and 1.0e-5 as a number." if number else ""


def in_words(hint: Any) -> str:
    """What `fits` asks for, for an error's reader."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(in_words(part) for part in parts))
    if origin is typing.Literal:
        return ", ".join(map(repr, parts))
    if origin is list:
        return f"a list with {in_words(parts[0])} in each place"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


def names(hint: Any) -> list[str] | None:
    """The names a field of names allows, None left out; None for any other field."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(parts) == 1:
        return names(parts[0])
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else None
