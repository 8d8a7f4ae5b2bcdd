"""A trainer that keeps what each phase returned, and helpers that run one."""

from __future__ import annotations

from typing import Any

from tests import tiny
from tests.scripted import Scripted
from tests.tiny import EOS
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.types import Batch, Prompts, Rollout, Scored, UpdateStats

ENDED, CUT = ([5, 7, EOS], 3), ([9, 8, 7, 6, 5, 4], 6)
"""Two responses for a script: one that ends by itself, and one that is cut off at the length."""


class Watched(Scripted):
    """Keeps what each phase returned. Without a script the responses are sampled from the policy."""

    script: list[tuple[list[int], int]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[str, list[Any]] = {}
        super().__init__(*args, **kwargs)

    def _keep(self, name: str, value: Any) -> Any:
        self.seen.setdefault(name, []).append(value)
        return value

    def rollout(self, prompts: Prompts) -> Rollout:
        sampled = TrustKLPPOTrainer.rollout(self, prompts) if self.script is None else super().rollout(prompts)
        return self._keep("rollout", sampled)

    def score(self, rollout: Rollout) -> Scored:
        return self._keep("score", super().score(rollout))

    def advantages(self, scored: Scored) -> Batch:
        return self._keep("advantages", super().advantages(scored))

    def optimise(self, batch: Batch) -> UpdateStats:
        return self._keep("optimise", super().optimise(batch))


def watched(folder: Any, model: Any = None, *, changes: dict[str, Any] | None = None, **arguments: Any) -> Watched:
    """A `Watched` trainer, built as by `tiny.trainer`; `script` may be given too."""
    script = arguments.pop("script", None)
    trainer = tiny.trainer(folder, model, kind=Watched, changes=changes, **arguments)
    trainer.script = script
    return trainer


def run(folder: Any, *args: Any, **kwargs: Any) -> tuple[Watched, list[dict[str, Any]]]:
    """A watched trainer after its run, and the records of the run."""
    trainer = watched(folder, *args, **kwargs)
    trainer.train()
    return trainer, load_records(folder)


def before_the_first_step(trainer: Any) -> Batch:
    """The batch of the first update, after a check that every ratio is exactly 1 and every KL exactly 0."""
    trainer._loop.begin()
    batch = trainer.advantages(trainer.score(trainer.rollout(trainer.next_prompts())))
    measured = trainer.measure(batch)
    assert measured.kl == measured.kl_max == measured.tv == 0.0 and measured.max_ratio == 1.0
    assert set(measured.ratio_quantiles.values()) == {1.0}
    assert not batch.scored.ref_kl.any()
    return batch


def optimizer_steps(monkeypatch: Any, trainer: Any) -> list[int]:
    """A list to which each optimizer step appends the number of its update, from 1."""
    steps: list[int] = []
    create = trainer.create_optimizer

    def counted(*args: Any) -> Any:
        optimizer = create(*args)
        step = optimizer.step

        def counting(*a: Any, **k: Any) -> Any:
            steps.append(trainer.state.global_step + 1)
            return step(*a, **k)

        monkeypatch.setattr(optimizer, "step", counting)
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", counted)
    return steps


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
