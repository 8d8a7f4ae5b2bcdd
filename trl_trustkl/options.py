"""The options of a configuration: declarations of fields in addition to type and default, and the checks derived from them."""

from __future__ import annotations

import enum
import json
import os
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, field, fields
from functools import cache
from typing import Any, NamedTuple

from .errors import ConfigError, is_finite, out_of_range, shown, unknown_name


class Range(NamedTuple):
    """The range of a number, or of each in a list: in words, and as a test of a finite number. The type says the rest."""

    valid: str
    holds: Callable[[Any], bool] = lambda x: x > 0


POSITIVE, COUNT = Range("a finite number > 0"), Range("an integer >= 1")
NOT_NEGATIVE, COUNT_OR_0 = (Range(f"{kind} >= 0", lambda x: x >= 0) for kind in ("a finite number", "an integer"))


class Option(NamedTuple):
    """The properties of a field in addition to its type, default and help text."""

    unit: str = ""
    off: str = ""  # the value that turns the mechanism off
    range: Range | None = None
    fix: str = ""  # the fix that an error suggests for a value outside the range
    names: Collection[str] = ()  # registered names, allowed in addition to those of the type
    group: str = ""  # the section of the documentation; "" for a field that other documentation describes


class _Help(str):
    """A help text with its option as an attribute: HfArgumentParser accepts only `help` in a field's metadata."""

    option: Option


def option(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field; `about`: the parts of its `Option`."""
    text = _Help(help)
    text.option = Option(**about)
    return field(default=default, metadata={"help": text})


_NATS = Range("a positive number of nats per token")
PER_TOKEN: dict[str, Any] = {"unit": "nats/token", "off": "None", "range": _NATS, "fix": "None turns it off."}
"""The arguments of `option` for a KL per token that may be None."""
OF_TOKEN: dict[str, Any] = PER_TOKEN | {"unit": "nats", "range": POSITIVE._replace(valid="a positive number of nats")}
"""The same for the KL of one token."""
PER_RESPONSE: dict[str, Any] = PER_TOKEN | {
    "unit": "nats/response", "range": POSITIVE._replace(valid="a positive number of nats per response"),
}  # fmt: skip
"""The same for a KL summed over a response."""


def inherited(base: type, name: str) -> tuple[Any, str]:
    """Default and help text of a base's field, for `option` where a subclass redeclares the field."""
    each = base.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return each.default, each.metadata["help"]


def about(each: Field[Any]) -> Option:
    """The option that a field was declared with; an empty one for any other field."""
    return getattr(each.metadata.get("help"), "option", Option())


@cache  # it takes a while
def typed_fields(config: type) -> list[tuple[Field[Any], Any]]:
    """The fields with their annotations, without those of which transformers accepts more than it declares."""
    hints = typing.get_type_hints(config)
    skipped = ("accelerator_config", "debug", "fsdp")
    return [(each, hints[each.name]) for each in fields(config) if each.name not in skipped]


@cache
def dict_fields(config: type, *, of_others: bool = False) -> list[str]:
    """The names of the options that take a dict, or JSON. of_others: as in `check_options`."""
    files = ("deepspeed", "fsdp_config")  # their text may also be the path of a file
    return [
        each.name
        for each, hint in typed_fields(config)
        if {dict, str} <= {typing.get_origin(part) or part for part in typing.get_args(hint)}
        and (about(each).group or (of_others and each.name not in files))
    ]


def unmasked(args: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of transformers' `to_dict`, which takes each field that ends in "_token" for a secret, with our fields among
    these as they are."""
    ours = {each.name: getattr(args, each.name) for each in fields(args) if about(each).group}
    return values | {name: value for name, value in ours.items() if name in values and name.endswith("_token")}


def check_options(args: Any, *, of_others: bool = True) -> None:
    """ConfigError for the first field whose value is not of its type, in its range, or one of its names. JSON becomes a dict,
    and an integer a float where the default is one.

    of_others: whether fields that were not declared by `option` with a group are checked too.
    """
    for name in dict_fields(args.__class__, of_others=of_others):
        if getattr(args, name) is not None:
            setattr(args, name, _as_dict(name, getattr(args, name)))
    for each, hint, own, declared in _checked_fields(args.__class__):
        value, known = getattr(args, each.name), [*declared, *own.names]
        if not (of_others or own.group):
            continue
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if value is None and (default is None or fits(None, hint)):
            continue
        if known and (isinstance(value, str) or not fits(value, hint)):
            if value not in known:
                raise unknown_name(each.name, value, known)
        elif not fits(value, hint) or not (own.range is None or _within(value, own.range)):
            valid = in_words(hint) if own.range is None else own.range.valid + ", or None" * fits(None, hint)
            raise out_of_range(each.name, value, valid, unquoted(value) or own.fix)
        elif isinstance(value, str) and not _is_unicode(value):
            raise out_of_range(each.name, value, "text that can be written as UTF-8")
        elif isinstance(value, int) and isinstance(default, float):
            setattr(args, each.name, float(value))  # torch and transformers reject an integer in some of these places


@cache
def _checked_fields(config: type) -> list[tuple[Field[Any], Any, Option, list[Any]]]:
    """The fields with their annotations, their options and the names that they declare; an option's may grow."""
    return [(each, hint, about(each), _declared(each, hint)) for each, hint in typed_fields(config)]


def _declared(each: Field[Any], hint: Any) -> list[Any]:
    """The names of a field's type and choices; none for a field that is not a name."""
    enums = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and issubclass(part, enum.Enum)]
    listed = [names(hint) or (), each.metadata.get("choices", ())]
    return [name for some in listed for name in some] + [name.value for one in enums for name in one]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    """A dict from a dict or a JSON object, as the command line passes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"`{name}` got {shown(value)}, which is not JSON ({error}); write an object such as '{{\"order\": 0.5}}'."
            ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"`{name}` got {shown(value)}; it must be a dict, or a JSON object as a string.")
    if not all(isinstance(key, str) for key in value):
        raise ConfigError(f"`{name}` got {shown(value)}; its keys must be the names of arguments, as text.")
    return dict(value)


def _within(value: Any, range: Range) -> bool:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(is_finite(number) and range.holds(number) for number in numbers)


# Types: dataclasses do not check them, and YAML and JSON may hold any.

_WORDS = {
    bool: "true or false", int: "an integer", float: "a finite number", str: "text", dict: "a dict", list: "a list",
    type(None): "None",
}  # fmt: skip


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: bools are not numbers, and a float must be finite."""
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
    """The fix for a number that was given as text; "" for anything else."""
    try:
        number = isinstance(value, str) and is_finite(float(value))
    except ValueError:
        return ""
    return "Write the number without quotes; YAML reads 1e-5 as text and 1.0e-5 as a number." if number else ""


def in_words(hint: Any) -> str:
    """The type that `fits` requires, for an error message."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(in_words(part) for part in parts))
    if origin is typing.Literal:
        return ", ".join(map(repr, parts))
    if origin is list:
        return f"a list with {in_words(parts[0])} in each place"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


def names(hint: Any) -> list[str] | None:
    """The names that a Literal, or an optional one, allows; None for any other type."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(parts) == 1:
        return names(parts[0])
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else None
