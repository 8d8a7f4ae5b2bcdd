"""The trust region KL(π_old‖π): line, backtracking, measurement, penalty, early stop, learning rate by KL.

Hand-made curves and numpy first, then the trainer on every kind of model it is promised for.
"""

from __future__ import annotations

import copy
import json
import math
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import tiny
from tests.processes import in_two_processes
from tests.test_exactness import dense_kl, dense_logps, four_bit
from tests.test_hard_bound import assert_within, witnessed
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.controllers import AdaptiveKL, LearningRateByKL, State, ThresholdKL
from trl_trustkl.divergences import ESTIMATORS
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.policy.loading import disable_dropout, trainable
from trl_trustkl.policy.micro_batches import micro_batch
from trl_trustkl.policy.value_head import PolicyAndValue
from trl_trustkl.ppo.losses import Penalties, kl_terms
from trl_trustkl.trust_region import QUANTILES, Backtrack, ParameterPath, backtrack, measurement
from trl_trustkl.types import Batch, Measurement, MicroBatch, PolicySnapshot, Rollout, UpdateStats

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 0.02


# -- backtracking on hand-made curves ----------------------------------------------------------------------------------


class Curve:
    """KL as a function of the scale, with a log of what was asked of it."""

    def __init__(self, kl: Callable[[float], float]) -> None:
        self.kl = kl
        self.scale = math.nan
        self.set: list[float] = []
        self.measured: list[tuple[float, float]] = []

    def set_scale(self, scale: float) -> None:
        self.scale = scale
        self.set.append(scale)

    def measure(self) -> float:
        self.measured.append((self.scale, self.kl(self.scale)))
        return self.measured[-1][1]

    def shorten(self, limit: float, **options: Any) -> Backtrack:
        return backtrack(self.set_scale, self.measure, limit, **{"proposed": self.kl(1.0)} | options)


@pytest.mark.parametrize("factor", [1.2, 2.0, 10.0, 100.0, 350.0])
def test_a_quadratic_takes_one_try(factor):
    curve = Curve(lambda a: factor * LIMIT * a * a)
    found = curve.shorten(LIMIT)
    assert found.tries == 1 and len(curve.measured) == 1
    assert found.measured == pytest.approx(0.95 * LIMIT)
    assert found.scale == pytest.approx(math.sqrt(0.95 / factor))
    assert curve.scale == found.scale


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12])
def test_a_quadratic_far_beyond_the_limit_takes_a_few(factor):
    found = Curve(lambda a: factor * LIMIT * a * a).shorten(LIMIT)
    assert found.tries <= 6 and 0.8 * LIMIT <= found.measured <= LIMIT


def test_within_the_limit_nothing_is_touched():
    for proposed in (0.0, 0.5 * LIMIT, LIMIT):
        curve = Curve(lambda a: math.nan)
        assert curve.shorten(LIMIT, proposed=proposed) == Backtrack(1.0, proposed, 0)
        assert curve.set == [] and curve.measured == []


def test_the_proposal_is_measured_at_scale_1_where_it_is_not_given():
    curve = Curve(lambda a: 0.01 * a)
    assert curve.shorten(LIMIT, proposed=None) == Backtrack(1.0, 0.01, 0)
    assert curve.set == [1.0] and len(curve.measured) == 1
    curve = Curve(lambda a: a * a)
    found = curve.shorten(LIMIT, proposed=None)
    assert found.tries == 1 and curve.set[0] == 1.0


