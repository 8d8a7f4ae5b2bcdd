"""Checks of a dataclass's options by their types and ranges."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, Literal

import pytest

from trl_trustkl.errors import ConfigError
from trl_trustkl.options import (
    COUNT,
    POSITIVE,
    Option,
    Range,
    about,
    check_options,
    dict_fields,
    fits,
    in_words,
    inherited,
    names,
    option,
    typed_fields,
    unquoted,
)


@dataclasses.dataclass
class Other:
    """Options of a configuration that is not PPO's."""

    size: int | None = option(None, "A size.", range=COUNT, fix="None: all.", group="a")
    width: float = option(1.0, "A width.", range=POSITIVE, fix="Use 1.")
    kind: Literal["a", "b"] = option("a", "A kind.", names={"c": 3})
    extra: dict | str | None = option(None, "A dict.", group="a")
    plain: bool = True


def test_the_checks_are_those_of_any_dataclass():
    for good in (
        {"size": 3},
        {"width": 2},
        {"kind": "c"},
        {"extra": {"a": 1}},
        {"extra": '{"a": 1}'},
        {"plain": False},
    ):
        check_options(other := Other(**good))
        assert other.extra in (None, {"a": 1})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"size": 0}, "`size` got 0; it must be an integer >= 1, or None. None: all."),
        ({"size": 1.5}, "`size` got 1.5; it must be an integer >= 1, or None. None: all."),
        ({"width": None}, "`width` got None; it must be a finite number > 0. Use 1."),
        ({"width": float("inf")}, "`width` got inf; it must be a finite number > 0. Use 1."),
        ({"kind": "d"}, "`kind` got 'd'; it must be one of 'a', 'b', 'c'."),
        ({"extra": "["}, "`extra` got '[', which is not JSON"),
        ({"plain": 1}, "`plain` got 1; it must be true or false."),
    ],
)
def test_the_checks_say_what_a_field_may_be(bad, message):
    with pytest.raises(ConfigError) as error:
        check_options(Other(**bad))
    assert str(error.value).startswith(message)


class Size(enum.StrEnum):
    SMALL = "small"
    LARGE = "large"


@dataclasses.dataclass
class Named(Other):
    """Fields whose names come from their annotation, their metadata or their option."""

    size_by_name: Size | str = Size.SMALL
    color: str = dataclasses.field(default="red", metadata={"choices": ["red", "blue"]})
    shape: str | None = option(None, "A shape.", names={"round": 1})
    title: str = ""
    more: dict[str, Any] | str | None = None
    deepspeed: dict | str | None = None


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ({"size_by_name": "large"}, {"size_by_name": "medium"}, "it must be one of 'large', 'small'."),
        ({"size_by_name": Size.LARGE}, {"size_by_name": 3}, "it must be one of 'large', 'small'."),
        ({"color": "blue"}, {"color": "bleu"}, "it must be one of 'blue', 'red'. Did you mean 'blue'?"),
        ({"shape": "round"}, {"shape": ["round"]}, "it must be one of 'round'."),
        ({"title": "ö"}, {"title": "\ud800"}, "it must be text that can be written as UTF-8."),
        ({"more": '{"a": 1}'}, {"more": "{"}, "which is not JSON"),
        ({"deepspeed": "file.json"}, {"deepspeed": 1}, "it must be a dict, or text, or None."),
    ],
)
def test_names_and_text_are_checked(good, bad, said):
    check_options(Named(**good))
    with pytest.raises(ConfigError) as error:
        check_options(Named(**bad))
    assert said in str(error.value) and f"`{next(iter(bad))}` got" in str(error.value)


def test_an_integer_becomes_a_float_where_the_default_is_one():
    check_options(given := Other(width=2, size=3))
    assert [type(value) for value in (given.width, given.size)] == [float, int]


def test_json_of_fields_without_a_group_is_read_unless_it_may_be_a_file():
    assert dict_fields(Named) == ["extra"] and dict_fields(Named, of_others=True) == ["extra", "more"]
    check_options(given := Named(more='{"a": 1}', deepspeed='{"a": 1}'))
    assert (given.more, given.deepspeed) == ({"a": 1}, '{"a": 1}')
    check_options(given := Named(more='{"a": 1}', color="green"), of_others=False)
    assert given.more == '{"a": 1}'


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (bool, [True], [1, "true"], "true or false"),
        (int, [3, 10**400], [True, 3.0], "an integer"),
        (float, [1.5, 2], [float("nan"), True, "1.5", 10**400], "a finite number"),
        (str, ["a", Path("a")], [b"a"], "text"),
        (float | None, [None, 1.0], ["None"], "a finite number, or None"),
        (list[float], [[], [1, 2.5], (1.0,)], [[None], 1.0], "a list with a finite number in each place"),
        (dict | str | None, [{}, "a", None], [[1]], "a dict, or text, or None"),
        (Literal["a", 1], ["a", 1], [True, "b"], "'a', 1"),
        (Any, [None, object()], [], "Any"),
    ],
)
def test_a_value_fits_its_annotation_and_the_annotation_is_put_into_words(hint, good, bad, words):
    assert all(fits(value, hint) for value in good) and not any(fits(value, hint) for value in bad)
    assert in_words(hint) == words


@pytest.mark.parametrize(
    ("hint", "wanted"),
    [
        (Literal["a", "b"], ["a", "b"]),
        (Literal["a"] | None, ["a"]),
        (str, None),
        (Literal["a"] | str, None),
        (int | None, None),
    ],
)
def test_the_names_of_a_field_are_those_of_its_literal(hint, wanted):
    assert names(hint) == wanted


@pytest.mark.parametrize(
    ("value", "hinted"),
    [("1e-5", True), ("3", True), ("-1", True), ("nan", False), ("inf", False), ("much", False), (3, False)],
)
def test_a_number_in_quotes_is_recognised(value, hinted):
    assert ("without quotes" in unquoted(value)) == hinted


@dataclasses.dataclass
class Narrower(Other):
    """Declares a field of its base again, with the default and the help text of the base."""

    width: float = option(*inherited(Other, "width"), range=Range("below 1", lambda x: x < 1), group="b")


def test_a_field_declared_again_keeps_default_and_help_and_has_the_new_range():
    fields = {field.name: field for field in dataclasses.fields(Narrower)}
    assert (fields["width"].default, fields["width"].metadata["help"]) == (1.0, "A width.")
    assert about(fields["width"]).group == "b" and about(fields["size"]).range is COUNT
    assert about(fields["plain"]) == Option(), "a plain field has an option"
    check_options(Narrower(width=0.5))
    with pytest.raises(ConfigError, match="`width` got 2.0; it must be below 1"):
        check_options(Narrower(width=2.0))


def test_dicts_are_found_by_their_annotation_and_group_and_need_text_as_keys():
    assert dict_fields(Other) == ["extra"]
    field, hint = typed_fields(Other)[0]
    assert (field.name, hint) == ("size", int | None)
    with pytest.raises(ConfigError, match="`extra` got {1: 2}; its keys must be the names of arguments"):
        check_options(Other(extra={1: 2}))


NAMES = {"one": 1}


@dataclasses.dataclass
class Growing:
    name: str = option("one", "A name that others may add to.", names=NAMES, group="a")


def test_a_name_that_is_added_later_is_accepted(monkeypatch):
    with pytest.raises(ConfigError, match="`name` got 'two'; it must be .*'one'"):
        check_options(Growing("two"))
    monkeypatch.setitem(NAMES, "two", 2)
    check_options(Growing("two"))
