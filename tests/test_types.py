"""The values passed between the phases of an update, with a part of them missing."""

from __future__ import annotations

import pytest
import torch

from trl_trustkl.types import MicroBatch, Rollout, Scored, UpdateContext, indices


class Taken:
    path = None

    def restore(self) -> None: ...


def scored(context: UpdateContext | None) -> Scored:
    ids, mask = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    column = torch.zeros(1, 2)
    rollout = Rollout(ids, mask, ids, mask, context=context)
    return Scored(rollout, [], [], column, column, column, column, column, mask, mask, column[:, 0], [], {})


def test_the_snapshot_of_a_context_is_the_one_taken_or_an_error():
    context = UpdateContext(update=0, training=True, sampling_seed=1)
    with pytest.raises(ValueError, match="`optimise` took no snapshot of the update"):
        context.taken_snapshot()
    context.snapshot = Taken()
    assert context.taken_snapshot() is context.snapshot


def test_contexts_do_not_share_what_the_phases_add():
    first, second = (UpdateContext(update=update, training=True, sampling_seed=1) for update in range(2))
    first.seconds["generate"] = 1.0
    first.random_states["torch"] = b""
    assert second.seconds == {} and second.random_states == {} and second.started >= first.started


def test_the_context_of_a_scored_rollout_is_that_of_the_rollout_or_an_error():
    context = UpdateContext(update=3, training=True, sampling_seed=1)
    assert scored(context).context is context
    with pytest.raises(ValueError, match="the rollout has no context"):
        _ = scored(None).context


@pytest.mark.parametrize("given", [None, torch.tensor([0, 2, 4])])
def test_the_tokens_of_a_micro_batch_are_those_under_its_mask_in_their_order(given):
    mask, ids = torch.tensor([[True, False, True], [False, True, False]]), torch.arange(10, 16).view(2, 3)
    micro = MicroBatch(torch.arange(2), ids, ids, None, ids, mask, given)
    assert torch.equal(micro.tokens, indices(mask)) and torch.equal(micro.targets, ids[mask])
