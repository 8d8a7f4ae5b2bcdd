"""Controllers of a penalty's coefficient β: they watch a KL divergence and move β so that it meets a target.

Control is state in, state out: `state = controller.init()`, then once per update `state = controller.update(state,
kl=measured, episodes=seen_since_the_last_update)`, and `state.coef` is the next coefficient. A controller is a frozen
dataclass and a state a NamedTuple of Python numbers, so both can be compared, logged and saved.

Units are the caller's: `kl` and `target` in nats per response for the anchor, nats per token for the trust region;
the rules see only their quotient. `update` applies the published rule to the number it is given, a negative estimate
included (all of these then lower β as for a KL below the target). A KL that is not finite is a DataError, for every
controller.

A coefficient stays within [`min_coef`, `max_coef`]. Nothing accumulates beyond the clamp: the stored quantity is
clamped itself, so a coefficient that was saturated for a thousand updates leaves the clamp on the first update that
asks for it. The floor of the rules that multiply is above 0, because 0 would hold them for ever.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from .errors import ConfigError, DataError, check_options, is_finite, out_of_range, unknown_name

ControllerName = Literal["fixed", "adaptive", "threshold", "pid", "dual", "schedule"]

MIN_COEF = 1e-6
MAX_COEF = 1e3


class State(NamedTuple):
    """coef: the coefficient to use next."""

    coef: float


class PIDState(NamedTuple):
    """coef: the coefficient to use next; integral: of the error, in units of log coef; error: the last, or 0."""

    coef: float
    integral: float
    error: float


class ScheduleState(NamedTuple):
    """coef: the coefficient to use next; episodes: seen so far."""

    coef: float
    episodes: float


class ControllerState(Protocol):
    """What every state has."""

    @property
    def coef(self) -> float: ...


class Controller(Protocol):
    """What every controller offers. `episodes` is the number since the last update, not since the start."""

    def init(self) -> ControllerState: ...

    def update(self, state: ControllerState, *, kl: float, episodes: int) -> ControllerState: ...


# -- Checks ------------------------------------------------------------------------------------------------------------


def _require(field: str, value: object, holds: Callable[[float], bool], valid: str, fix: str = "") -> None:
    # Infinity is for `holds` to judge: it is a valid upper clamp. An integer that no float can hold is none.
    if not (is_finite(value) or (isinstance(value, float) and math.isinf(value))) or not holds(value):  # type: ignore[arg-type]
        raise out_of_range(field, value, valid, fix)


def _positive(field: str, value: float) -> None:
    _require(field, value, lambda x: 0 < x < math.inf, "a finite number above 0")


def _check_range(coef: float, min_coef: float, max_coef: float, *, multiplies: bool) -> None:
    """The three fields that all controllers share."""
    if multiplies:
        fix = "A rule that multiplies cannot leave 0; use the 'fixed' controller for a coefficient of 0."
        _require("coef", coef, lambda x: 0 < x < math.inf, "a finite number above 0", fix)
        _positive("min_coef", min_coef)
    else:
        _require("coef", coef, lambda x: 0 <= x < math.inf, "a finite number, 0 or above")
        _require("min_coef", min_coef, lambda x: 0 <= x < math.inf, "a finite number, 0 or above")
    _require("max_coef", max_coef, lambda x: x >= min_coef, f"at least min_coef = {min_coef}")
    _within("coef", coef, min_coef, max_coef)


def _within(field: str, value: float, min_coef: float, max_coef: float) -> None:
    valid = f"within [min_coef, max_coef] = [{min_coef}, {max_coef}]"
    _require(field, value, lambda x: min_coef <= x <= max_coef, valid, "Move it, or widen the clamp.")


def _check_measurement(kl: float, episodes: float) -> None:
    if not math.isfinite(kl):
        raise DataError(
            f"`kl` got {kl!r}; a controller needs a finite number of nats. The policy has probably diverged: look at "
            "the last update's ratios, and lower the learning rate or set trust_max_kl."
        )
    if not 0 <= episodes < math.inf:
        raise DataError(
            f"`episodes` got {episodes!r}; it must be the number of episodes since the last update, 0 or above."
        )


def _clamp(coef: float, low: float, high: float) -> float:
    return min(max(coef, low), high)


# -- Controllers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedKL:
    """β stays at `coef`; 0 switches the penalty off. It has no target."""

    coef: float
    min_coef: float = 0.0
    max_coef: float = math.inf

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=False)

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        return state


@dataclass(frozen=True)
class AdaptiveKL:
    """β ← β·(1 + clip(KL/target − 1, ±clip)·episodes/horizon) (Ziegler et al. 2019, arXiv 1909.08593 and its code).

    A proportional controller in log β. Slow by design: at the published clip = 0.2, horizon = 10,000 and 512 episodes
    an update moves β by 1.02 % at most. In a short run take a horizon of a few hundred episodes.

    >>> controller = AdaptiveKL(coef=1.0, target=6.0, horizon=500)
    >>> controller.update(controller.init(), kl=12.0, episodes=125)
    State(coef=1.05)
    """

    coef: float
    target: float
    horizon: float = 10_000
    clip: float = 0.2
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=True)
        for field in ("target", "horizon", "clip"):
            _positive(field, getattr(self, field))

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        error = _clamp(kl / self.target - 1, -self.clip, self.clip)
        return State(_clamp(state.coef * (1 + error * episodes / self.horizon), self.min_coef, self.max_coef))


@dataclass(frozen=True)
class ThresholdKL:
    """β·factor if KL > band·target, β/factor if KL < target/band (arXiv 1707.06347, §4, with factor 2 and band 1.5).

    It settles within the band where one step moves the KL by less than the band is wide. Along a tilted family KL
    falls about as 1/β², so a factor of 2 moves it by 4 across a band of 2.25, and the rule may alternate across the
    band for ever.
    """

    coef: float
    target: float
    factor: float = 2.0
    band: float = 1.5
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=True)
        _positive("target", self.target)
        _require("factor", self.factor, lambda x: 1 < x < math.inf, "a finite number above 1")
        _require("band", self.band, lambda x: 1 <= x < math.inf, "a finite number, 1 or above")

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        if kl > self.target * self.band:
            coef = state.coef * self.factor
        elif kl < self.target / self.band:
            coef = state.coef / self.factor
        else:
            coef = state.coef
        return State(_clamp(coef, self.min_coef, self.max_coef))


@dataclass(frozen=True)
class PIDKL:
    """log β = I + kp·e + kd·(e − e_prev)₊, I ← I + ki·e; e = KL/target − 1 clipped to ±1, and I starts at log `coef`.

    PID control of a Lagrange multiplier (Stooke et al. 2020, arXiv 2007.03964: the derivative acts on a rising KL
    only), carried over to log β. In β itself the loop gain is proportional to 1/β: where KL ∝ 1/β², these gains never
    settle if the coefficient sought is below about 0.25, and 0.05 is the default of TRL's trainer. In log β the gain
    does not depend on the scale. The clipped error keeps the first updates of a run whose KL is far above the target
    from throwing β across its whole range. I is kept within the clamp.

    >>> controller = PIDKL(coef=1.0, target=6.0)
    >>> state = controller.update(controller.init(), kl=9.0, episodes=16)
    >>> round(state.coef, 4), state.integral, state.error
    (1.1052, 0.05, 0.5)
    """

    coef: float
    target: float
    kp: float = 0.1
    ki: float = 0.1
    kd: float = 0.0
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=True)
        for field in ("target", "ki"):
            _positive(field, getattr(self, field))
        for field in ("kp", "kd"):
            _require(field, getattr(self, field), lambda x: 0 <= x < math.inf, "a finite number, 0 or above")

    def init(self) -> PIDState:
        return PIDState(coef=self.coef, integral=math.log(self.coef), error=0.0)

    def update(self, state: PIDState, *, kl: float, episodes: int) -> PIDState:
        _check_measurement(kl, episodes)
        low, high = math.log(self.min_coef), math.log(self.max_coef)
        error = _clamp(kl / self.target - 1, -1.0, 1.0)
        integral = _clamp(state.integral + self.ki * error, low, high)
        raw = integral + self.kp * error + self.kd * max(error - state.error, 0.0)
        return PIDState(_clamp(math.exp(_clamp(raw, low, high)), self.min_coef, self.max_coef), integral, error)


@dataclass(frozen=True)
class DualKL:
    """log β ← log β + lr·clip(KL/target − 1, ±1): gradient ascent on the dual of "KL at most target", in log β.

    The form in which SAC tunes its temperature (Haarnoja et al. 2018, arXiv 1812.05905, §5), with the error relative
    to the target, so that one `lr` does for all units.
    """

    coef: float
    target: float
    lr: float = 0.05
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=True)
        for field in ("target", "lr"):
            _positive(field, getattr(self, field))

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        error = _clamp(kl / self.target - 1, -1.0, 1.0)
        return State(_clamp(state.coef * math.exp(self.lr * error), self.min_coef, self.max_coef))


@dataclass(frozen=True)
class ScheduledKL:
    """β moves in a straight line from `coef` to `end_coef` over `episodes` episodes, then stays. It ignores the KL."""

    coef: float
    end_coef: float
    episodes: float
    min_coef: float = 0.0
    max_coef: float = math.inf

    def __post_init__(self) -> None:
        _check_range(self.coef, self.min_coef, self.max_coef, multiplies=False)
        _within("end_coef", self.end_coef, self.min_coef, self.max_coef)
        _require("end_coef", self.end_coef, math.isfinite, "a finite number")
        _positive("episodes", self.episodes)

    def init(self) -> ScheduleState:
        return ScheduleState(coef=self.coef, episodes=0)

    def update(self, state: ScheduleState, *, kl: float, episodes: int) -> ScheduleState:
        _check_measurement(kl, episodes)
        seen = state.episodes + episodes
        done = min(seen / self.episodes, 1.0)
        return ScheduleState(coef=(1 - done) * self.coef + done * self.end_coef, episodes=seen)


# -- By name -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearningRateByKL:
    """A factor on the learning rate, from KL(π_old‖π) after each update (rsl_rl's rule, per update instead of per step).

    KL > 2·target: divide by `factor`; 0 < KL < target/2: multiply by it; within [`min_coef`, `max_coef`]. `target` in nats
    per token. A KL of 0 says that nothing was stepped, and changes nothing.
    """

    target: float
    factor: float = 1.5
    min_coef: float = 1 / 32
    max_coef: float = 32.0

    def __post_init__(self) -> None:
        _positive("target", self.target)
        _require("factor", self.factor, lambda x: 1 < x < math.inf, "a finite number above 1")
        _check_range(1.0, self.min_coef, self.max_coef, multiplies=True)

    def init(self) -> State:
        return State(1.0)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        if kl > 2 * self.target:
            return State(_clamp(state.coef / self.factor, self.min_coef, self.max_coef))
        if 0 < kl < self.target / 2:
            return State(_clamp(state.coef * self.factor, self.min_coef, self.max_coef))
        return state


CONTROLLERS: dict[ControllerName, type[Any]] = {
    "fixed": FixedKL,
    "adaptive": AdaptiveKL,
    "threshold": ThresholdKL,
    "pid": PIDKL,
    "dual": DualKL,
    "schedule": ScheduledKL,
}


def build_controller(
    name: str, *, coef: float, target: float | None = None, field: str = "kl", **kwargs: float
) -> Controller:
    """The controller `name` from a config's fields `{field}_coef`, `{field}_target` and `{field}_controller_kwargs`.

    `target` is dropped for the controllers that have none. ConfigErrors name the config's fields: an unknown name or
    argument, a missing target or argument, a value out of range.
    """
    if name not in CONTROLLERS:
        raise unknown_name(f"{field}_controller", name, CONTROLLERS)
    cls, where = CONTROLLERS[name], f"{field}_controller_kwargs"
    fields = {each.name: each for each in dataclasses.fields(cls)}
    check_options(where, name, [each for each in fields if each not in ("coef", "target")], kwargs)
    arguments = {"coef": coef, **kwargs}
    if "target" in fields:
        if target is None:
            raise ConfigError(
                f"`{field}_target` is needed by {field}_controller={name!r}, and is None; set it to the KL in nats "
                f"that the controller shall hold, or choose {field}_controller='fixed'."
            )
        arguments["target"] = target
    missing = [each for each, f in fields.items() if f.default is dataclasses.MISSING and each not in arguments]
    if missing:
        raise ConfigError(f"`{where}` lacks {', '.join(missing)}, which {field}_controller={name!r} needs.")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(_in_config_terms(str(error), field)) from None


def _in_config_terms(message: str, field: str) -> str:
    """A controller's own error, which opens with its field in backticks, with the name that field has in the config."""

    def rename(match: re.Match[str]) -> str:
        own = match[1]
        return f"`{field}_{own}`" if own in ("coef", "target") else f"`{field}_controller_kwargs['{own}']`"

    return re.sub(r"^`(\w+)`", rename, message)
