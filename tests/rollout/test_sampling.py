"""Stop tokens, the masks of responses, and samples as padded tensors."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests import tiny
from trl_trustkl.errors import ConfigError, RolloutError
from trl_trustkl.parallel.processes import Processes
from trl_trustkl.rollout.engine import Samples
from trl_trustkl.rollout.sampling import Rollouts, ended, is_stop, response_mask, stop_ids
from trl_trustkl.run.rng import mixed_seed
from trl_trustkl.run.signals import Overdue
from trl_trustkl.types import Prompts, Rollout, UpdateContext

IDS = torch.tensor([[0, 3, 4], [5, 6, 7]])
PROMPTS = Prompts(IDS, IDS != 0, [{"row": 0}, {"row": 1}], UpdateContext(0, True, 0, first_row=4, row_step=2))


@pytest.mark.parametrize(
    ("stop_token", "stop_token_id", "text", "expected"),
    [
        (None, None, True, [2, 5, 6]),
        (None, None, False, []),
        ("eos", None, False, [2, 5, 6]),
        ("none", None, True, []),
        (None, 7, True, [7]),
    ],
)
def test_stop_tokens_are_those_configured_or_all_that_are_declared(stop_token, stop_token_id, text, expected):
    model, args = tiny.llama(), SimpleNamespace(stop_token=stop_token, stop_token_id=stop_token_id)
    model.generation_config.eos_token_id = [6, 5]
    assert stop_ids(model, tiny.tokenizer(), args, text=text) == expected


def test_an_undeclared_end_of_sequence_is_no_stop_token():
    model, args = tiny.llama(), SimpleNamespace(stop_token="eos", stop_token_id=None)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tiny.tokenizer(), args, text=True) == [2]
    model.generation_config.eos_token_id = 9
    assert stop_ids(model, SimpleNamespace(eos_token_id=None), args, text=True) == [9]


@pytest.mark.parametrize("token", [-1, tiny.VOCAB])
def test_a_stop_token_outside_of_the_vocabulary_is_an_error(token):
    args = SimpleNamespace(stop_token=None, stop_token_id=token)
    with pytest.raises(ConfigError, match=f"`stop_token_id` got {token}; it must be a token of the model's, 0 to 42"):
        stop_ids(tiny.llama(), tiny.tokenizer(), args, text=True)


def test_a_mask_reaches_to_the_first_stop_token():
    response = torch.tensor([[3, 2, 2, 3], [3, 4, 3, 4], [5, 3, 2, 3], [3, 3, 3, 2]])
    mask = response_mask(is_stop(response, [2, 5]))
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False], [True] * 4]
    assert response_mask(is_stop(response, [])).all()
    rollout = Rollout(response, response > 0, response, mask)
    assert ended(rollout, [2, 5]).tolist() == [True, False, True, True] and not ended(rollout, []).any()


def test_a_rollout_may_say_itself_which_responses_ended():
    said = torch.tensor([True, False])
    rollout = Rollout(IDS, IDS != 0, torch.tensor([[3, 4], [3, 2]]), torch.ones(2, 2, dtype=torch.bool), ended=said)
    assert ended(rollout, [2]) is said


class Answers:
    """An engine that returns the given samples, and keeps its calls."""

    def __init__(
        self, *ids: list[int], logps: list[torch.Tensor] | None = None, reasons: list[Any] | None = None
    ) -> None:
        reasons = ["stop"] * len(ids) if reasons is None else reasons
        self.samples = Samples([torch.tensor(row) for row in ids], logps, reasons)
        self.calls: list[Any] = []

    def check(self):
        self.calls.append("check")

    def sync(self, version, weights):
        self.calls.append(("sync", version, dict(weights)))

    def generate(self, prompt_ids, seeds):
        self.calls.append(("generate", [prompt.tolist() for prompt in prompt_ids], list(seeds)))
        return self.samples

    def close(self):
        self.calls.append("close")


def rollouts(engine: Any, length: int = 3, pad_token_id: int = 0, weights: Any = lambda: iter(())) -> Rollouts:
    processes = Processes(Accelerator(cpu=True))
    return Rollouts(engine, weights, processes, vocabulary=10, length=length, pad_token_id=pad_token_id)


def sample(engine: Any, **settings: Any) -> Rollout:
    return rollouts(engine, **settings).sample(PROMPTS, PROMPTS.context)


@pytest.mark.parametrize("logps", [None, [torch.tensor([-1.0, -2.0]), -torch.ones(3)]], ids=["without", "with"])
def test_samples_are_padded_on_the_right_with_a_mask_of_their_tokens(logps):
    found = sample(Answers([7, 2], [8, 9, 2], logps=logps), length=4, pad_token_id=2)
    assert found.response_ids.tolist() == [[7, 2, 2, 2], [8, 9, 2, 2]]
    assert found.response_mask.tolist() == [[True, True, False, False], [True, True, True, False]]
    if logps is None:
        assert found.sampler_logp is None
    else:
        assert found.sampler_logp.tolist() == [[-1, -2, 0, 0], [-1, -1, -1, 0]]
    assert found.prompt_ids is IDS and found.rows is PROMPTS.rows and found.context is PROMPTS.context


def test_an_engine_gets_the_weights_the_prompts_without_padding_and_a_seed_for_each():
    engine = Answers([3, 2], [2])
    found = sample(engine, weights=lambda: iter([("w", IDS)]))
    (_, version, weights), asked = engine.calls
    assert version == 0 and weights["w"] is IDS
    assert asked == ("generate", [[3, 4], [5, 6, 7]], [mixed_seed(0, 4), mixed_seed(0, 6)])
    assert found.response_ids.tolist() == [[3, 2, 0], [2, 0, 0]]


def test_weights_that_may_have_changed_are_a_new_version():
    engine = Answers([3, 2], [2])
    part = rollouts(engine)
    for changes in (0, 0, 1, 0, 2):
        for _ in range(changes):
            part.weights_changed()
        part.sample(PROMPTS, PROMPTS.context)
    assert [call[1] for call in engine.calls if call[0] == "sync"] == [0, 0, 1, 1, 3]


def test_weights_that_are_read_together_are_computed_only_for_an_engine_that_reads_them():
    for reads in (True, False):
        engine, computed = Answers([3, 2], [2]), []

        def weights(computed: list[str] = computed) -> Any:
            computed.append("w")
            yield "w", IDS

        if not reads:
            engine.sync = lambda version, weights: None
        part = Rollouts(
            engine, weights, Processes(Accelerator(cpu=True)), vocabulary=10, length=3, pad_token_id=0, together=True
        )
        part.sample(PROMPTS, PROMPTS.context)
        assert computed == ["w"] * reads


def test_in_an_evaluation_the_weights_are_sent_once_before_all_batches():
    engine = Answers([3, 2], [2])
    part, context = rollouts(engine), UpdateContext(update=0, training=False, sampling_seed=0)
    assert part.sync() >= 0
    for _ in range(3):
        part.sample(PROMPTS, context)
    assert [call[0] for call in engine.calls] == ["sync", *["generate"] * 3]


def test_the_time_of_sending_the_weights_is_kept():
    engine = Answers([3, 2], [2])
    engine.sync = lambda version, weights: time.sleep(0.05)
    context = UpdateContext(update=0, training=True, sampling_seed=0)
    rollouts(engine).sample(PROMPTS, context)
    assert 0.05 <= context.sync_seconds < 5


def test_a_response_ended_where_the_engine_says_so():
    """One that a stop string ended has no stop token, and one with a stop token may have been cut."""
    found = sample(Answers([3, 4], [3, 2], reasons=["stop", "length"]), length=2)
    assert ended(found, [2]).tolist() == [True, False]


HALF = [torch.tensor([-1.0])] * 2


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Answers([3, 4], [3, 2], reasons=["stop"]), "2 responses of up to 2 tokens and 1 finish reasons; it must"),
        (Answers([3, 2]), "1 responses of up to 2 tokens and 1 finish reasons; it must return 2, one for each prompt"),
        (Answers([3, 2], [4, 4, 4, 2]), "2 responses of up to 4 tokens and .* of at most response_length=3 tokens"),
        (Answers(), "0 responses of up to 0 tokens"),
        (Answers([3, 2], [4, 2], logps=HALF), "log-probabilities of other shapes"),
        (Answers([3, 2], [10]), "the tokens 2 to 10; the policy's are 0 to 9: it samples from another model"),
        (Answers([3, -1], [2]), "the tokens -1 to 3"),
    ],
)
def test_an_engine_that_returns_something_else_is_named(engine, said):
    with pytest.raises(RolloutError, match=f"the rollout engine Answers returned {said}"):
        sample(engine)


@pytest.mark.parametrize("method", ["check", "sync", "generate"])
def test_an_error_of_an_engine_becomes_one_of_the_rollout(method):
    engine = Answers([3, 2], [2])

    def fail(*args: Any) -> None:
        raise KeyError("gone")

    setattr(engine, method, fail)
    part = rollouts(engine)
    with pytest.raises(RolloutError, match="the rollout engine Answers failed: KeyError: 'gone'"):
        part.check() if method == "check" else part.sample(PROMPTS, PROMPTS.context)


@pytest.mark.parametrize("error", [Overdue(), RolloutError("theirs"), ConfigError("theirs")])
@pytest.mark.parametrize("method", ["check", "sync", "generate"])
def test_an_error_on_any_process_is_raised_on_all(method, error):
    engine = Answers([3, 2], [2])
    part = rollouts(engine)
    told: list[Any] = []

    def raise_on_all(found: Exception | None) -> None:
        told.append(found)
        if found is not None:
            raise found

    part._processes.raise_on_all = raise_on_all

    def fail(*args: Any) -> None:
        raise error

    setattr(engine, method, fail)
    with pytest.raises(type(error)):
        part.check() if method == "check" else part.sample(PROMPTS, PROMPTS.context)
    assert told[-1] is error


@pytest.mark.parametrize("error", [Overdue(), ConfigError("theirs"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error):
    engine = Answers([3, 2], [2])

    def fail(*args: Any) -> None:
        raise error

    engine.generate = fail
    with pytest.raises(type(error)):
        sample(engine)