SHAPES = {
    "linear": lambda a: a,
    "fourth power": lambda a: a**4,
    "steep start, then flat": lambda a: 0.04 * a / (a + 0.01),
    "flat just above the limit": lambda a: 0.021 * min(1.0, 10 * a),
    "saturating like a softmax": lambda a: 0.3 * math.tanh(30 * a) ** 2,
    "not monotonic": lambda a: a * (1 + 0.9 * math.sin(40 * a)),
    "falling at the end": lambda a: 4 * a * (1.01 - a),
    "jump to far outside": lambda a: 1e-4 * a if a < 0.3 else 5.0,
    "jump just outside": lambda a: 0.001 if 0 < a < 0.7 else 0.03 * (a > 0),
    "infinite beyond a tenth": lambda a: a * a if a < 0.1 else math.inf,
    "NaN beyond a tenth": lambda a: a * a if a < 0.1 else math.nan,
    "a hole with NaN": lambda a: math.nan if 0.05 < a < 0.2 else a,
    "slightly negative by rounding": lambda a: -1e-9 if a < 0.2 else a,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_ends_within_the_limit_and_not_at_0_where_there_is_more(shape):
    curve = Curve(SHAPES[shape])
    found = curve.shorten(LIMIT)
    assert found.measured <= LIMIT
    assert 0 < found.scale < 1, "the whole step was thrown away"
    assert found.measured == curve.kl(found.scale) and curve.scale == found.scale
    assert found.tries == len(curve.measured) <= 10


@pytest.mark.parametrize("proposed", [math.nan, math.inf])
def test_a_proposal_that_is_no_number_counts_as_too_much(proposed):
    curve = Curve(lambda a: proposed if a > 0.4 else a * a)
    found = curve.shorten(LIMIT)
    assert curve.set[0] == 0.5 and 0 < found.scale <= 0.4 and found.measured <= LIMIT


def test_a_tiny_limit_is_met():
    found = Curve(lambda a: 3.0 * a * a).shorten(1e-12)
    assert 0 < found.measured <= 1e-12 and found.scale > 0


@pytest.mark.parametrize("tries", [0, 1, 5, 10])
@pytest.mark.parametrize("kl", [1.0, math.nan, math.inf])
def test_when_no_try_is_within_the_limit_the_start_is_restored(tries, kl):
    curve = Curve(lambda a: kl if a > 0 else 0.0)
    assert curve.shorten(LIMIT, max_tries=tries) == Backtrack(0.0, 0.0, tries)
    assert curve.scale == 0.0 and len(curve.measured) == tries


def test_the_last_scale_tried_is_not_kept_where_it_is_outside():
    curve = Curve(lambda a: a * a if a < 0.11 else 1.0)  # the first try is outside, then in, and out again
    for tries in range(1, 11):
        curve.set.clear()
        found = curve.shorten(LIMIT, max_tries=tries)
        assert curve.set[-1] == found.scale and curve.kl(found.scale) <= LIMIT


values = st.one_of(
    st.floats(min_value=0, max_value=100),
    st.floats(min_value=0, max_value=2 * LIMIT),
    st.sampled_from([math.nan, math.inf, LIMIT, 0.8 * LIMIT, -1e-9]),
)


@settings(deadline=None, max_examples=300)
@given(
    knots=st.lists(st.floats(min_value=0, max_value=1), min_size=0, max_size=12),
    heights=st.lists(values, min_size=13, max_size=13),
    slope=st.floats(min_value=0, max_value=10),
    limit=st.one_of(st.just(LIMIT), st.floats(min_value=1e-9, max_value=1)),
    tries=st.integers(min_value=0, max_value=15),
)
def test_whatever_the_curve_the_limit_holds_at_the_largest_scale_tried_that_has_it(knots, heights, slope, limit, tries):
    steps = sorted(knots)

    def kl(scale: float) -> float:
        return heights[int(np.searchsorted(steps, scale))] + slope * scale**2 if scale > 0 else 0.0

    curve = Curve(kl)
    proposed = kl(1.0)
    found = curve.shorten(limit, max_tries=tries)
    assert found.measured <= limit
    assert 0 <= found.scale <= 1 and found.measured == kl(found.scale)
    if proposed <= limit:
        assert found == Backtrack(1.0, proposed, 0) and not curve.set
        return
    assert curve.set and curve.scale == found.scale < 1
    assert found.tries == len(curve.measured) <= tries
    assert found.scale == max([a for a, value in curve.measured if value <= limit], default=0.0)


# -- the line ----------------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def moved(params: list[nn.Parameter], seed: int = 1) -> list[Tensor]:
    """Move the parameters somewhere else; returns a copy of them there."""
    with torch.no_grad():
        for p, other in zip(params, parameters(params[0].dtype, seed), strict=True):
            p.add_(0.1 * other)
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_both_ends_of_the_line_are_exact_and_points_between_are_between(dtype):
    params = parameters(dtype)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    end = moved(params)
    for scale in (0.3, 0.0, 1.0, 0.7, 1e-3, 1.0, 0.0):
        line.set_scale(scale)
        for p, a, b in zip(params, start, end, strict=True):
            assert p.dtype == dtype and p.requires_grad
            if scale in (0.0, 1.0):
                assert torch.equal(p, a if scale == 0.0 else b)
            expected = a.double() + scale * (b.double() - a.double())
            torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_line_is_not_moved_by_what_moves_the_parameters():
    params = parameters(torch.float32)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    end = moved(params)
    line.set_scale(0.5)
    moved(params, seed=3)
    line.set_scale(1.0)
    assert all(map(torch.equal, params, end))
    line.set_scale(0.0)
    assert all(map(torch.equal, params, start))


def test_a_line_restores_its_start_whatever_the_parameters_are():
    params = parameters(torch.bfloat16)
    start = [p.detach().clone() for p in params]
    line = ParameterPath(params)
    with torch.no_grad():
        for p in params:
            p.fill_(math.nan)
    line.set_scale(0.5)  # draws the line to where the parameters are now, which is nowhere
    line.set_scale(0.0)
    assert all(map(torch.equal, params, start))
    moved(params)
    line.restore()
    assert all(map(torch.equal, params, start))


# -- the measurement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_measurement_is_numpys(seed):
    rng = np.random.default_rng(seed)
    kl, tv = rng.exponential(size=(5, 7)), rng.uniform(size=(5, 7))
    log_ratio = rng.normal(scale=3.0, size=(5, 7))
    mask = rng.uniform(size=(5, 7)) < 0.6
    for array in (kl, tv, log_ratio):
        array[~mask] = rng.choice([np.nan, np.inf, 1e9])  # what is masked is never read
    got = measurement(*map(torch.from_numpy, (kl, tv, log_ratio, mask)), complete=True)
    assert got.kl == pytest.approx(kl[mask].mean(), rel=1e-12)
    assert got.kl_max == pytest.approx(kl[mask].max(), rel=1e-12)
    assert got.tv == pytest.approx(tv[mask].mean(), rel=1e-12)
    assert got.max_ratio == pytest.approx(np.exp(log_ratio[mask].max()), rel=1e-12)
    assert got.tokens == mask.sum() and got.complete
    assert list(got.ratio_quantiles) == [str(q) for q in QUANTILES]
    expected = np.exp(np.quantile(log_ratio[mask], QUANTILES))
    np.testing.assert_allclose(list(got.ratio_quantiles.values()), expected, rtol=1e-12)


def test_the_measurement_of_nothing_is_that_of_no_change():
    ones = torch.ones(2, 3)
    got = measurement(ones * math.nan, ones, ones, torch.zeros(2, 3, dtype=torch.bool), complete=False)
    assert (got.kl, got.kl_max, got.tv, got.max_ratio, got.tokens, got.complete) == (0.0, 0.0, 0.0, 1.0, 0, False)
    assert set(got.ratio_quantiles.values()) == {1.0}


def test_the_measurement_neither_overflows_nor_hides_what_is_no_number():
    mask = torch.ones(1, 3, dtype=torch.bool)
    huge = measurement(mask.float(), mask.float(), torch.tensor([[0.0, 1.0, 5e4]]), mask, complete=True)
    assert math.isfinite(huge.max_ratio) and huge.max_ratio > 1e300
    broken = measurement(torch.tensor([[0.0, math.nan, 1.0]]), mask.float(), mask * math.nan, mask, complete=True)
    assert math.isnan(broken.kl) and math.isnan(broken.max_ratio)


def test_a_mean_of_many_small_numbers_is_taken_in_float64():
    kl = torch.full((1, 100_000), 0.1)
    got = measurement(kl, kl, kl, torch.ones_like(kl, dtype=torch.bool), complete=True)
    assert got.kl == pytest.approx(float(kl[0, 0]), rel=1e-12)


# -- enforcement on every kind of model --------------------------------------------------------------------------------

FAST = {
    "learning_rate": 5e-2,
    "lr_scheduler_type": "constant",
    "kl_coef": 0.0,
    "max_steps": 2,
    "trust_max_kl": LIMIT,
    "temperature": 0.8,
}
FULL = {"peft_config": None}


class Careful(TrustKLPPOTrainer):
    """Keeps what enforcement must not touch, and computes the KL densely from the model's own whole forward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before: list[Tensor] = []
        self.proposed: list[Tensor] = []
        self.dense: list[float] = []

    def optimise(self, batch: Batch) -> UpdateStats:
        self.before = [p.detach().clone() for p in trainable(self.model.policy)]
        stats = super().optimise(batch)
        self.proposed = [p.detach().clone() for p in trainable(self.model.policy)]
        return stats

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        moments = copy.deepcopy(self.optimizer.state_dict())
        value = [p.detach().clone() for p in self.model.value.parameters()]
        frozen = [p.detach().clone() for p in self.model.policy.parameters() if not p.requires_grad]
        measured = super().enforce(batch, proposed)
        assert_equal(moments, self.optimizer.state_dict())
        assert moments["state"], "an optimizer without moments shows nothing"
        assert_equal(value, list(self.model.value.parameters()))
        assert_equal(frozen, [p for p in self.model.policy.parameters() if not p.requires_grad])
        self.dense.append(self.recomputed(batch))
        return measured

    def recomputed(self, batch: Batch) -> float:
        new = self.logps(batch)
        now = [p.detach().clone() for p in trainable(self.model.policy)]
        put(self.model.policy, self.before)
        old = self.logps(batch)
        put(self.model.policy, now)
        return float(dense_kl(old, new).mean())

    def logps(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            parts = [
                dense_logps(self.model.policy, micro, self.args.temperature)[micro.response_mask]
                for micro in batch.scored.micro_batches
            ]
        return torch.cat(parts)


def put(module: nn.Module, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for p, weight in zip(trainable(module), weights, strict=True):
            p.copy_(weight)


def assert_equal(one: Any, other: Any) -> None:
    """Equality bit for bit of nested dicts, lists, numbers and tensors."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def careful(folder: Any, model: Any = None, *, changes: dict[str, Any] | None = None, **arguments: Any) -> Careful:
    return tiny.trainer(folder, model, kind=Careful, changes=FAST | (changes or {}), **arguments)


def bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


# (model, changes of the configuration, further arguments, how well the float32 or bf16 passes agree with each other)
KINDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], Callable[[], dict[str, Any]], float]] = {
    "LoRA": (lambda _: tiny.llama(), {}, dict, 1e-5),
    "LoRA, gpt2": (lambda _: tiny.gpt2(), {}, dict, 1e-5),
    "LoRA with a trained head": (
        lambda _: tiny.llama(), {}, lambda: {"peft_config": tiny.lora(modules_to_save=["lm_head"])}, 1e-5,
    ),
    "4-bit": (four_bit, {}, dict, 1e-5),
    "full": (lambda _: tiny.llama(), {"learning_rate": 5e-3}, lambda: FULL, 1e-5),
    "full, tied head": (lambda _: tiny.gpt2(), {"learning_rate": 5e-3}, lambda: FULL, 1e-5),
    "full, bf16 weights": (lambda _: bfloat16(tiny.llama()), {"learning_rate": 1e-2}, lambda: FULL, 2e-3),
    "bf16 autocast": (lambda _: tiny.llama(), {"bf16": True}, dict, 2e-3),
    "full, bf16 autocast": (lambda _: tiny.llama(), {"bf16": True, "learning_rate": 5e-3}, lambda: FULL, 2e-3),
    "four micro-batches": (
        lambda _: tiny.llama(),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 1},
        dict,
        1e-5,
    ),
    "gradient checkpointing": (lambda _: tiny.llama(), {"gradient_checkpointing": True}, dict, 1e-5),
    "value model": (lambda _: tiny.llama(), {}, lambda: {"value_model": tiny.scalar_model(tiny.llama())}, 1e-5),
    "attached value head": (lambda _: tiny.llama(), {"detach_value_head": False}, dict, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_holds_and_moments_value_and_frozen_weights_are_left_alone(kind, tmp_path):
    model, changes, arguments, agreement = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes=changes, **arguments())
    trainer.train()
    dtypes = {p.dtype for p in trainable(trainer.model.policy)}
    assert dtypes == {torch.bfloat16 if kind == "full, bf16 weights" else torch.float32}
    for record, dense in zip(load_records(tmp_path / "run"), trainer.dense, strict=True):
        trust = record["trust"]
        assert trust["kl_proposed"] > 2 * LIMIT, "there was nothing to hold"
        assert trust["kl"] <= LIMIT == trust["guaranteed"] == trust["limit"]
        assert 0 < trust["scale"] < 1 <= trust["tries"]
        assert dense == pytest.approx(trust["kl"], abs=agreement)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_ends_on_the_line_from_old_to_proposed(kind, tmp_path):
    model, changes, arguments, _ = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes={"max_steps": 1, **changes}, **arguments())
    trainer.train()
    scale = load_records(tmp_path / "run")[0]["trust"]["scale"]
    for p, old, new in zip(trainable(trainer.model.policy), trainer.before, trainer.proposed, strict=True):
        assert torch.equal(p, torch.lerp(old, new, scale))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_restores_the_old_policy_bit_for_bit(kind, tmp_path):
    model, changes, arguments, _ = KINDS[kind]
    trainer = careful(tmp_path / "run", model(tmp_path), changes={"max_steps": 1, **changes}, **arguments())
    measure, asked = trainer.measure, []

    def hopeless(batch: Batch) -> Measurement:
        """As if the proposal and all ten tries were outside."""
        asked.append(measure(batch))
        return far(asked[-1]) if len(asked) <= 11 else asked[-1]

    trainer.measure = hopeless
    trainer.train()
    trust = load_records(tmp_path / "run")[0]["trust"]
    assert (trust["scale"], trust["tries"], trust["kl"], trust["max_ratio"]) == (0.0, 10, 0.0, 1.0)
    assert not all(map(torch.equal, trainer.before, trainer.proposed)), "there was nothing to restore"
    assert_equal(trainer.before, trainable(trainer.model.policy))


