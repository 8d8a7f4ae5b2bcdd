"""What makes the host wait for a GPU while an update runs over its micro-batches: nothing of this package.

On a CPU a dispatch mode counts the reads of a number and the operators whose result has a shape that depends on the data.
`Tensor.tolist`, `cpu` and `numpy`, which it does not see on a CPU, are counted where they are called.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from tests import tiny
from tests.watched import before_the_first_step
from trl_trustkl.policy import value_head
from trl_trustkl.policy.forward import ForwardPass
from trl_trustkl.policy.reference import Reference
from trl_trustkl.ppo.optimise import Optimisation
from trl_trustkl.types import MicroBatch

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave"}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
FILES = ("/trl_trustkl/", "/transformers/", "/accelerate/")
IN_A_PASS = {"_ignore_causal_mask_sdpa"}
"""Transformers asks in each pass whether any token is masked."""
ON_THE_HOST = "micro_batches"
"""This function reads the masks of a rollout once, and computes on the host with them."""
LOOPS = ((ForwardPass, "score"), (ForwardPass, "compare"), (Reference, "snapshot"), (Optimisation, "_backward"))
"""What runs once for each micro-batch, or mini-batch."""
SETTINGS = tiny.ANCHORED | {"num_ppo_epochs": 1, "max_grad_norm": 1.0, "trust_max_kl": None, "clip_rule": "ppo"}


class Synchronising(TorchDispatchMode):
    """Counts the synchronisations inside, by the function that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def add(self, name: str) -> None:
        frames = [each for each in traceback.extract_stack() if any(file in each.filename for file in FILES)]
        if name == "cpu" or ON_THE_HOST not in {each.name for each in frames}:
            self.found[frames[-1].name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SHAPED_BY_DATA | READS or (name.startswith(("index", "_index")) and has_mask(args)):
            self.add(name)
        return func(*args, **(kwargs or {}))


def has_mask(args: Any) -> bool:
    given = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in given)


@contextmanager
def synchronisations(monkeypatch: Any) -> Iterator[Counter[str]]:
    mode = Synchronising()

    def counted(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mode.add(name)
            return read(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, mode:
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        yield mode.found


def in_an_update(folder: Any, monkeypatch: Any, size: int) -> dict[str, Counter[str]]:
    """The synchronisations of each phase of an update of eight responses in micro-batches of `size`, one optimizer step."""
    changes = SETTINGS | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = tiny.trainer(folder, changes=changes)
    before_the_first_step(trainer)
    found: dict[str, Counter[str]] = {}
    rollout = trainer.rollout(trainer.next_prompts())
    with synchronisations(monkeypatch) as found["score"]:
        scored = trainer.score(rollout)
    assert len(scored.micro_batches) == 8 // size
    batch = trainer.advantages(scored)
    with synchronisations(monkeypatch) as found["optimise"]:
        stats = trainer.optimise(batch)
    assert stats.steps == 1 and stats.refused is None
    with synchronisations(monkeypatch) as found["measure"]:
        assert trainer.measure(batch).kl > 0
    return found


def without_passes(found: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in found.items() if name not in IN_A_PASS})


def test_no_loop_over_micro_batches_waits_for_a_gpu(tmp_path, monkeypatch):
    """With four times as many micro-batches an update synchronises as often, but for what transformers does in a pass."""
    few, many = (in_an_update(tmp_path / str(size), monkeypatch, size) for size in (4, 1))
    for phase, counts in few.items():
        assert without_passes(counts) == without_passes(many[phase]), phase
        assert sum(counts[name] for name in IN_A_PASS) <= 2 * 2 * 2, phase  # two checks, two passes, two micro-batches
    assert few["score"][ON_THE_HOST] == 2  # the masks, and the order of the rows, which is on the host already
    assert few["optimise"]["run"] == 2  # the norms of the one step's gradients, and the sums of the epochs


def test_indexing_with_a_mask_in_a_loop_is_counted(tmp_path, monkeypatch):
    def with_mask(states: Tensor, micro: MicroBatch) -> Tensor:
        return states[:, -micro.response_ids.shape[1] - 1 : -1][micro.response_mask]

    monkeypatch.setattr(value_head, "predicting", with_mask)
    few, many = (in_an_update(tmp_path / str(size), monkeypatch, size) for size in (4, 1))
    for phase in few:
        assert without_passes(few[phase]) != without_passes(many[phase]), phase


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_reports_no_synchronisation_in_a_loop(tmp_path, monkeypatch):
    def in_mode(mode: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return inner(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    for kind, name in LOOPS:
        monkeypatch.setattr(kind, name, in_mode("error", getattr(kind, name)))
    monkeypatch.setattr(masking_utils, "fast_all", in_mode("default", masking_utils.fast_all))
    trainer = tiny.trainer(tmp_path, changes=SETTINGS | {"max_steps": 1, "use_cpu": False})
    trainer.train()
    assert trainer.state.global_step == 1
