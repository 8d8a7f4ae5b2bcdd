"""A window on its own: masks, snapshots and measurements of a generation batch, against dense computations."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.dense import dense_kl, dense_logps
from tests.processes import single_process
from trl_trustkl.callbacks.window import Window, share_time
from trl_trustkl.divergences import ESTIMATORS
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.observed_lm import ObservedLM
from trl_trustkl.policy.reference import Reference
from trl_trustkl.types import MicroBatch

TEMPERATURE = 0.9


def micro(first: int, lengths: list[int], width: int) -> MicroBatch:
    """Rows from `first` on with responses of these lengths, padded to `width`."""
    generator = torch.Generator().manual_seed(first)
    rows = len(lengths)
    prompts, ids = (torch.randint(3, tiny.VOCAB, (rows, each), generator=generator) for each in (3, width))
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return MicroBatch(
        rows=torch.arange(first, first + rows), input_ids=torch.cat([prompts, ids], 1), position_ids=None,
        attention_mask=torch.cat([torch.ones_like(prompts), mask.long()], 1), response_ids=ids, response_mask=mask,
    )  # fmt: skip


BATCH = [micro(0, [2, 5], 5), micro(2, [1, 0, 3], 3)]


class Case:
    def __init__(self, micro_batches: list[MicroBatch] = BATCH) -> None:
        self.model = tiny.tuned().train()
        self.lm = ObservedLM(self.model, autocast=nullcontext, temperature=TEMPERATURE)
        self.window = Window(self.lm, single_process(), micro_batches, ends_at=4, coef=0.1, completions=[])

    def move(self) -> None:
        """Change the trained weights."""
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in trainable(self.model):
                weight.add_(0.05 * torch.randn(weight.shape))

    def logps(self, which: Any = None) -> list[list[Tensor]]:
        """log π over the vocabulary of each row's response tokens, by micro-batch."""
        found = []
        for each in self.window.micro_batches:
            logps = dense_logps(self.model if which is None else which, each, TEMPERATURE)
            found.append([row[mask] for row, mask in zip(logps, each.response_mask, strict=True)])
        return found


def rows_of(per_micro: list[list[Tensor]]) -> list[Tensor]:
    return [row for rows in per_micro for row in rows]


def test_the_mask_covers_all_rows_at_the_length_of_the_longest_response_of_any_process():
    mask = Case().window.mask
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [2, 5, 1, 0, 3] and mask.shape == (5, 5)

    class Longer:
        def max(self, number: int) -> int:
            return number + 2

        def any(self, flag: bool) -> bool:
            return flag

    wide = Window(Case().lm, Longer(), BATCH, ends_at=0, coef=0.0, completions=[]).mask
    assert wide.shape == (5, 7) and torch.equal(wide[:, :5], mask) and not wide[:, 5:].any()


def test_scores_are_gathered_unless_those_of_a_process_are_unknown():
    class Two:
        def __init__(self, unknown: bool) -> None:
            self.unknown = unknown

        def any(self, flag: bool) -> bool:
            return flag or self.unknown

        def max(self, number: int) -> int:
            return number

        def gather(self, rows: Tensor) -> Tensor:
            return torch.cat([rows, rows + 10])

    def scores(given: Tensor | None, unknown: bool = False) -> Tensor | None:
        options = {"ends_at": 0, "coef": 0.0, "completions": []}
        return Window(Case().lm, Two(unknown), BATCH, scores=given, **options).scores

    assert scores(torch.arange(5)).tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert scores(None) is None and scores(torch.arange(5), unknown=True) is None


@torch.no_grad()
def test_a_window_is_measured_as_by_complete_forward_passes():
    case = Case()
    with case.lm.without_noise():
        case.window.fix_old_policy()
        start = case.window.measure()
        before = rows_of(case.logps())
    assert (start.kl, start.kl_max, start.kl_response_max, start.tv, start.max_ratio) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert start.tokens == 11 and start.complete
    case.move()
    with case.lm.without_noise():
        found = case.window.measure()
        after = rows_of(case.logps())
    ids = [row[mask] for each in BATCH for row, mask in zip(each.response_ids, each.response_mask, strict=True)]
    kls = [dense_kl(p, q) for p, q in zip(before, after, strict=True)]
    ratios = torch.cat([
        (q - p).gather(-1, row[:, None]).squeeze(-1) for p, q, row in zip(before, after, ids, strict=True)
    ]).exp()  # fmt: skip
    assert found.kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4) and found.kl > 1e-3
    assert found.kl_max == pytest.approx(float(torch.cat(kls).max()), rel=1e-4)
    assert found.kl_response_max == pytest.approx(max(float(each.sum()) for each in kls), rel=1e-4)
    assert found.max_ratio == pytest.approx(float(ratios.max()), rel=1e-4)
    assert found.ratio_quantiles["0.5"] == pytest.approx(float(ratios.log().quantile(0.5).exp()), rel=1e-4)