def far(measured: Measurement) -> Measurement:
    return measured._replace(kl=1.0)


@pytest.mark.parametrize("value", ["head", "model"])
def test_enforcement_leaves_the_steps_of_the_value_as_they_were(value, tmp_path):
    """The value after an enforced update is that of the same update without a limit."""
    ends = {}
    for limit in (None, LIMIT):
        arguments = {"value_model": tiny.scalar_model(tiny.llama())} if value == "model" else {}
        trainer = careful(tmp_path / str(limit), changes={"max_steps": 1, "trust_max_kl": limit}, **arguments)
        start = [p.detach().clone() for p in trainer.model.value.parameters()]
        trainer.train()
        ends[limit] = [p.detach().clone() for p in trainer.model.value.parameters()], trainer.proposed, trainer
        assert not all(map(torch.equal, start, ends[limit][0])), "the value learnt nothing"
    assert_equal(ends[None][0], ends[LIMIT][0])
    assert_equal(ends[None][1], ends[LIMIT][1])
    assert_equal(ends[None][2].optimizer.state_dict(), ends[LIMIT][2].optimizer.state_dict())
    assert load_records(tmp_path / str(LIMIT))[0]["trust"]["scale"] < 1


def test_a_limit_that_is_not_reached_changes_no_bit_of_the_run(tmp_path):
    runs = {}
    for limit in (None, 1e3):
        trainer = careful(tmp_path / str(limit), changes={"trust_max_kl": limit, "max_steps": 3})
        trainer.train()
        runs[limit] = trainable(trainer.model), load_records(tmp_path / str(limit))
    assert_equal(runs[None][0], runs[1e3][0])
    for free, held in zip(runs[None][1], runs[1e3][1], strict=True):
        assert free["trust"]["kl"] == held["trust"]["kl"] == held["trust"]["kl_proposed"]
        assert (held["trust"]["scale"], held["trust"]["tries"], held["trust"]["guaranteed"]) == (1.0, 0, 1e3)
        assert (free["trust"]["scale"], free["trust"]["tries"], free["trust"]["guaranteed"]) == (None, 0, None)


