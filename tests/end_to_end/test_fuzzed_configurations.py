"""Generated configurations, flags and YAML files: bad ones are rejected with an error of this package, good ones work."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import random
import shutil
import signal
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser
from trl import TrlParser

from tests import tiny
from tests.end_to_end.fuzzing import HUGE, INF, NAN, above, below, check_rejected, is_json, reproducible, text
from trl_trustkl import BoundReportCallback, TrustKLPPOConfig, TrustKLPPOTrainer
from trl_trustkl.controllers import CONTROLLERS
from trl_trustkl.divergences import ESTIMATORS, gradient_kind
from trl_trustkl.errors import ConfigError, TrustKLError
from trl_trustkl.options import dict_fields, names, typed_fields
from trl_trustkl.surrogates import SURROGATES

pytestmark = pytest.mark.filterwarnings("ignore")

DICT_FIELDS = dict_fields(TrustKLPPOConfig)

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

at_most_0 = below(0) | st.sampled_from([0, 0.0, -0.0])
broken = st.floats(0.01, 100).filter(lambda x: x != int(x))
outside_0_1 = below(0) | above(1)
# Numbers that a field must reject, in addition to values that are not numbers.
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
    """Values that do not fit the annotation of a field."""
    if names(hint) is not None:
        return (text | st.integers() | st.lists(text, max_size=2) | st.just({})).filter(lambda x: x not in names(hint))
    parts = set(typing.get_args(hint)) or {hint}
    if parts & {int, float}:
        wrong = no_number if type(None) in parts else no_number | st.none()
        if float not in parts:  # any integer is valid, however large
            wrong = wrong.filter(lambda x: type(x) is not int)
        return wrong if name not in OUT_OF_RANGE else wrong | OUT_OF_RANGE[name]
    if bool in parts and str not in parts:
        return text | st.integers() | st.floats() | st.lists(st.booleans(), max_size=2)
    if name == "reward_weights":
        return text | st.integers() | st.lists(no_number, min_size=1, max_size=3)
    if name in DICT_FIELDS:
        return bad_dict
    return st.binary(max_size=5) | st.floats() | st.integers() | st.complex_numbers()


no_json = text.filter(lambda t: not is_json(t)) | st.sampled_from(["{", "{'order': 0.5}", "[" * 100_000, "9" * 5000])
bad_dict = st.one_of(
    no_json,
    st.integers(),
    st.floats(),
    st.lists(text, max_size=2),
    st.binary(max_size=5),
    st.sampled_from(["[]", "1", '"text"', "true", "NaN"]),
    st.dictionaries(st.integers() | st.none(), text, min_size=1, max_size=2),
)

FIELDS = {f.name: hint for f, hint in typed_fields(TrustKLPPOConfig) if Any not in typing.get_args(hint)}


def test_every_field_rejects_invalid_values(record_property):
    assert FIELDS.keys() >= OUT_OF_RANGE.keys()
    rejected = 0
    for name, hint in FIELDS.items():
        examples = 20 if name in OUT_OF_RANGE else 6

        def attempt(bad: Any, name: str = name) -> None:
            TrustKLPPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False} | {name: bad})

        rejected += len(check_rejected(wrong_type(name, hint), attempt, ConfigError, examples))
    record_property("rejected", rejected)
    assert rejected > 1000


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
def test_options_of_a_mechanism_that_cannot_work_are_rejected(kind, record_property):
    base, bad = BAD_OPTIONS[kind]
    record_property(
        "rejected", len(check_rejected(bad, lambda each: tiny.config("unused", **base | each), ConfigError, 60))
    )


# Values on a command line, where numbers are written as text.
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


def test_bad_flags_are_rejected_by_the_parser_or_the_package(record_property):
    parser = HfArgumentParser(TrustKLPPOConfig)

    def attempt(flag: tuple[str, str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                parser.parse_args_into_dataclasses(["--output_dir", "unused", "--use_cpu", f"--{flag[0]}={flag[1]}"])
            except SystemExit as end:
                assert end.code == 2
                raise ConfigError("rejected by the parser, which printed the reason") from None

    record_property("rejected", len(check_rejected(BAD_FLAGS, attempt, ConfigError, 150)))


def test_yaml_with_invalid_values_is_rejected(record_property, tmp_path):
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

    rejected = len(check_rejected(lines, lambda line: attempt(line, plain), ConfigError, 30))
    record_property(
        "rejected", rejected + len(check_rejected(lines, lambda line: attempt(line, trls), ConfigError, 15))
    )


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


# -- every field, from the configuration to the first update -----------------------------------------------------------

LARGE = 2**63
BATTERY: list[Any] = [
    None, "", "text", "nan", "1", "no", "epoch", "{", "{}", "[]", '{"a": 1}', "\0", "\ud800", "w" * 100_000, b"x",
    -1, 0, 1, 2, LARGE, -LARGE, HUGE, 1.5, 0.5, -0.5, 1e-300, 1e300, INF, -INF, NAN, 1j, True, False, object(),
    [], [1], ["a"], [None], (), ("a",), {1}, {}, {"a": 1}, {1: 2},
]  # fmt: skip
NAMES = [each.name for each in dataclasses.fields(TrustKLPPOConfig)]
NAMED_INSTEAD = {"load_best_model_at_end": "metric_for_best_model"}
ENDLESS = ("num_ppo_epochs", "max_steps", "total_episodes", "num_train_epochs")
TINIEST = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1,
    "max_steps": 1, "response_length": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 1,
}  # fmt: skip


@pytest.fixture
def contained(tmp_path, monkeypatch) -> None:
    """In an empty folder, without the Hub, and without a field that changes the entire process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *_, **__: None)
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(transformers.trainer, "enable_full_determinism", transformers.set_seed)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def only_errors_that_name(name: str) -> Iterator[None]:
    """Suppress an error of this package about a field."""
    with at_most(60), warnings.catch_warnings(action="ignore"):
        try:
            yield
        except TrustKLError as error:
            said = str(error).lower()
            assert name in said or NAMED_INSTEAD.get(name, name) in said, error


