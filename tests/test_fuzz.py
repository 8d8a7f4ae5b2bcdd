"""Generated input: what is bad by construction is refused with one of our errors, what is good works.

Nothing here may hang, end in another exception than ours, or be accepted in silence. The summary of the test run says how
many bad inputs there were, each counted once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import random
import typing
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser
from trl import TrlParser

from tests import tiny
from tests.test_findings import completions_of, rows_of, write_run
from trl_trustkl import TrustKLPPOConfig, load_records
from trl_trustkl.controllers import CONTROLLERS
from trl_trustkl.divergences import ESTIMATORS, gradient_kind
from trl_trustkl.errors import ConfigError, DataError, RewardError, TrustKLError
from trl_trustkl.options import dict_fields, names, typed_fields
from trl_trustkl.records import BoundRecord
from trl_trustkl.report import read_run, write_report
from trl_trustkl.report.findings import FINDINGS
from trl_trustkl.rollout.prompts import check_prompts, collate, encode_prompt, token_limits, tokenize_prompts
from trl_trustkl.rollout.scorer import Scorer
from trl_trustkl.surrogates import SURROGATES
from trl_trustkl.types import Rollout

pytestmark = pytest.mark.filterwarnings("ignore")
NAN, INF, HUGE = math.nan, math.inf, 10**400
DICT_FIELDS = dict_fields(TrustKLPPOConfig)

reproducible = settings(
    derandomize=True,
    database=None,
    deadline=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def refuse(
    bad: st.SearchStrategy[Any], attempt: Callable[[Any], Any], error: type[Exception], examples: int
) -> set[str]:
    """Every example must end in `error`; returns them as text."""
    seen: set[str] = set()

    @settings(reproducible, max_examples=examples)
    @given(bad)
    def check(example: Any) -> None:
        seen.add(
            repr(type(example))
            + (str(len(seen)) if isinstance(example, int) and abs(example) > 1e300 else repr(example))
        )
        with pytest.raises(error) as caught:
            attempt(copy.copy(example))
        assert len(str(caught.value)) > 20, "an error has to say something"

    check()
    return seen


# -- configurations ----------------------------------------------------------------------------------------------------

text = st.text(max_size=20)
no_number = st.one_of(
    text,
    st.booleans(),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.just({}),
    st.just({"order": 0.5}),
    st.complex_numbers(),
    st.sampled_from(["nan", "1.0", "1e-5", b"1", (), HUGE, -HUGE, NAN, INF, -INF]),
    st.builds(object),
)


def above(limit: float) -> st.SearchStrategy[Any]:
    return st.floats(limit, exclude_min=True, allow_infinity=False) | st.integers(int(limit) + 1, 10**300)


def below(limit: float) -> st.SearchStrategy[Any]:
    return st.floats(max_value=limit, exclude_max=True, allow_infinity=False) | st.integers(
        -(10**300), math.ceil(limit) - 1
    )


at_most_0 = below(0) | st.sampled_from([0, 0.0, -0.0])
broken = st.floats(0.01, 100).filter(lambda x: x != int(x))
outside_0_1 = below(0) | above(1)
# Numbers that a field must refuse, beside what is no number at all.
OUT_OF_RANGE: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(["kl_coef", "trust_coef", "vf_coef", "learning_rate", "weight_decay", "adam_epsilon"], below(0)),
    **dict.fromkeys(["value_learning_rate", "missing_eos_penalty", "max_grad_norm"], below(0)),
    **dict.fromkeys(["kl_target", "trust_target", "trust_stop", "trust_max_kl", "trust_lr_target"], at_most_0),
    **dict.fromkeys(["temperature", "cliprange_high", "cliprange_value", "num_train_epochs"], at_most_0),
    **dict.fromkeys(["gamma", "lam"], outside_0_1),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], outside_0_1 | st.just(1.0)),
    "cliprange": outside_0_1 | st.sampled_from([0.0, 1.0]),
    "measure_fraction": outside_0_1 | st.just(0.0),
    "seed": below(0) | above(2**32 - 1) | broken,
    "max_steps": st.integers(max_value=-2) | st.just(0) | broken,
    "stop_token_id": below(0) | broken,
    **dict.fromkeys(
        [
            "kl_horizon",
            "num_ppo_epochs",
            "num_mini_batches",
            "response_length",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "local_rollout_forward_batch_size",
            "total_episodes",
            "dataset_num_proc",
        ],
        at_most_0 | broken,
    ),
}


def wrong_type(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that are not of a field's type, by its annotation."""
    if names(hint) is not None:
        return (text | st.integers() | st.lists(text, max_size=2) | st.just({})).filter(lambda x: x not in names(hint))
    parts = set(typing.get_args(hint)) or {hint}
    if parts & {int, float}:
        wrong = no_number if type(None) in parts else no_number | st.none()
        if float not in parts:  # an integer is one, however large
            wrong = wrong.filter(lambda x: type(x) is not int)
        return wrong if name not in OUT_OF_RANGE else wrong | OUT_OF_RANGE[name]
    if bool in parts and str not in parts:
        return text | st.integers() | st.floats() | st.lists(st.booleans(), max_size=2)
    if name == "reward_weights":
        return text | st.integers() | st.lists(no_number, min_size=1, max_size=3)
    if name in DICT_FIELDS:
        return bad_dict
    return st.binary(max_size=5) | st.floats() | st.integers() | st.complex_numbers()


