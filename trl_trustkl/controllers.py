"""Controllers of the coefficient β of a KL penalty: they raise or lower β so that the measured KL meets a target.

A controller is a frozen dataclass without state: `state = controller.init()`, then once per update `state =
controller.update(state, kl=measured, episodes=seen_since_the_last_update)`, and `state.coef` is the next coefficient. A
state is a NamedTuple of Python numbers, so it can be compared, logged and saved.

The caller chooses the units: `kl` and `target` in nats per response for the anchor, nats per token for the trust region;
the rules only use their quotient. `update` applies the published rule to the KL it is given; a negative estimate is a KL
below the target. Every controller raises DataError for a KL that is not finite.

A coefficient stays within [`min_coef`, `max_coef`]. What a state holds is clamped too, so there is no integral windup: a
coefficient that was saturated for a thousand updates leaves the limit at the first update whose KL requires it. `min_coef`
must be above 0 for the rules that multiply, because they can never leave 0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from .errors import ConfigError, DataError, check_options, is_finite, out_of_range, unknown_name
from .options import NOT_NEGATIVE, POSITIVE, Range

ControllerName = Literal["fixed", "adaptive", "threshold", "pid", "dual", "schedule"]

MIN_COEF = 1e-6
MAX_COEF = 1e3


class State(NamedTuple):
    """coef: the coefficient to use next."""

    coef: float


class PIDState(NamedTuple):
    """coef: the coefficient to use next; integral: of the error, in units of log coef; error: the last one, at first 0."""

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


# -- What the controllers share ----------------------------------------------------------------------------------------

_RANGES = {
    "target": POSITIVE, "horizon": POSITIVE, "clip": POSITIVE, "ki": POSITIVE, "lr": POSITIVE, "episodes": POSITIVE,
    "kp": NOT_NEGATIVE, "kd": NOT_NEGATIVE, "end_coef": NOT_NEGATIVE,
    "factor": Range("a finite number > 1", lambda x: x > 1), "band": Range("a finite number >= 1", lambda x: x >= 1),
}  # fmt: skip
"""The ranges of the arguments; a name has the same range in every controller."""


def _require(field: str, value: object, range: Range, fix: str = "") -> None:
    if not (is_finite(value) and range.holds(value)):
        raise out_of_range(field, value, range.valid, fix)


def _check_measurement(kl: float, episodes: float) -> None:
    if not math.isfinite(kl):
        raise DataError(
            f"`kl` got {kl!r}; a controller needs a finite number of nats. The policy has probably diverged: look at "
            "the last update's ratios, and lower the learning rate or set trust_max_kl."
        )
    if not 0 <= episodes < math.inf:
        raise DataError(f"`episodes` got {episodes!r}; it must be the number since the last update, >= 0 and finite.")


def _clamp(coef: float, low: float, high: float) -> float:
    return min(max(coef, low), high)


class _Checked:
    """A controller whose fields are checked when it is built: ConfigError for one that is out of its range."""

    coef: float
    min_coef: float
    max_coef: float
    multiplies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        low, high = self.min_coef, self.max_coef
        fix = "A rule that multiplies cannot leave 0; use the 'fixed' controller for a coefficient of 0."
        _require("coef", self.coef, POSITIVE if self.multiplies else NOT_NEGATIVE, fix if self.multiplies else "")
        _require("min_coef", low, POSITIVE if self.multiplies else NOT_NEGATIVE)
        if high != math.inf:
            _require("max_coef", high, Range(f"at least min_coef = {low}", lambda x: x >= low))
        for field, range in _RANGES.items():
            if hasattr(self, field):
                _require(field, getattr(self, field), range)
        clamp = Range(f"within [min_coef, max_coef] = [{low}, {high}]", lambda x: low <= x <= high)
        for field in ("coef", "end_coef"):
            if hasattr(self, field):
                _require(field, getattr(self, field), clamp, "Move it, or widen the clamp.")


class _CoefController(_Checked):
    """A controller whose state is the coefficient only; `_next` is its rule, before the clamp."""

    def init(self) -> State:
        return State(self.coef)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        _check_measurement(kl, episodes)
        return State(_clamp(self._next(state.coef, kl, episodes), self.min_coef, self.max_coef))

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        raise NotImplementedError


# -- Controllers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedKL(_CoefController):
    """β stays at `coef`; 0 switches the penalty off. It has no target."""

    coef: float
    min_coef: float = 0.0
    max_coef: float = math.inf
    multiplies = False

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        return coef


@dataclass(frozen=True)
class AdaptiveKL(_CoefController):
    """β ← β·(1 + clip(KL/target − 1, ±clip)·episodes/horizon) (Ziegler et al. 2019, arXiv 1909.08593 and its code).

    A proportional controller in log β. It is slow by design: with the published clip = 0.2 and horizon = 10,000, an update
    of 512 episodes moves β by 1.02 % at most. In a short run use a horizon of a few hundred episodes.

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

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        error = _clamp(kl / self.target - 1, -self.clip, self.clip)
        return coef * (1 + error * episodes / self.horizon)

    def largest_change(self, episodes: float) -> float:
        """The largest relative change of β by one update of `episodes` responses. From 1 on it could take β to 0."""
        return self.clip * episodes / self.horizon

    def horizon_warning(self, episodes: float, updates: int) -> str | None:
        """Why the horizon does not suit a run of `updates` updates of `episodes` responses each; None if it does."""
        change, total = self.largest_change(episodes), self.largest_change(episodes * updates)
        sizes = f"horizon={self.horizon:g} with clip={self.clip:g}"
        if change > 0.5:
            return (
                f"{sizes} lets one update of {episodes:g} responses change the coefficient by up to {change:.0%} "
                f"({self.clip:g} × {episodes:g} / {self.horizon:g}), so that it may oscillate; a horizon of {2 * episodes:g} "
                f"limits this to {self.clip / 2:.0%}."
            )
        if total < 0.1:
            return (
                f"{sizes} lets the {updates} updates of this run, of {episodes:g} responses each, change the coefficient by "
                f"{total:.1%} at most: the target has hardly any effect. Set a horizon of about "
                f"{self.clip * episodes * max(updates, 2):.2g}."
            )
        return None