def test_every_response_token_is_measured_rows_without_a_reward_included(tmp_path):
    def half(prompts: list, completions: list, **_: Any) -> list[float | None]:
        return [None if i % 2 else score for i, score in enumerate(tiny.good_words(prompts, completions))]

    trainer = witnessed(tmp_path, changes=FAST, reward_funcs=half)
    trainer.train()
    assert_within(trainer.updates, LIMIT)
    assert all(update.record.trust.scale < 1 for update in trainer.updates)


def test_a_limit_asks_for_the_whole_batch(tmp_path):
    with pytest.raises(ConfigError, match="measure_fraction"):
        tiny.config(tmp_path, trust_max_kl=LIMIT, measure_fraction=0.5)


def test_without_a_limit_a_part_of_the_batch_may_be_measured_and_guarantees_nothing(tmp_path):
    changes = FAST | {"trust_max_kl": None, "measure_fraction": 0.5}
    trainer = tiny.trainer(tmp_path, changes=changes)
    seen, measure = [], trainer.measure
    trainer.measure = lambda batch: (seen.append(measure(batch)), seen[-1])[1]
    trainer.train()
    assert not any(measured.complete for measured in seen)
    assert all(record["trust"]["guaranteed"] is None for record in load_records(tmp_path))


# -- two processes -----------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
    import json, sys
    from pathlib import Path

    from tests.test_trust_region import FULL, careful
    from trl_trustkl.policy.loading import trainable

    def run(folder, **arguments):
        changes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_mini_batches=2, max_steps=3)
        changes |= dict(trust_controller="threshold", trust_coef=0.1, trust_target=0.01, trust_lr_target=0.01)
        trainer = careful(folder, changes=changes, **arguments)
        assert trainer.accelerator.num_processes == 2
        enforced, enforce = [], trainer.enforce

        def kept(batch, proposed):
            measured = enforce(batch, proposed)
            weights = [float(p.detach().double().abs().sum()) for p in trainable(trainer.model)]
            own = dict(dense=trainer.dense[-1], tokens=int(batch.scored.rollout.response_mask.sum()))
            enforced.append([batch.context.enforcement._asdict(), measured._asdict(), weights, own])
            return measured

        trainer.enforce = kept
        trainer.train()
        rank = trainer.accelerator.process_index
        out = dict(enforced=enforced, states=trainer.parts.coefficients.state_dict())
        Path(f"{folder}-rank{rank}.json").write_text(json.dumps(out))

    run(sys.argv[1] + "/lora")
    run(sys.argv[1] + "/full", **FULL)
