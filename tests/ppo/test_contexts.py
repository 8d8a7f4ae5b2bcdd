"""The context of an update: one object that every phase fills in, also where a subclass overrides `rollout`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.ppo import contexts
from trl_trustkl.records import BoundRecord
from trl_trustkl.rollout.sampling import response_seeds
from trl_trustkl.run.rng import mixed_seed
from trl_trustkl.trust.snapshot import UpdateSnapshot
from trl_trustkl.types import Batch, Measurement, Prompts, Rollout, Scored, UpdateContext, UpdateStats

pytestmark = pytest.mark.filterwarnings("ignore")


class Watched(TrustKLPPOTrainer):
    """Keeps the context that each phase takes or returns, and which of its fields were set by then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[str, UpdateContext, dict[str, Any]]] = []

    def saw(self, phase: str, context: UpdateContext | None) -> None:
        assert context is not None, phase
        filled = {name: getattr(context, name) for name in ("snapshot", "enforcement", "rejected")}
        self.seen.append((phase, context, filled | {"seconds": set(context.seconds)}))

    def rollout(self, prompts: Prompts) -> Rollout:
        self.saw("prompts", prompts.context)
        rollout = super().rollout(prompts)
        self.saw("rollout", rollout.context)
        return rollout

    def score(self, rollout: Rollout) -> Scored:
        scored = super().score(rollout)
        self.saw("scored", scored.context)
        self.saw("scored", scored.rollout.context)
        return scored

    def advantages(self, scored: Scored) -> Batch:
        batch = super().advantages(scored)
        self.saw("batch", batch.context)
        return batch

    def optimise(self, batch: Batch) -> UpdateStats:
        stats = super().optimise(batch)
        self.saw("optimised", batch.context)
        return stats

    def enforce(self, batch: Batch, proposed: Measurement) -> Measurement:
        measured = super().enforce(batch, proposed)
        self.saw("enforced", batch.context)
        assert measured is batch.context.enforcement.measured
        return measured

    def record(self, batch: Batch, stats: UpdateStats, measured: Measurement) -> BoundRecord:
        self.saw("recorded", batch.context)
        return super().record(batch, stats, measured)


class Own(Watched):
    """A trainer whose `rollout` ignores contexts."""

    def rollout(self, prompts: Prompts) -> Rollout:
        self.saw("prompts", prompts.context)
        generator = torch.Generator().manual_seed(self.state.global_step)
        ids = torch.randint(3, tiny.VOCAB, (len(prompts.ids), self.args.response_length), generator=generator)
        return Rollout(prompts.ids, prompts.mask, ids, torch.ones_like(ids, dtype=torch.bool), rows=prompts.rows)