@torch.no_grad()
def test_states_that_training_showed_are_used_and_others_are_computed():
    case = Case()
    with case.lm.without_noise():
        given = case.lm.hidden_states(BATCH[1])
        case.window.states = {1: given + 0.01}
        case.window.fix_old_policy()
        assert case.window.old[1].hidden is not None and torch.equal(case.window.old[1].hidden, given + 0.01)
        assert torch.equal(case.window.old[0].hidden, case.lm.hidden_states(BATCH[0])) and case.window.states == {}
        assert case.window.measure().kl_max > 0
    case.window.release()
    assert case.window.old == []


@pytest.mark.parametrize("name", ["k1", "k3"])
@torch.no_grad()
def test_the_anchor_is_that_of_the_old_policy_to_the_reference(name):
    case = Case()
    reference = Reference(case.model, case.lm)
    with case.lm.without_noise():
        case.window.fix_old_policy()
        old = rows_of(case.logps())
        case.move()  # π_old is kept, whatever the policy is now
        case.window.measure_anchor(reference, ESTIMATORS[name])
        with case.model.disable_adapter():
            ref = rows_of(case.logps())
    ids = [row[mask] for each in BATCH for row, mask in zip(each.response_ids, each.response_mask, strict=True)]
    exact = torch.stack([dense_kl(p, q).sum() for p, q in zip(old, ref, strict=True)])
    log_ratios = [(p - q).gather(-1, row[:, None]).squeeze(-1) for p, q, row in zip(old, ref, ids, strict=True)]
    estimates = [x if name == "k1" else (-x).exp() - 1 + x for x in log_ratios]
    found = case.window.anchor
    assert found.coef == 0.1 and found.share is None
    assert found.kl == pytest.approx(float(torch.stack([each.sum() for each in estimates]).mean()), rel=1e-4)
    assert found.kl_per_token == pytest.approx(float(torch.cat(estimates).mean()), rel=1e-4)
    assert found.kl_exact == pytest.approx(float(exact.mean()), rel=1e-4) and found.kl_exact > 0.01
    assert found.kl_stderr == pytest.approx(float(exact.std()) / math.sqrt(5), rel=1e-4)


@torch.no_grad()
def test_where_the_reference_is_kept_the_policy_is_measured_to_it():
    case = Case()
    with case.lm.without_noise():
        case.window.fix_old_policy()
        case.window.measure_anchor(Reference(case.model, case.lm), ESTIMATORS["k1"], keep=True)
        start = case.window.measure()
        case.move()
        found, new = case.window.measure(), rows_of(case.logps())
        with case.model.disable_adapter():
            ref = rows_of(case.logps())
    exact = [float(dense_kl(p, q).sum()) for p, q in zip(new, ref, strict=True)]
    assert found.anchor_kl == pytest.approx(sum(exact) / 5, rel=1e-4)
    assert found.anchor_start == start.anchor_start == start.anchor_kl == case.window.anchor.kl_exact, (
        "before a step the KL is not that of the old policy bit for bit"
    )
    assert abs(found.anchor_kl - found.anchor_start) > 0.01
    case.window.release()
    assert case.window.ref is None


@torch.no_grad()
def test_a_batch_in_which_no_token_counts():
    case = Case([micro(0, [0, 0], 4)])
    with case.lm.without_noise():
        case.window.fix_old_policy()
        case.window.measure_anchor(Reference(case.model, case.lm), ESTIMATORS["k3"])
        assert case.window.measure().tokens == 0 and case.window.measure().complete
    assert case.window.anchor is None


def test_steps_passes_metrics_and_rates():
    """Of two epochs and a half over two micro-batches, of which the last pass belongs to no step, and the step before it is
    dropped."""
    window = Case().window
    window.add_pass({"kl": [0.1, 0.2], "reward": [1.0]})
    window.add_pass({"kl": [0.3]})
    window.begin_step(lr=0.5, lr_factor=0.8)
    assert window.metrics == {"kl": [0.1, 0.2, 0.3], "reward": [1.0]} and window.epochs == 1.0
    window.add_pass({})
    window.begin_step(lr=0.4, lr_factor=0.7)
    assert window.epochs == 1.5 and window.dropped_steps == 0
    window.stopped = True
    window.add_pass({})
    window.begin_step(lr=0.3, lr_factor=0.6)
    window.add_pass({})
    assert (window.passes, window.epochs, window.steps, window.dropped_steps) == (5, 1.5, 3, 1)
    assert (window.lr, window.lr_factor) == (0.5, 0.8), "not those of the first step"


def test_an_optimizer_without_a_learning_rate():
    window = Case().window
    window.begin_step(lr=None, lr_factor=1.0)
    assert math.isnan(window.lr)


def test_the_time_of_a_step_is_divided_among_its_windows():
    """A step of three passes on one window and one on the next, and a step of two passes on that one."""
    first, second = Case().window, Case().window
    for _ in range(3):
        first.add_pass({})
    second.add_pass({"step_time": [8.0]})
    share_time([first, second])
    for window in (first, second):
        window.begin_step(lr=0.1, lr_factor=1.0)
    second.add_pass({})
    second.add_pass({"step_time": [1.0]})
    share_time([second])
    assert (first.step_seconds, second.step_seconds) == (6.0, 3.0)