"""


def test_two_processes_take_the_same_scale_and_hold_the_limit_over_the_pooled_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    in_two_processes(str(script), str(tmp_path), cwd=tmp_path)
    for kind in ("lora", "full"):
        one, other = (json.loads((tmp_path / f"{kind}-rank{rank}.json").read_text()) for rank in range(2))
        assert one["states"] == other["states"]
        records = load_records(tmp_path / kind)
        assert len(records) == len(one["enforced"]) == 3, "records come from one process alone"
        for record, mine, theirs in zip(records, one["enforced"], other["enforced"], strict=True):
            assert mine[:3] == theirs[:3], "the processes are not in step"
            enforcement, measured, _, own = mine
            trust = record["trust"]
            assert trust["scale"] == enforcement["scale"] < 1 and trust["tries"] == enforcement["tries"] >= 1
            assert trust["kl"] == measured["kl"] <= LIMIT == trust["guaranteed"] < trust["kl_proposed"]
            tokens = own["tokens"] + theirs[3]["tokens"]
            assert measured["tokens"] == tokens and measured["complete"]
            pooled = (own["dense"] * own["tokens"] + theirs[3]["dense"] * theirs[3]["tokens"]) / tokens
            assert pooled == pytest.approx(trust["kl"], abs=1e-5)
            assert own["dense"] != theirs[3]["dense"], "both processes had the same rows"


# -- the penalty λ·KL(π_old‖π) -----------------------------------------------------------------------------------------


def example(seed: int = 0) -> MicroBatch:
    """Three prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompt_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    prompt_ids = torch.randint(3, tiny.VOCAB, (3, 3), generator=generator) * prompt_mask
    response_ids = torch.randint(2, tiny.VOCAB, (3, 4), generator=generator) * response_mask
    return micro_batch(Rollout(prompt_ids, prompt_mask, response_ids, response_mask), torch.arange(3))


class Pair:
    """A small float64 policy and an old one nearby, at the tokens of `example`."""

    def __init__(self) -> None:
        self.micro = example()
        policy = tiny.gpt2().double()
        disable_dropout(policy)
        self.model = PolicyAndValue(policy, None, temperature=0.7)
        out = self.model(self.micro)
        self.old = PolicySnapshot(out.hidden, self.model.split_lm.frozen_head())
        self.old_logp = out.logp.detach()
        self.dense_old = dense_logps(self.model.policy, self.micro, 0.7)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trainable(self.model.policy):
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def term(self, estimator: str, coef: float = 3.0) -> Tensor:
        function = None if estimator == "exact" else ESTIMATORS[estimator]
        out = self.model(self.micro, old=self.old if estimator == "exact" else None)
        penalties = Penalties(trust_coef=coef, trust_estimator=function)
        return kl_terms(out, self.old_logp, torch.zeros_like(out.logp), self.micro.response_mask, penalties)