def trained(
    tmp_path: Any, kind: type[Watched], **changes: Any
) -> list[list[tuple[str, UpdateContext, dict[str, Any]]]]:
    """What a run of this trainer saw, by update."""
    trainer = tiny.trainer(tmp_path, kind=kind, changes={"trust_max_kl": 1e-4, "learning_rate": 0.02} | changes)
    trainer.train()
    starts = [place for place, (phase, *_) in enumerate(trainer.seen) if phase == "prompts"]
    return [trainer.seen[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize("kind", [Watched, Own])
def test_one_context_goes_through_all_phases_of_an_update(kind, tmp_path):
    updates = trained(tmp_path, kind)
    assert len(updates) == 3
    for number, seen in enumerate(updates):
        first = seen[0][1]
        assert {phase for phase, *_ in seen} >= {"prompts", "scored", "batch", "optimised", "enforced", "recorded"}
        assert all(context is first for _, context, _ in seen), "a phase has the context of another update, or a copy"
        assert first.update == number and first.training and first.episode == 8 * number and first.random_states
    assert len({id(seen[0][1]) for seen in updates}) == 3
    assert len({seen[0][1].sampling_seed for seen in updates}) == 3


@pytest.mark.parametrize("kind", [Watched, Own])
def test_each_phase_fills_in_what_it_found_out(kind, tmp_path):
    for seen in trained(tmp_path, kind):
        at = {phase: filled for phase, _, filled in seen}
        assert at["batch"]["snapshot"] is None and at["batch"]["enforcement"] is None
        assert isinstance(at["optimised"]["snapshot"], UpdateSnapshot)
        assert at["optimised"]["enforcement"] is None
        assert at["enforced"]["enforcement"].scale < 1 and at["enforced"]["enforcement"].limit == 1e-4
        timed = {phase: at[phase]["seconds"] for phase in ("prompts", "batch", "optimised", "recorded")}
        assert timed == {
            "prompts": set(),
            "batch": {"sync", "generate"},
            "optimised": {"sync", "generate", "score"},
            "recorded": {"sync", "generate", "score", "optimise", "measure"},
        }
    for record, seen in zip(load_records(tmp_path), trained(tmp_path / "again", kind), strict=True):
        enforcement = seen[0][1].enforcement
        assert record["trust"]["scale"] == enforcement.scale and record["trust"]["tries"] == enforcement.tries
        assert (
            record["trust"]["kl"] == enforcement.measured.kl
            and record["trust"]["kl_proposed"] == enforcement.kl_proposed
        )
        assert record["seconds"].keys() == {"sync", "generate", "score", "optimise", "measure", "total"}


def test_a_rejected_update_says_why_in_its_context(tmp_path):
    for seen in trained(tmp_path, Own, panic_kl=2e-4, max_refused=9):
        context = seen[0][1]
        assert "panic_kl" in context.rejected and context.enforcement.rejected == context.rejected
        assert context.enforcement.scale == 0 and context.enforcement.measured.kl == 0
    assert all("panic_kl" in record["refused"] for record in load_records(tmp_path))


def test_a_rollout_without_a_context_trains_as_one_with_it(tmp_path):
    class Passes(Own):
        def rollout(self, prompts: Prompts) -> Rollout:
            return super().rollout(prompts)._replace(context=prompts.context)

    without, given = (tiny.trainer(tmp_path / kind.__name__, kind=kind) for kind in (Own, Passes))
    before = [p.detach().clone() for p in without.model.parameters()]
    for trainer in (without, given):
        trainer.train()
    assert not all(map(torch.equal, without.model.parameters(), before))
    assert all(map(torch.equal, without.model.parameters(), given.model.parameters()))


@pytest.mark.parametrize("kind", [Watched, Own])
def test_an_evaluation_batch_has_a_separate_context(kind, tmp_path):
    trainer = tiny.trainer(tmp_path, kind=kind, changes={"per_device_eval_batch_size": 3}, eval_dataset=tiny.prompts(7))
    metrics = trainer.evaluate()
    own = [context for phase, context, _ in trainer.seen if phase == "scored"]
    assert metrics["eval_score"] is not None
    assert len({id(context) for context in own}) == 3 and not any(context.training for context in own)
    different = {id(context): context for context in own}.values()
    assert [list(response_seeds(context, 3)) for context in different] == [
        [mixed_seed(own[0].sampling_seed, 3 * i + row) for row in range(3)] for i in range(3)
    ]
    assert all(context.snapshot is None and context.enforcement is None for context in own)


def test_the_phases_can_be_called_by_hand(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer._loop.begin()
    rollout = trainer.rollout(trainer.next_prompts())
    scored = trainer.score(rollout)
    assert rollout.context is scored.context and scored.context.training
    assert trainer.score(rollout._replace(context=None)).context.update == 0
    with pytest.raises(ValueError, match="has no context"):
        _ = scored._replace(rollout=rollout._replace(context=None)).context


def test_seeds_of_sampling_differ_by_update_process_and_use(tmp_path):
    args = tiny.config(tmp_path)
    state = tiny.trainer(tmp_path).state
    three = [SimpleNamespace(index=index, count=3) for index in range(3)]

    def of_update(args: Any, update: int) -> list[int]:
        """Of the 6 responses of all processes, in their order."""
        state.global_step = update
        found = [contexts.of_update(args, state, process, local=2) for process in three]
        return [seed for context in found for seed in response_seeds(context, 2)]

    def of_evaluation(update: int, processes: list[Any]) -> list[int]:
        """Of 6 rows of an evaluation set, in the order of the set."""
        state.global_step, each = update, 6 // len(processes)
        rows = [response_seeds(contexts.of_evaluation(args, state, process, 0), each) for process in processes]
        return [seed for column in zip(*rows, strict=True) for seed in column]

    updates = [of_update(args, update) for update in range(4)]
    assert len({seed for seeds in updates for seed in seeds} | {*of_evaluation(0, three)}) == 4 * 6 + 6
    state.global_step = 2
    alone = contexts.of_update(args, state, SimpleNamespace(index=0, count=1), local=6)
    assert response_seeds(alone, 6) == updates[2], "the seeds depend on the number of processes"
    one = [SimpleNamespace(index=0, count=1)]
    assert of_evaluation(0, three) == of_evaluation(3, three) == of_evaluation(0, one)
    assert not {*of_update(tiny.config(tmp_path, seed=7), 0)} & {seed for seeds in updates for seed in seeds}
