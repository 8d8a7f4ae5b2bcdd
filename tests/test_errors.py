"""The texts of errors and the names that they suggest."""

from __future__ import annotations

import math
import signal

import pytest

from tests.messages import assert_says
from trl_trustkl.errors import (
    LONGEST_SHOWN,
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MissingPackageError,
    ModelError,
    NonFiniteRewardError,
    NotAvailableYetError,
    RefusedError,
    RewardError,
    SaveError,
    TrustKLError,
    check_options,
    did_you_mean,
    is_finite,
    option_names,
    out_of_range,
    require_packages,
    shown,
    unknown_name,
)


def test_reading_a_message_can_fail():
    with pytest.raises(ConfigError) as error:
        raise out_of_range("field", 3, "in [0, 1]")
    with pytest.raises(AssertionError, match="is missing in"):
        assert_says(error, "in [0, 2]")


def test_only_a_near_name_is_suggested() -> None:
    assert did_you_mean("--kl_cof", ["--kl_coef", "--lam"], show=str) == " Did you mean --kl_coef?"
    assert did_you_mean("spo", {"ppo": 1, "none": 2}) == " Did you mean 'ppo'?"
    assert did_you_mean("gspo", ["none", "cispo"]) == " Did you mean 'cispo'?"
    assert did_you_mean("elephant", ["none", "ppo"]) == ""


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, RewardError, CheckpointError])
def test_errors_of_input_can_be_caught_as_python_does(kind):
    assert issubclass(kind, TrustKLError) and issubclass(kind, ValueError)


def test_all_packages_that_are_missing_are_named_and_installed_at_once():
    require_packages("A report", "math", "signal")
    with pytest.raises(MissingPackageError) as error:
        require_packages("A report", "no_such", "math", "nor_this")
    assert str(error.value) == (
        "A report needs no_such and nor_this, which are not installed. Fix: pip install no_such nor_this"
    )
    assert isinstance(error.value, ImportError)


def test_other_errors_have_the_types_that_python_has_for_them():
    assert issubclass(SaveError, OSError) and issubclass(SaveError, TrustKLError)
    assert issubclass(NotAvailableYetError, NotImplementedError) and issubclass(NotAvailableYetError, ConfigError)
    assert issubclass(NonFiniteRewardError, RewardError) and issubclass(RefusedError, RuntimeError)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interruption_exits_with_the_signal_s_status(number, status):
    interrupted = Interrupted(number)
    assert isinstance(interrupted, SystemExit) and not isinstance(interrupted, Exception)
    assert (interrupted.code, interrupted.signal) == (status, number)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


def test_a_long_value_is_shortened_and_an_unprintable_one_named():
    assert shown("abc") == "'abc'"
    assert len(shown("x" * 1000)) == LONGEST_SHOWN + 1 and shown("x" * 1000).endswith("…")
    assert shown(Unprintable()) == "a value of type Unprintable that cannot be printed"
    assert shown(10**5000) == "a value of type int that cannot be printed"


@pytest.mark.parametrize("value", [0, -1.5, 2**70, 1e308])
def test_finite_numbers(value):
    assert is_finite(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, "1", None, 1j])
def test_values_that_are_not_finite_numbers(value):
    assert not is_finite(value)


def test_an_unknown_name_is_answered_with_the_known_ones():
    said = "`rule` got 'roll-back'; it must be one of 'ppo', 'rollback'. Did you mean 'rollback'?"
    assert str(unknown_name("rule", "roll-back", ["rollback", "ppo"])) == said
    assert str(unknown_name("rule", 3, ["ppo"])) == "`rule` got 3; it must be one of 'ppo'."


def test_a_number_out_of_range_is_answered_with_the_range_and_the_fix():
    assert str(out_of_range("lam", 2, "in [0, 1]", "Use 1.")) == "`lam` got 2; it must be in [0, 1]. Use 1."
    assert str(out_of_range("lam", 2, "in [0, 1]")) == "`lam` got 2; it must be in [0, 1]."


def test_options_are_the_keyword_only_arguments_of_a_formula():
    def formula(ratio, *, order, delta=2.0):
        raise AssertionError

    assert option_names(formula) == ["order", "delta"]
    check_options("kwargs", "alpha", option_names(formula), {"order": 1})
    with pytest.raises(
        ConfigError, match="`kwargs` got 'oder'; it must be one of 'delta', 'order'. Did you mean 'order'?"
    ):
        check_options("kwargs", "alpha", option_names(formula), {"order": 1, "oder": 2})
    with pytest.raises(ConfigError, match="`kwargs` got 'order', but 'k1' takes no options; leave it empty."):
        check_options("kwargs", "k1", [], {"order": 1})