def test_the_penalty_is_the_dense_kl_and_its_estimators_at_the_sampled_tokens():
    pair = Pair()
    mask = pair.micro.response_mask
    new = dense_logps(pair.model.policy, pair.micro, 0.7)
    log_ratio = (new - pair.dense_old).gather(-1, pair.micro.response_ids.unsqueeze(-1)).squeeze(-1)[mask]
    assert log_ratio.abs().min() > 1e-3
    expected = {
        "exact": dense_kl(pair.dense_old, new)[mask].sum(),
        "k1": -log_ratio.sum(),
        "k3": (log_ratio.exp() - 1 - log_ratio).sum(),
    }
    for estimator, value in expected.items():
        assert float(pair.term(estimator)) == pytest.approx(3.0 * float(value), rel=1e-10), estimator


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_the_gradient_of_the_penalty_is_its_finite_difference(estimator):
    pair = Pair()
    params = trainable(pair.model.policy)
    pair.term(estimator).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
    generator = torch.Generator().manual_seed(2)
    step = 1e-6
    for _ in range(4):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

        def at(scale: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                for p, d in zip(params, direction, strict=True):
                    p.add_(scale * d)
                value = float(pair.term(estimator))
                for p, d in zip(params, direction, strict=True):
                    p.sub_(scale * d)
            return value

        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_at_the_old_policy_the_penalty_and_its_exact_gradient_are_0():
    pair = Pair()
    out = pair.model(pair.micro)
    pair.old = PolicySnapshot(out.hidden, pair.model.split_lm.frozen_head())
    pair.old_logp = out.logp.detach()
    for estimator in ("exact", "k3"):
        pair.model.zero_grad()
        term = pair.term(estimator)
        term.backward()
        assert abs(float(term)) < 1e-12
        assert max(float(p.grad.abs().max()) for p in trainable(pair.model.policy) if p.grad is not None) < 1e-12


# Plain gradient descent in steps small enough for a penalty of 100: larger ones would overshoot and hide what it does.
DESCENT = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-4,
    "num_ppo_epochs": 12,
    "num_mini_batches": 1,
    "max_grad_norm": 0,
    "clip_rule": "none",
    "kl_coef": 0.0,
    "max_steps": 1,
    "seed": 1,
}


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_the_larger_the_penalty_the_smaller_the_update(estimator, tmp_path):
    kls = []
    for coef in (0, 1, 10, 100):
        folder = tmp_path / str(coef)
        changes = DESCENT | {"trust_coef": coef, "trust_estimator": estimator}
        tiny.trainer(folder, changes=changes, peft_config=None).train()
        record = load_records(folder)[0]
        assert record["trust"]["coef"] == coef
        kls.append(record["trust"]["kl"])
    assert kls[0] > kls[1] > kls[2] > kls[3] > 0
    assert kls[3] < 0.2 * kls[0]


def test_the_penalty_by_k1_makes_the_sampled_tokens_likelier_and_the_update_larger(tmp_path):
    """k1 = log π_old − log π is the KL in expectation only: on one batch it is the likelihood of what was sampled."""
    updates = []
    for coef in (0, 10, 100):
        changes = DESCENT | {"trust_coef": coef, "trust_estimator": "k1"}
        tiny.trainer(tmp_path / str(coef), changes=changes, peft_config=None).train()
        updates.append(load_records(tmp_path / str(coef))[0]["trust"])
    medians = [update["ratio_quantiles"]["0.5"] for update in updates]
    assert medians[0] < medians[1] < medians[2]
    assert 10 * updates[0]["kl"] < updates[1]["kl"] < updates[2]["kl"]


# -- the controller of the penalty -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "controller"),
    [
        ("threshold", None, ThresholdKL(0.1, LIMIT)),
        ("adaptive", {"horizon": 40}, AdaptiveKL(0.1, LIMIT, horizon=40)),
    ],
)
@pytest.mark.parametrize("rate", [5e-2, 1e-5], ids=["too far", "too near"])
def test_the_controller_moves_the_penalty_by_the_proposed_kl(name, kwargs, controller, rate, tmp_path):
    changes = FAST | {
        "max_steps": 4,
        "learning_rate": rate,
        "trust_controller": name,
        "trust_controller_kwargs": kwargs,
        "trust_coef": 0.1,
        "trust_target": LIMIT,
    }
    trainer = tiny.trainer(tmp_path, changes=changes)
    used, advantages = [], trainer.advantages
    trainer.advantages = lambda scored: (used.append(advantages(scored)), used[-1])[1]
    trainer.train()
    state = controller.init()
    for record, batch in zip(load_records(tmp_path), used, strict=True):
        assert record["trust"]["coef"] == batch.trust_coef == state.coef, "the coefficient on record is the one used"
        kl = record["trust"]["kl_proposed"]
        assert (kl > 1.5 * LIMIT) == (rate == 5e-2)
        state = controller.update(state, kl=max(0.0, kl), episodes=8)
    assert trainer.parts.coefficients.trust_state == state
    assert (state.coef > 0.1) == (rate == 5e-2)


def test_the_coefficient_reaches_the_loss(tmp_path):
    """Which λ the gradient saw, from two runs that differ in nothing else."""
    fixed = tiny.trainer(tmp_path / "fixed", changes=FAST | {"max_steps": 1, "trust_coef": 5.0})
    fixed.train()
    steered = FAST | {"max_steps": 1, "trust_coef": 5.0, "trust_controller": "threshold", "trust_target": LIMIT}
    other = tiny.trainer(tmp_path / "steered", changes=steered)
    other.train()
    assert_equal(trainable(fixed.model), trainable(other.model))
    none = tiny.trainer(tmp_path / "none", changes=FAST | {"max_steps": 1})
    none.train()
    assert not all(map(torch.equal, trainable(fixed.model), trainable(none.model)))


# -- the learning rate by KL -------------------------------------------------------------------------------------------