@dataclass(frozen=True)
class ThresholdKL(_CoefController):
    """β·factor if KL > band·target, β/factor if KL < target/band (arXiv 1707.06347, §4, with factor 2 and band 1.5).

    It settles within the band where one step changes the KL by less than the width of the band. Along a tilted family the
    KL falls about as 1/β², so a factor of 2 changes it by 4 across a band of 2.25, and the rule may alternate across the
    band indefinitely.
    """

    coef: float
    target: float
    factor: float = 2.0
    band: float = 1.5
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        if kl > self.target * self.band:
            return coef * self.factor
        return coef / self.factor if kl < self.target / self.band else coef


@dataclass(frozen=True)
class PIDKL(_Checked):
    """log β = I + kp·e + kd·(e − e_prev)₊, I ← I + ki·e; e = KL/target − 1 clipped to ±1, and I starts at log `coef`.

    PID control of a Lagrange multiplier (Stooke et al. 2020, arXiv 2007.03964: the derivative acts on a rising KL
    only), applied to log β. In β itself the loop gain is proportional to 1/β: where KL ∝ 1/β², these gains never settle if
    the β that meets the target is below about 0.25 (the default of TRL's trainer is 0.05). In log β the gain does not
    depend on the scale. The error is clipped so that the first updates of a run, whose KL may be far above the target, do
    not move β across its entire range. I is kept within the clamp.

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
class DualKL(_CoefController):
    """log β ← log β + lr·clip(KL/target − 1, ±1): gradient ascent on the dual of "KL at most target", in log β.

    The form in which SAC tunes its temperature (Haarnoja et al. 2018, arXiv 1812.05905, §5), with the error relative
    to the target, so that the same `lr` suits all units.
    """

    coef: float
    target: float
    lr: float = 0.05
    min_coef: float = MIN_COEF
    max_coef: float = MAX_COEF

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        return coef * math.exp(self.lr * _clamp(kl / self.target - 1, -1.0, 1.0))


@dataclass(frozen=True)
class ScheduledKL(_Checked):
    """β moves in a straight line from `coef` to `end_coef` over `episodes` episodes, then stays. It ignores the KL."""

    coef: float
    end_coef: float
    episodes: float
    min_coef: float = 0.0
    max_coef: float = math.inf
    multiplies = False

    def init(self) -> ScheduleState:
        return ScheduleState(coef=self.coef, episodes=0)

    def update(self, state: ScheduleState, *, kl: float, episodes: int) -> ScheduleState:
        _check_measurement(kl, episodes)
        seen = state.episodes + episodes
        done = min(seen / self.episodes, 1.0)
        return ScheduleState(coef=(1 - done) * self.coef + done * self.end_coef, episodes=seen)


@dataclass(frozen=True)
class LearningRateByKL(_CoefController):
    """A factor on the learning rate, from KL(π_old‖π) after each update (rsl_rl's rule, per update instead of per step).

    KL > 2·target: divide by `factor`; 0 < KL < target/2: multiply by it; within [`min_coef`, `max_coef`]. `target` in nats
    per token. A KL of 0 means that no step was taken, and changes nothing.
    """

    target: float
    factor: float = 1.5
    min_coef: float = 1 / 32
    max_coef: float = 32.0
    coef = 1.0  # at the start; not a field

    def _next(self, coef: float, kl: float, episodes: int) -> float:
        if kl > 2 * self.target:
            return coef / self.factor
        return coef * self.factor if 0 < kl < self.target / 2 else coef


# -- By name -----------------------------------------------------------------------------------------------------------

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

    `target` is ignored by the controllers that have none. Raises ConfigError, which names the config's fields, for an
    unknown name or argument, a missing target or argument, and a value out of range.
    """
    if name not in CONTROLLERS:
        raise unknown_name(f"{field}_controller", name, CONTROLLERS)
    cls, where = CONTROLLERS[name], f"{field}_controller_kwargs"
    fields = {each.name: each for each in dataclasses.fields(cls)}
    check_options(where, name, [each for each in fields if each not in ("coef", "target")], kwargs)
    arguments = {"coef": coef, **kwargs}
    if "target" in fields:
        if target is None:
            unit = "nats per token" if field == "trust" else "nats per response with PPO, per token with GRPO and RLOO"
            raise ConfigError(
                f"`{field}_target` got None with {field}_controller={name!r}; set the target KL ({unit}), or choose "
                f"{field}_controller='fixed'."
            )
        arguments["target"] = target
    missing = [each for each, f in fields.items() if f.default is dataclasses.MISSING and each not in arguments]
    if missing:
        raise ConfigError(f"`{where}` lacks {', '.join(missing)}, which {field}_controller={name!r} needs.")
    try:
        return cls(**arguments)
    except ConfigError as error:  # it starts with the controller's field, which has another name in the config
        message = re.sub(r"^`(?!coef`|target`)(\w+)`", rf"`{where}['\1']`", str(error))
        raise ConfigError(re.sub(r"^`(coef|target)`", rf"`{field}_\1`", message)) from None
