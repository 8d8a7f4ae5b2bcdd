"""Decoding that waits for no value of the device, on a CPU: the same samples, and what is read for a token."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.generation import utils

from tests import tiny
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.transformers_engine import TransformersEngine
from trl_trustkl.trl_compat import decoding
from trl_trustkl.trl_compat.decoding import without_waiting

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(utils, "DeferredStopCheck"), reason="transformers reads at every token"),
]
CPU = torch.device("cpu")
PROMPTS = [torch.arange(3, 3 + length) + 2 * i for i, length in enumerate([1, 5, 3, 2, 4, 1, 6, 2])]
EQUAL = [torch.arange(3, 7) + 2 * i for i in range(8)]
EARLY, NEVER = [*range(2, 30)], []


class Event:
    """An event of a device, of which CPUs have none."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU; not the reads of a tensor that would be on the host."""

    on_host: list[torch.Tensor] = []

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if str(func) == "aten.index.Tensor" else ()
        boolean = any(each is not None and each.dtype == torch.bool for each in indices)
        reads = str(func).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        self.count += boolean or (reads and all(args[0] is not each for each in self.on_host))
        return func(*args, **(kwargs or {}))


def sampled(prompts: Any, stop_ids: list[int], *, length: int = 12, **options: Any) -> tuple[Samples, int]:
    """Samples, and the number of values that were read."""
    engine = TransformersEngine(
        options.pop("model", None) or tiny.llama(), response_length=length, temperature=0.7, stop_ids=stop_ids,
        pad_token_id=0, batch_size=8, autocast=contextlib.nullcontext, generation_kwargs=options,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    with Reads() as reads:
        return engine.generate(prompts, tiny.seeds(prompts, 1)), reads.count


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Treats the CPU as a device that computes while the host goes on, and counts the steps that were undone."""
    undone: Counter[str] = Counter()
    create, finish = utils.DeferredStopCheck.__init__, utils.DeferredStopCheck.finish

    def created(self: Any, *args: Any) -> None:
        create(self, *args)
        monkeypatch.setattr(Reads, "on_host", [flag for flag, *_ in self.slots])

    def counted(self: Any) -> int:
        undone["checks"] += 1
        undone["steps"] += (steps := finish(self))
        return steps

    monkeypatch.setattr(decoding, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(utils.DeferredStopCheck, "__init__", created)
    monkeypatch.setattr(utils.DeferredStopCheck, "finish", counted)
    return undone


OPTIONS = [
    {},
    {"cache_implementation": "static"},
    {"top_k": 5},
    {"stop_strings": ["w20", "w31"]},
    {"min_new_tokens": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["padded", "of_one_length"])
@pytest.mark.parametrize("stop_ids", [EARLY, NEVER], ids=["early", "never"])
def test_samples_are_the_same(options, prompts, stop_ids, request):
    if not stop_ids and "min_new_tokens" in options:
        pytest.skip("has no effect without a stop token")
    wanted, _ = sampled(prompts, stop_ids, **options)
    undone = request.getfixturevalue("forced")
    found, _ = sampled(prompts, stop_ids, **options)
    assert undone["checks"] == 1
    # Where all rows end before the last token, this is seen one token late.
    assert undone["steps"] == (max(map(len, wanted.ids)) < 12)
    assert undone["steps"] == 1 or not stop_ids or options, "not all rows ended early"
    assert found.finish_reasons == wanted.finish_reasons
    for ids, logps, old_ids, old_logps in zip(found.ids, found.logps, wanted.ids, wanted.logps, strict=True):
        assert ids.tolist() == old_ids.tolist() and torch.equal(logps, old_logps)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["padded", "of_one_length"])
def test_the_number_of_values_that_are_read_does_not_grow_with_the_length(forced, family, options, prompts):
    model = tiny.FAMILIES[family]().eval()
    reads = [sampled(prompts, NEVER, length=length, model=model, **options)[1] for length in (6, 30)]
    # GPT-2 looks for padding tokens where it gets no mask, to warn of them.
    looks = family == "gpt2" and prompts is EQUAL and "cache_implementation" not in options
    assert reads[1] - reads[0] == 24 * looks and reads[0] > 0


def test_without_the_context_values_are_read_for_every_token():
    assert sampled(PROMPTS, NEVER, length=30)[1] - sampled(PROMPTS, NEVER, length=6)[1] == 2 * 24
    static = {"cache_implementation": "static"}
    assert sampled(PROMPTS, NEVER, length=30, **static)[1] - sampled(PROMPTS, NEVER, length=6, **static)[1] == 24


def test_only_other_devices_than_cpus_are_concerned_and_the_functions_are_restored():
    before = vars(utils.DeferredStopCheck)["is_supported"], masking_utils._ignore_causal_mask_sdpa
    with without_waiting(CPU, padded=True):
        assert (vars(utils.DeferredStopCheck)["is_supported"], masking_utils._ignore_causal_mask_sdpa) == before
    with pytest.raises(KeyError), without_waiting(torch.device("cuda"), padded=True):
        assert utils.DeferredStopCheck.is_supported(torch.device("cuda"), None, False, is_assistant=False)
        assert not utils.DeferredStopCheck.is_supported(torch.device("cuda"), None, True, is_assistant=False)
        raise KeyError
    assert (vars(utils.DeferredStopCheck)["is_supported"], masking_utils._ignore_causal_mask_sdpa) == before


def test_a_transformers_without_these_functions_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(utils, "DeferredStopCheck")
    monkeypatch.delattr(masking_utils, "_ignore_causal_mask_sdpa")
    with without_waiting(torch.device("cuda"), padded=True):
        assert not hasattr(utils, "DeferredStopCheck")