def test_the_learning_rate_moves_by_a_factor_of_one_and_a_half_within_a_32nd_and_32():
    rule = LearningRateByKL(target=0.01)
    assert rule.init() == State(1.0)
    table = [(0.0201, 1 / 1.5), (0.02, 1.0), (0.01, 1.0), (0.005, 1.0), (0.0049, 1.5), (0.0, 1.0), (-1e-9, 1.0)]
    for kl, factor in table:
        assert rule.update(State(1.0), kl=kl, episodes=8).coef == pytest.approx(factor, rel=1e-15), kl
    state = rule.init()
    for i in range(1, 20):
        state = rule.update(state, kl=1.0, episodes=0)
        assert state.coef == pytest.approx(max(1.5**-i, 1 / 32))
    assert state.coef == 1 / 32
    assert rule.update(state, kl=1e-4, episodes=8).coef == pytest.approx(1.5 / 32), "nothing winds up at the clamp"
    for _ in range(30):
        state = rule.update(state, kl=1e-4, episodes=8)
    assert state.coef == 32.0
    assert rule.update(state, kl=1.0, episodes=8).coef == pytest.approx(32 / 1.5)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_the_learning_rate_by_kl_refuses_what_is_no_number(kl):
    with pytest.raises(DataError, match="kl"):
        LearningRateByKL(0.01).update(State(1.0), kl=kl, episodes=8)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"target": 0.0}, "target"),
        ({"factor": 1.0}, "factor"),
        ({"min_coef": 0.0}, "min_coef"),
        ({"max_coef": 0.5}, "coef"),
    ],
)
def test_the_learning_rate_by_kl_checks_its_settings(change, field):
    with pytest.raises(ConfigError, match=field):
        LearningRateByKL(**{"target": 0.01} | change)


@pytest.mark.parametrize("target", [1e-4, 10.0], ids=["slower", "faster"])
def test_the_factor_multiplies_the_schedule_and_leaves_it_and_the_value_alone(target, tmp_path):
    updates = 5
    changes = {
        "max_steps": updates,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "value_learning_rate": 3e-3,
        "trust_lr_target": target,
    }
    trainer = tiny.trainer(tmp_path, changes=changes)
    stepped: list[dict[str, float]] = []
    create = trainer.create_optimizer

    def watching(*args: Any) -> torch.optim.Optimizer:
        optimizer = create(*args)
        value = {id(p) for p in trainer.model.value.parameters()}

        def note(optimizer: Any, *_: Any) -> None:
            rates: dict[str, set[float]] = {"policy": set(), "value": set()}
            for group in optimizer.param_groups:
                for p in group["params"]:
                    rates["value" if id(p) in value else "policy"].add(group["lr"])
            stepped.append({name: one for name, (one,) in rates.items()})

        optimizer.register_step_pre_hook(note)
        return optimizer

    trainer.create_optimizer = watching
    trainer.train()
    rule = LearningRateByKL(target)
    state = rule.init()
    assert len(stepped) == 4 * updates
    for i, record in enumerate(load_records(tmp_path)):
        schedule = 1 - i / updates
        expected = {"policy": 1e-2 * schedule * state.coef, "value": 3e-3 * schedule}
        for rates in stepped[4 * i : 4 * i + 4]:
            assert rates == pytest.approx(expected, rel=1e-12)
        assert record["lr"] == pytest.approx(expected["policy"], rel=1e-12)
        share = 1 - state.coef
        assert (record["binding"] == "lr") <= (share > 0)
        state = rule.update(state, kl=record["trust"]["kl_proposed"], episodes=8)
    assert trainer.parts.coefficients.lr_state == state and (state.coef < 1) == (target == 1e-4)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}, "the schedule has come to its end, whatever the factor"


def test_the_factor_is_fed_the_proposed_kl_and_not_the_enforced_one(tmp_path):
    changes = FAST | {"max_steps": 3, "trust_lr_target": LIMIT}
    tiny.trainer(tmp_path, changes=changes).train()
    rates = [record["lr"] for record in load_records(tmp_path)]
    assert all(record["trust"]["kl"] <= LIMIT for record in load_records(tmp_path))
    assert rates == pytest.approx([5e-2, 5e-2 / 1.5, 5e-2 / 1.5**2])


# -- stopping between mini-batches -------------------------------------------------------------------------------------