no_json = text.filter(lambda t: not _is_json(t)) | st.sampled_from(["{", "{'order': 0.5}", "[" * 100_000, "9" * 5000])
bad_dict = st.one_of(
    no_json,
    st.integers(),
    st.floats(),
    st.lists(text, max_size=2),
    st.binary(max_size=5),
    st.sampled_from(["[]", "1", '"text"', "true", "NaN"]),
    st.dictionaries(st.integers() | st.none(), text, min_size=1, max_size=2),
)


def _is_json(given: str) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(given)
        return True
    return False


FIELDS = {f.name: hint for f, hint in typed_fields(TrustKLPPOConfig) if Any not in typing.get_args(hint)}


def test_every_field_refuses_what_it_cannot_be(record_property):
    assert FIELDS.keys() >= OUT_OF_RANGE.keys()
    refused = 0
    for name, hint in FIELDS.items():
        examples = 40 if name in OUT_OF_RANGE else 8

        def attempt(bad: Any, name: str = name) -> None:
            TrustKLPPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False} | {name: bad})

        refused += len(refuse(wrong_type(name, hint), attempt, ConfigError, examples))
    record_property("refused", refused)
    assert refused > 1000


def option(name: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda value: {name: value}, values)


not_positive = no_number | at_most_0
ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 1.0}
BAD_OPTIONS: dict[str, tuple[dict[str, Any], st.SearchStrategy[dict[str, Any]]]] = {
    "alpha": (
        {"kl_estimator": "alpha"},
        st.builds(lambda v: {"kl_estimator_kwargs": {"order": v}}, no_number | st.just(0) | st.just(1)),
    ),
    "unknown": (
        {},
        st.builds(
            lambda k, f: {f: {k: 1}},
            text,
            st.sampled_from(["kl_estimator_kwargs", "clip_kwargs", "kl_controller_kwargs"]),
        ),
    ),
    "adaptive": (
        ADAPTIVE,
        st.builds(
            lambda k, v: {"kl_controller_kwargs": {k: v}},
            st.sampled_from(["horizon", "clip", "min_coef"]),
            not_positive,
        ),
    ),
    "dual": ({"clip_rule": "dual"}, st.builds(lambda k, v: {"clip_kwargs": {k: v}}, text, no_number)),
    "generation": (
        {},
        st.builds(
            lambda d: {"generation_kwargs": d},
            st.one_of(
                option("top_p", below(0) | above(1) | st.sampled_from([NAN, INF, "much", [1]])),
                option("top_k", below(0) | st.sampled_from(["much", [1], 1.5, NAN])),
                option("min_p", below(0) | above(1) | st.sampled_from(["much", NAN])),
                option("repetition_penalty", below(0) | st.sampled_from(["much", NAN])),
                option("typical_p", below(0) | above(1)),
                st.dictionaries(text.filter(lambda t: not t.isidentifier()), st.integers(), min_size=1, max_size=2),
            ),
        ),
    ),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_options_of_a_mechanism_are_refused_where_they_cannot_work(kind, record_property):
    base, bad = BAD_OPTIONS[kind]
    record_property("refused", len(refuse(bad, lambda each: tiny.config("unused", **base | each), ConfigError, 60)))


# What a command line can say of a field; a number may be written as text there.
unreadable = text.filter(lambda t: not _is_number(t) and not t.startswith("-"))
BAD_FLAGS = st.one_of(
    st.tuples(st.sampled_from(sorted(OUT_OF_RANGE)), unreadable | st.sampled_from(["nan", "inf", "1e999", "-1.5"])),
    st.tuples(
        st.sampled_from([n for n, hint in FIELDS.items() if hint is bool]), st.sampled_from(["maybe", "2", "[]"])
    ),
    st.tuples(
        st.sampled_from([n for n, hint in FIELDS.items() if names(hint)]),
        unreadable.filter(lambda t: t not in ("eos",)),
    ),
    st.tuples(st.sampled_from(DICT_FIELDS), no_json.filter(lambda t: len(t) < 100 and not t.startswith("-"))),
)


def _is_number(given: str) -> bool:
    with contextlib.suppress(ValueError):
        float(given)
        return True
    return False


def test_flags_are_refused_by_the_parser_or_by_us(record_property):
    parser = HfArgumentParser(TrustKLPPOConfig)

    def attempt(flag: tuple[str, str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                parser.parse_args_into_dataclasses(["--output_dir", "unused", "--use_cpu", f"--{flag[0]}={flag[1]}"])
            except SystemExit as end:
                assert end.code == 2
                raise ConfigError("refused by the parser, which has said why") from None

    record_property("refused", len(refuse(BAD_FLAGS, attempt, ConfigError, 150)))


def test_yaml_is_refused_where_it_says_what_a_field_cannot_be(record_property, tmp_path):
    file = tmp_path / "config.yaml"
    bad_number = st.sampled_from(["[1]", "{a: 1}", ".nan", ".inf", "-3.0", "true"])
    lines = st.tuples(st.sampled_from(sorted(OUT_OF_RANGE.keys() - {"max_steps"})), bad_number)
    lines |= st.tuples(
        st.sampled_from([n for n, hint in FIELDS.items() if names(hint)]), st.sampled_from(["[k1]", "{}", "k9", "7"])
    )

    def attempt(line: tuple[str, str], parse: Callable[[], Any]) -> None:
        file.write_text(f"output_dir: unused\nuse_cpu: true\n{line[0]}: {line[1]}\n")
        parse()

    def plain() -> None:
        HfArgumentParser(TrustKLPPOConfig).parse_yaml_file(str(file))

    def trls() -> None:
        TrlParser(TrustKLPPOConfig).parse_args_and_config(["--config", str(file)])

    refused = len(refuse(lines, lambda line: attempt(line, plain), ConfigError, 30))
    record_property("refused", refused + len(refuse(lines, lambda line: attempt(line, trls), ConfigError, 15)))


positive = st.floats(1e-6, 1e6)
estimators = st.sampled_from([*ESTIMATORS, "exact"])
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "kl_coef": st.floats(1e-5, 1e3),
        "kl_controller": st.sampled_from(sorted(CONTROLLERS.keys() - {"schedule"})),
        "trust_coef": st.floats(1e-5, 1e3),
        "trust_controller": st.sampled_from(sorted(CONTROLLERS.keys() - {"schedule"})),
        "kl_estimator": estimators,
        "kl_placement": st.sampled_from(["reward", "loss", "both"]),
        "clip_rule": st.sampled_from(sorted(SURROGATES)),
        "cliprange": st.floats(0.01, 0.99),
        "trust_lr_target": positive,
        "trust_max_kl": positive,
        "seed": st.integers(0, 2**32 - 1),
        "generation_kwargs": st.sampled_from([None, {}, {"top_k": 5}, '{"top_p": 0.5, "repetition_penalty": 1.2}']),
        "gamma": st.floats(0, 1),
    },
)


@settings(reproducible, max_examples=40)
@given(GOOD, st.floats(0, 1e6), positive)
def test_a_configuration_that_is_accepted_can_build_every_piece(options, kl, target):
    for prefix in ("kl", "trust"):
        if options.get(f"{prefix}_controller", "fixed") != "fixed":
            options = {f"{prefix}_coef": 0.1} | options | {f"{prefix}_target": target}
    estimator, placement = options.get("kl_estimator", "k1"), options.get("kl_placement", "reward")
    if gradient_kind(estimator, placement) == "zero":
        with pytest.raises(ConfigError):
            tiny.config("unused", **options)
        return
    config = tiny.config("unused", **options)
    for controller in (config.build_kl_controller(), config.build_trust_controller(), config.build_lr_controller()):
        if controller is not None:
            state = controller.init()
            for measured in (kl, 0.0, target, kl):
                state = controller.update(state, kl=measured, episodes=8)
                assert math.isfinite(state.coef) and state.coef >= 0
    logp, old = torch.linspace(-5, -0.1, 6).view(2, 3), torch.linspace(-4, -0.2, 6).view(2, 3)
    surrogate = config.build_surrogate()(logp - old, torch.ones(2, 3), torch.ones(2, 3).bool(), old_logp=old)
    assert surrogate.objective.isfinite().all() and ((surrogate.gated >= 0) & (surrogate.gated <= 1)).all()
    if (estimate := config.build_kl_estimator()) is not None:
        assert estimate(logp, old).isfinite().all()
    config.build_penalties(0.1, 0.1)
    json.dumps(config.to_dict())
    assert dataclasses.replace(config).to_dict() == config.to_dict()


# -- prompts and datasets ----------------------------------------------------------------------------------------------

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


def test_prompts_that_cannot_be_are_refused(record_property):
    refused = refuse(bad_prompt, lambda prompt: encode_prompt(prompt, TOKENIZER), DataError, 250)
    record_property("refused", len(refused))


@settings(reproducible, max_examples=60)
@given(st.lists(good_message, min_size=1, max_size=3) | unicode_text.filter(str.strip))
def test_any_text_and_any_conversation_become_tokens(prompt):
    ids = encode_prompt(prompt, TOKENIZER)
    assert ids and all(0 <= token < tiny.VOCAB for token in ids)


def test_a_template_that_refuses_a_conversation_is_quoted():
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
bad_columns = st.one_of(
    st.builds(lambda bad: {"input_ids": [bad]}, bad_ids),
    st.builds(lambda bad: {"input_ids": [[3, 4, 5]], "attention_mask": [bad]}, bad_mask),
    st.builds(lambda name: {name: ["w1 w2"]}, text.filter(lambda t: t not in ("prompt", "input_ids"))),
    st.builds(lambda bad: {"prompt": ["w1", bad]}, st.none() | st.sampled_from(["", " ", "\n"])),
    st.builds(lambda bad: {"prompt": [[{"role": "user", "content": "w1"}], bad]}, st.none() | st.just([])),
    st.sampled_from([{"prompt": []}, {"input_ids": []}, {}, {"prompt": [1, 2]}, {"prompt": [1.5]}, {"prompt": [True]}]),
)


@pytest.fixture
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_datasets_that_cannot_be_are_refused(record_property, quiet_datasets):
    room = token_limits(tiny.llama(), {})

    def attempt(columns: dict[str, Any]) -> None:
        dataset = tokenize_prompts(datasets.Dataset.from_dict(columns), TOKENIZER, name="train_dataset")
        check_prompts(dataset, room, 6, name="train_dataset")

    record_property("refused", len(refuse(bad_columns, attempt, DataError, 150)))
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
    assert prompts.mask[:, -1].all(), "padding is on the left"


# -- rewards -----------------------------------------------------------------------------------------------------------

COUNT = 4


def scores_of(*functions: Any, weights: list[float] | None = None) -> list[float]:
    empty = torch.zeros(COUNT, 1)
    rollout = Rollout(empty.long(), empty.bool(), empty.long(), empty.bool(), None, None)
    weights = weights or [1.0] * len(functions)
    words = [f"w{i}" for i in range(COUNT)]
    scorer = Scorer(functions, weights, batch_size=2)
    scores = scorer(rollout, prompts=words, completions=words, completion_ids=[[3]] * COUNT, state=None)
    return scores.total.tolist()


class Hostile:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("no")

    def __repr__(self) -> str:
        raise self.error("no")


def endless() -> Any:
    yield from itertools.count()


def breaks_off() -> Any:
    yield 1.0
    raise KeyError("half way")


def raising(error: type[Exception]) -> Any:
    def function(prompts, completions, **_):
        raise error("no")

    return function


def hostile(error: type[Exception], place: int) -> Any:
    return lambda prompts, completions, **_: [0.0] * place + [Hostile(error)] + [0.0] * (COUNT - 1 - place)


number = st.floats(-1e6, 1e6, width=32)
bad_reward = st.one_of(
    st.sampled_from(
        [NAN, INF, -INF, 1e39, -1e300, HUGE, -HUGE, "0.5", "good", b"1", [1.0], (1.0,), {}, {"r": 1.0}, 1j, object()]
    ),
    text,
    st.binary(max_size=4),
    st.lists(number, max_size=3),
    st.complex_numbers(),
    st.builds(lambda x: torch.tensor([x]), number),
    st.builds(lambda x: np.array([x]), number),
    st.just(torch.tensor(NAN)),
    st.just(np.float32("inf")),
    st.just(torch.ones(2)),
    st.just(int),
    st.just(Fraction(10**400)),
)
few = st.lists(number, max_size=9).filter(lambda some: len(some) != COUNT)
bad_return = st.one_of(
    few,
    few.map(torch.tensor),
    few.map(np.array),
    few.map(tuple),
    few.map(iter),
    st.none(),
    number,
    text,
    st.binary(),
    st.sets(number),
    st.dictionaries(text, number, max_size=5),
    st.booleans(),
    st.lists(number, min_size=COUNT, max_size=COUNT).map(lambda r: torch.tensor(r).view(2, 2)),
    st.lists(number, min_size=COUNT, max_size=COUNT).map(lambda r: np.array([r])),
    st.tuples(st.integers(0, COUNT - 1), bad_reward).map(lambda p: [0.0] * p[0] + [p[1]] + [0.0] * (COUNT - 1 - p[0])),
    st.sampled_from([torch.tensor(1.0), np.array(1.0), torch.full((COUNT,), NAN), np.full(COUNT, INF), object(), len]),
)
returned = bad_return.map(lambda value: lambda prompts, completions, **_: value)


def eventually(value: Any) -> Any:
    async def function(prompts, completions, **_):
        return value

    return function


ERRORS = st.sampled_from(
    [ValueError, KeyError, RuntimeError, ZeroDivisionError, MemoryError, StopIteration, AssertionError]
)
bad_function = st.one_of(
    st.builds(raising, ERRORS),
    st.builds(hostile, ERRORS, st.integers(0, COUNT - 1)),
    st.sampled_from(
        [
            lambda prompts, completions, **_: endless(),
            lambda prompts, completions, **_: breaks_off(),
            lambda: [0.0] * COUNT,
            lambda text: [0.0] * COUNT,
            len,
            max,
            str,
            lambda **_: (raising(ValueError) for _ in "abcd"),
        ]
    ),
)


def test_rewards_that_cannot_be_are_refused(record_property):
    refused = len(refuse(bad_return, lambda v: scores_of(lambda prompts, completions, **_: v), RewardError, 300))
    refused += len(refuse(bad_return, lambda v: scores_of(eventually(v)), RewardError, 30))
    refused += len(refuse(bad_function, scores_of, RewardError, 40))
    too_much = st.floats(1e30, 1e38).map(lambda weight: [weight, weight])
    ones = lambda prompts, completions, **_: [1e30] * COUNT  # noqa: E731
    refused += len(refuse(too_much, lambda weights: scores_of(ones, ones, weights=weights), RewardError, 10))
    record_property("refused", refused)


CONTAINERS = [
    list,
    tuple,
    iter,
    lambda r: (x for x in r),
    np.array,
    torch.tensor,
    lambda r: torch.tensor(r).view(-1, 1),
]
CONTAINERS += [
    lambda r: [np.float64(x) for x in r],
    lambda r: [torch.tensor(x) for x in r],
    lambda r: np.array(r)[:, None],
]


@settings(reproducible, max_examples=80)
@given(st.lists(number, min_size=COUNT, max_size=COUNT), st.sampled_from(CONTAINERS), number, st.booleans())
def test_rewards_in_any_container_are_the_numbers_they_are(rewards, container, weight, waits):
    function = eventually(container(rewards)) if waits else lambda prompts, completions, **_: container(rewards)
    assert scores_of(function, weights=[weight]) == pytest.approx([weight * r for r in rewards], rel=1e-6, abs=1e-30)


@settings(reproducible, max_examples=40)
@given(*[st.lists(st.none() | st.booleans() | number, min_size=COUNT, max_size=COUNT)] * 2)
def test_a_row_keeps_the_rewards_it_has(one, other):
    functions = [lambda prompts, completions, r=r, **_: list(r) for r in (one, other)]
    for score, pair in zip(scores_of(*functions), zip(one, other, strict=True), strict=True):
        known = [float(r) for r in pair if r is not None]
        assert score == pytest.approx(sum(known), rel=1e-6) if known else math.isnan(score)


# -- records -----------------------------------------------------------------------------------------------------------

RECORD = json.loads(json.dumps(rows_of(1)[0]))


def places(schema: Any = BoundRecord, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key of a record with its type, the parts that have keys of their own included."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, hint in typing.get_type_hints(schema).items():
        found.append(((*path, name), hint))
        if hasattr(hint, "_fields"):
            found += places(hint, (*path, name))
    return found


def misfit(hint: Any) -> st.SearchStrategy[Any]:
    """JSON that is not of this type. (null stands for a number that is not finite, so it is one.)"""
    optional, parts = type(None) in typing.get_args(hint), set(typing.get_args(hint)) or {hint}
    other = st.lists(st.integers(), max_size=2) if optional else st.lists(st.integers(), max_size=2) | st.just(MISSING)
    if hasattr(hint, "_fields"):  # unknown keys are left out, and an object of them may be one with nothing known
        return st.one_of(other, text, st.integers(), st.booleans(), st.none())
    if hint == dict[str, float]:
        return st.one_of(other, text, st.integers(), st.booleans(), st.none(), st.just({"0.5": "much"}))
    if dict[str, float] in parts:
        return st.one_of(other, text, st.integers(), st.booleans(), st.just({"0.5": "much"}))
    if bool in parts:
        return st.one_of(other, text, st.integers(), st.none(), st.just({}))
    if str in parts:
        return st.one_of(other, st.integers(), st.booleans(), st.floats(0, 1), st.just({}))
    if int in parts:
        return st.one_of(
            other, text, st.booleans(), st.none(), st.floats(0, 9), st.integers(max_value=-1), st.just(2**60)
        )
    return st.one_of(other, text, st.booleans(), st.just({}), st.just(10**400))


MISSING = object()
PLACES = places()
bad_key = st.sampled_from(PLACES).flatmap(lambda place: st.tuples(st.just(place[0]), misfit(place[1])))
bad_line = st.one_of(
    text.filter(lambda t: t.strip() and not _is_json(t) and "\n" not in t and "\r" not in t),
    st.sampled_from(
        ["[]", "1", "null", '"text"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"update": 1', "NaN", "{]"]
    ),
)


def with_value(path: tuple[str, ...], value: Any) -> str:
    row = copy.deepcopy(RECORD)
    place = row
    for step in path[:-1]:
        place = place[step]
    if value is MISSING:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = value
    return json.dumps(row)


def test_records_that_cannot_be_are_refused(record_property, tmp_path):
    folder = write_run(tmp_path, rows_of(4))
    first, *others = (folder / "bounds.jsonl").read_bytes().splitlines(keepends=True)

    def read(line: str) -> None:
        (folder / "bounds.jsonl").write_bytes(first + line.encode("utf-8", "surrogatepass") + b"\n" + b"".join(others))
        read_run(folder)

    refused = len(refuse(bad_key, lambda pair: read(with_value(*pair)), DataError, 300))
    refused += len(refuse(bad_line, read, DataError, 60))
    record_property("refused", refused)


def mutated(content: bytes, seed: int) -> bytes:
    """The file with a few bytes or pieces of it changed, lost, doubled or moved."""
    chance, result = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 2)):
        at, length = chance.randrange(len(result)), chance.randint(1, 40)
        piece = result[at : at + length]
        change = chance.choice(["flip", "lose", "double", "move", "replace", "end"])
        if change == "flip":
            result[at] ^= 1 << chance.randrange(8)
        elif change == "lose":
            del result[at : at + length]
        elif change == "double":
            result[at:at] = piece
        elif change == "move":
            del result[at : at + length]
            place = chance.randrange(len(result))
            result[place:place] = piece
        elif change == "replace":
            result[at : at + 1] = chance.choice(
                [b"NaN", b"-Infinity", b"1e999", b"null", b"{}", b"\x00", b"\xff", b"\n", b'"']
            )
        else:
            del result[at:]
            result += b"\n" if not result else b""
    return bytes(result)


def read_mutated(folder: Any, seed: int) -> Any:
    rows = rows_of(4)
    write_run(folder, rows, completions_of(rows))
    file = folder / ("completions.jsonl" if seed % 4 == 0 else "bounds.jsonl")
    file.write_bytes(mutated(file.read_bytes(), seed))
    with contextlib.suppress(TrustKLError):
        load_records(folder)
    try:
        return read_run(folder)
    except TrustKLError:
        return None


def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path):
    read = 0
    for seed in range(400):
        if (run := read_mutated(tmp_path, seed)) is not None:
            read += 1
            for finding in FINDINGS.values():
                finding(run)
    assert 20 < read < 380, "the changes are all harmless, or all fatal"


@pytest.mark.slow
def test_a_file_with_changed_bytes_has_a_report_where_it_is_read(tmp_path):
    runs = [read_mutated(tmp_path / str(seed), seed) for seed in range(400)]
    for run in [run for run in runs if run is not None][:30]:
        assert write_report([run]).stat().st_size > 1000


def test_a_path_without_records_is_refused(tmp_path):
    (tmp_path / "bounds.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nul\0", "", tmp_path / "bounds.jsonl"):
        for reader in (load_records, read_run):
            with pytest.raises(DataError):
                reader(path)