def accepted(name: str) -> list[Any]:
    """The values of the battery with which a configuration can be made."""
    given = []
    for value in BATTERY:
        with only_errors_that_name(name):
            TrustKLPPOConfig(
                **{"output_dir": "run", "use_cpu": True, "bf16": False, "report_to": "none"} | {name: value}
            )
            given.append(value)
    return given


def built(name: str, value: Any) -> Any:
    args = TrustKLPPOConfig(**tiny.QUIET | {"output_dir": "run"} | TINIEST | {name: value})
    return TrustKLPPOTrainer(
        args=args, model=tiny.llama(num_hidden_layers=1), processing_class=tiny.tokenizer(), peft_config=tiny.lora(),
        reward_funcs=tiny.good_words, train_dataset=tiny.prompts(4), eval_dataset=tiny.prompts(2),
        callbacks=[BoundReportCallback(report=False)],
    )  # fmt: skip


def train(name: str, value: Any) -> None:
    """One update with a value that a configuration accepts, except where a large value asks for a run without an end."""
    with only_errors_that_name(name), contextlib.redirect_stdout(io.StringIO()):
        trainer = built(name, value)
        if name not in ENDLESS or not value or value < LARGE:
            trainer.train()


@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_a_field_is_rejected_by_name_or_can_be_trained_with(name):
    """The configuration gets every value, a trainer one of those that it accepts, and one trainer in three trains."""
    chosen = random.Random(name)
    if not (values := accepted(name)):
        return
    if chosen.random() < 1 / 3:
        train(name, chosen.choice(values))
    else:
        with only_errors_that_name(name):
            built(name, chosen.choice(values))


@pytest.mark.slow
@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize("name", NAMES)
def test_every_value_that_a_configuration_accepts_can_be_trained_with(name):
    for value in accepted(name):
        train(name, value)
        shutil.rmtree("run", ignore_errors=True)