class Stepwise(TrustKLPPOTrainer):
    """Keeps what every check between mini-batches measured, beside a dense recomputation at that moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checks: list[tuple[list[int], Measurement, float]] = []
        self.optimising = False

    def optimise(self, batch: Batch) -> UpdateStats:
        micros = batch.scored.micro_batches
        self.old = [dense_logps(self.model.policy, micro, self.args.temperature) for micro in micros]
        self.optimising = True
        stats = super().optimise(batch)
        self.optimising = False
        return stats

    def _measure(self, batch: Batch, indices: Any) -> Measurement:
        indices = list(indices)
        measured = super()._measure(batch, indices)
        if self.optimising:
            self.checks.append((indices, measured, self.recomputed(batch, indices)))
        return measured

    def recomputed(self, batch: Batch, indices: list[int]) -> float:
        kls = []
        for index in indices:
            micro = batch.scored.micro_batches[index]
            new = dense_logps(self.model.policy, micro, self.args.temperature)
            kls.append(dense_kl(self.old[index], new)[micro.response_mask])
        return float(torch.cat(kls).mean())


def stepwise(folder: Any, **changes: Any) -> Stepwise:
    given = FAST | {
        "max_steps": 1,
        "trust_max_kl": None,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 3,
    }
    return Stepwise(
        args=tiny.config(folder, **given | changes),
        model=tiny.llama(),
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.good_words,
        train_dataset=tiny.prompts(),
        peft_config=tiny.lora(),
    )


def test_the_check_is_the_exact_kl_of_the_mini_batch_just_stepped(tmp_path):
    trainer = stepwise(tmp_path, trust_stop=1e9)
    trainer.train()
    assert len(trainer.checks) == 5, "the last of six steps has none after it to stop"
    for indices, measured, dense in trainer.checks:
        assert len(indices) == 2 and not measured.complete
        assert measured.kl == pytest.approx(dense, abs=1e-5)
    for first, second in (trainer.checks[:2], trainer.checks[2:4]):
        assert sorted(first[0] + second[0]) == [0, 1, 2, 3], "an epoch goes over every micro-batch once"


def test_an_update_stops_at_the_first_check_over_the_limit(tmp_path):
    free = stepwise(tmp_path / "free", trust_stop=1e9)
    free.train()
    kls = [measured.kl for _, measured, _ in free.checks]
    for limit in sorted(0.5 * (a + b) for a, b in zip(sorted(kls), sorted(kls)[1:], strict=False)):
        first = next(i for i, kl in enumerate(kls) if kl > limit)
        trainer = stepwise(tmp_path / f"{limit}", trust_stop=limit)
        trainer.train()
        assert [measured.kl for _, measured, _ in trainer.checks] == kls[: first + 1]
        trust = load_records(tmp_path / f"{limit}")[0]["trust"]
        assert trust["stopped"] and trust["epochs"] == pytest.approx((first + 1) / 2)
    trainer = stepwise(tmp_path / "equal", trust_stop=max(kls))
    trainer.train()
    assert not load_records(tmp_path / "equal")[0]["trust"]["stopped"], "a KL at the limit is within it"


def test_a_check_that_is_no_number_stops_the_update(tmp_path):
    trainer = stepwise(tmp_path, trust_stop=1e9)
    trainer._measure = lambda batch, indices: far(Stepwise._measure(trainer, batch, indices))._replace(
        kl=math.nan if trainer.optimising else 0.0
    )
    trainer.train()
    trust = load_records(tmp_path)[0]["trust"]
    assert trust["stopped"] and trust["epochs"] == 0.5


# -- states, and mechanisms together -----------------------------------------------------------------------------------


def test_the_states_of_all_controllers_are_in_the_checkpoint(tmp_path):
    changes = {
        "max_steps": 3,
        "seed": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "kl_controller": "pid",
        "kl_target": 0.5,
        "trust_controller": "dual",
        "trust_coef": 0.1,
        "trust_target": 1e-3,
        "trust_lr_target": 1e-6,
    }
    trainer = tiny.trainer(tmp_path, changes=changes)
    states, end = [], trainer.callback_handler.on_step_end
    trainer.callback_handler.on_step_end = lambda *args: (
        states.append(
            (
                trainer.parts.coefficients.kl_state,
                trainer.parts.coefficients.trust_state,
                trainer.parts.coefficients.lr_state,
            )
        ),
        end(*args),
    )[1]
    trainer.train()
    names = ("kl_controller", "trust_controller", "lr_controller")
    for update, live in enumerate(states, start=1):
        saved = json.loads((tmp_path / f"checkpoint-{update}" / "trustkl_state.json").read_text())
        assert set(names) <= set(saved)
        for name, state in zip(names, live, strict=True):
            assert type(state)(**saved[name]) == state
    assert all(len(set(kind)) > 1 for kind in zip(*states, strict=True)), "the states moved"


@pytest.mark.parametrize("rule", ["gspo", "none", "spo", "dppo_kl"])
def test_mechanisms_work_together_and_the_limit_still_holds(rule, tmp_path):
    changes = FAST | {
        "max_steps": 3,
        "clip_rule": rule,
        "trust_stop": 0.5,
        "trust_coef": 0.5,
        "trust_controller": "threshold",
        "trust_target": LIMIT,
        "trust_lr_target": LIMIT,
        "kl_coef": 0.1,
        "kl_estimator": "exact",
        "kl_placement": "both",
        "kl_controller": "adaptive",
        "kl_target": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    trainer = careful(tmp_path, changes=changes)
    trainer.train()
    records = load_records(tmp_path)
    assert len(records) == 3
    for record, dense in zip(records, trainer.dense, strict=True):
        trust = record["trust"]
        assert trust["kl"] <= LIMIT == trust["guaranteed"]
        assert dense == pytest.approx(trust["kl"], abs=2e-3)
        assert record["anchor"]["placement"] == "both" and record["anchor"]["gradient"] == "exact"
        assert record["refused"] is None
    assert any(record["trust"]["scale"] < 1 for record in records)


def test_a_stop_and_a_limit_work_one_after_the_other(tmp_path):
    trainer = witnessed(tmp_path, changes=FAST | {"trust_stop": 1e-9, "num_ppo_epochs": 3})
    trainer.train()
    assert_within(trainer.updates, LIMIT)
    for record, _, _ in trainer.updates:
        assert record.trust.stopped and record.trust.scale < 1
