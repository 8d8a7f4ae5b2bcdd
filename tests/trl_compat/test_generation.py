"""What TRL's trainers keep of a generation batch, against a simulation of how they use it, and against real trainers."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer

from tests import tiny
from tests.trl_trainers import KINDS, trainer_of
from trl_trustkl.errors import ModelError
from trl_trustkl.trl_compat import generation

pytestmark = pytest.mark.filterwarnings("ignore")
GRID = list(itertools.product(range(1, 5), range(1, 4), range(1, 7)))
"""steps_per_generation, num_iterations, gradient_accumulation_steps."""


def simulated(
    kind: type, steps_per_generation: int, num_iterations: int, accumulation: int, passes: int
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """For each pass that TRL's own `_prepare_inputs` prepares: the generation batch that it uses, the micro-batch of it, and
    (end, index) as this package computes them after the pass."""
    count = itertools.count()
    args = SimpleNamespace(
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        gradient_accumulation_steps=accumulation,
    )
    trainer = SimpleNamespace(
        args=args, model=SimpleNamespace(training=True), num_iterations=num_iterations, _step=0, _buffered_inputs=None,
        _generate_and_score_completions=lambda batch: {"batch": torch.full((steps_per_generation,), next(count))},
    )  # fmt: skip
    prepare = inspect.unwrap(kind._prepare_inputs)
    batches, parts, found = [], [], []
    for _ in range(passes):
        inputs = prepare(trainer, {})
        batches.append(int(inputs["batch"]))
        parts.append(next(i for i, each in enumerate(trainer._buffered_inputs) if each is inputs))
        trainer._step += 1  # as `training_step` does
        assert generation.passes(trainer) == len(batches)
        found.append((generation.end_of_generation(trainer), generation.current_micro_batch(trainer)))
    return batches, parts, found


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_ends_of_windows_and_micro_batches_are_those_of_trls_own_passes(kind):
    for each in GRID:
        passes = 2 * math.lcm(each[0] * each[1], each[2])
        batches, parts, found = simulated(kind, *each, passes)
        last = {batch: number for number, batch in enumerate(batches, start=1)}
        assert [end for end, _ in found] == [last[batch] for batch in batches], each
        assert [index for _, index in found] == parts, each
        args = SimpleNamespace(steps_per_generation=each[0], num_iterations=each[1])
        assert generation.passes_per_generation(SimpleNamespace(args=args)) == batches.count(0), each


def test_steps_are_shared_where_a_step_uses_a_batch_with_another_one_and_with_another_step():
    shared = []
    for each in GRID:
        size, accumulation = each[0] * each[1], each[2]
        batches, _, _ = simulated(GRPOTrainer, *each, 2 * math.lcm(size, accumulation))
        steps = [set(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation)]
        used = [sum(batch in step for step in steps) for batch in range(max(batches) + 1)]
        expected = any(len(step) > 1 and any(used[batch] > 1 for batch in step) for step in steps)
        args = SimpleNamespace(
            steps_per_generation=each[0], num_iterations=each[1], gradient_accumulation_steps=each[2]
        )
        assert generation.steps_are_shared(SimpleNamespace(args=args, _step=0)) == expected, each
        shared.append(expected)
    assert 10 < sum(shared) < len(shared) - 10


@pytest.mark.parametrize(("size", "accumulation"), [(2, 4), (4, 2), (3, 3), (4, 4), (1, 3), (3, 1), (6, 3)])
def test_steps_are_shared_after_passes_that_ended_no_step(size, accumulation):
    args = SimpleNamespace(steps_per_generation=size, num_iterations=1, gradient_accumulation_steps=accumulation)
    for made in range(2 * max(size, accumulation)):
        passes = [*range(made, made + 4 * size * accumulation)]
        steps = [{each // size for each in passes[i : i + accumulation]} for i in range(0, len(passes), accumulation)]
        used = Counter(batch for step in steps for batch in step)
        expected = any(len(step) > 1 and any(used[batch] > 1 for batch in step) for step in steps)
        assert generation.steps_are_shared(SimpleNamespace(args=args, _step=made)) == expected, made


# -- the batch ---------------------------------------------------------------------------------------------------------


def part(first: int, **more: Any) -> dict[str, Any]:
    """A micro-batch of TRL with two rows."""
    return {
        "prompt_ids": torch.tensor([[0, 3 + first], [4, 5]]), "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[6, 7, 8], [9, 2, 0]]), "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    } | more  # fmt: skip


def test_micro_batches_have_trls_tokens_padding_and_order():
    tools = torch.tensor([[1, 0, 1], [1, 1, 1]])
    trainer = SimpleNamespace(_buffered_inputs=[part(0), part(1, tool_mask=tools)])
    first, second = generation.micro_batches(trainer)
    assert first.rows.tolist() == [0, 1] and second.rows.tolist() == [2, 3]
    assert first.input_ids.tolist() == [[0, 3, 6, 7, 8], [4, 5, 9, 2, 0]] and first.position_ids is None
    assert first.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert first.response_ids.tolist() == [[6, 7, 8], [9, 2, 0]] and second.input_ids[0, 1] == 4
    assert first.response_mask.tolist() == [[True, True, True], [True, True, False]]
    assert second.response_mask.tolist() == [[True, False, True], [True, True, False]], "a tool's output counts"
    assert second.attention_mask.tolist() == first.attention_mask.tolist(), "a tool's output is not seen"


def test_no_batch_yet_and_a_batch_with_images():
    assert generation.micro_batches(SimpleNamespace(_buffered_inputs=None)) == []
    with pytest.raises(ModelError, match="the generation batch has images.*train on prompts of text, without a column"):
        generation.micro_batches(SimpleNamespace(_buffered_inputs=[part(0, pixel_values=torch.zeros(2, 3))]))


def test_what_generates():
    args = SimpleNamespace(steps_per_generation=1)
    kept = {"_buffered_inputs": None, "_step": 0, "_metrics": {}, "_logs": {}}
    assert generation.generates(SimpleNamespace(args=args, **kept))
    assert not generation.generates(SimpleNamespace(args=SimpleNamespace(), **kept))
    for name in kept:
        assert not generation.generates(SimpleNamespace(args=args, **{k: v for k, v in kept.items() if k != name}))
    assert not generation.generates(None)


class Passes(TrainerCallback):
    """The inputs of each pass of a real trainer, and what this package reads of its state after it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.inputs, self.ends = trainer, [], []
        compute = trainer._compute_loss

        def keep(model: Any, inputs: Any) -> Any:
            self.inputs.append(inputs)
            return compute(model, inputs)

        trainer._compute_loss = keep

    def after(self) -> None:
        trainer = self.trainer
        micro = generation.micro_batches(trainer)[generation.current_micro_batch(trainer)]
        inputs = self.inputs[-1]
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        assert torch.equal(micro.input_ids, ids) and torch.equal(micro.attention_mask, mask)
        self.ends.append(generation.end_of_generation(trainer))

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.after()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.after()


@KINDS
def test_the_micro_batch_of_a_pass_is_the_one_that_the_trainer_passed_to_its_loss(kind, tmp_path):
    trainer = trainer_of(
        kind, tmp_path, steps_per_generation=3, num_iterations=2, num_generations=2, max_steps=5, learning_rate=1e-3
    )
    assert generation.generates(trainer)
    passes = Passes(trainer)
    trainer.add_callback(passes)
    trainer.train()
    assert passes.ends == [6] * 6 + [12] * 4


# -- metrics and completions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_each_value_of_a_metric_is_read_exactly_once(seed):
    """In any order of passes, readings and logs, as long as what was measured is read before it is logged."""
    chance = random.Random(seed)
    trainer = SimpleNamespace(_metrics={"train": defaultdict(list), "eval": defaultdict(list)})
    trainer._metrics["train"]["kl"].append(-1.0)
    metrics = generation.NewMetrics(trainer)
    assert metrics.take() == {"kl": [-1.0]} and metrics.take() == {}
    number, read, wanted = itertools.count(), defaultdict(list), defaultdict(list)
    for _ in range(200):
        for name in chance.sample(["kl", "reward", "entropy"], chance.randint(0, 3)):
            wanted[name].append(float(next(number)))
            trainer._metrics["train"][name].append(wanted[name][-1])
        trainer._metrics["eval"]["kl"].append(math.nan)
        if chance.random() < 0.7:
            found = metrics.take()
            assert all(found.values()), "an empty list"
            for name, values in found.items():
                read[name].extend(values)
            if chance.random() < 0.4:
                trainer._metrics["train"].clear()  # as after a log
    for name, values in metrics.take().items():
        read[name].extend(values)
    assert read == wanted


def dataset(*, stream: bool = False, **columns: Any) -> Any:
    """A trainer with these columns."""
    data = Dataset.from_dict(columns)
    return SimpleNamespace(train_dataset=data.to_iterable_dataset() if stream else data)


PICTURE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
TEXT = [{"role": "user", "content": "what is it?"}]


@pytest.mark.parametrize(
    ("trainer", "where"),
    [
        (dataset(prompt=["a"], wanted=["b"]), None),
        (dataset(prompt=[TEXT]), None),
        (dataset(prompt=[[{"role": "user", "content": [{"type": "text", "text": "a"}]}]]), None),
        (dataset(prompt=[]), None),
        (dataset(environment=["one"]), None),
        (SimpleNamespace(train_dataset=None), None),
        (dataset(prompt=["a"], image=[None]), "the column 'image'"),
        (dataset(images=[[]], prompt=["a"]), "the column 'images'"),
        (dataset(prompt=[PICTURE]), "an image in the first prompt"),
        (dataset(stream=True, prompt=["a"], image=[1]), "the column 'image'"),
        (dataset(stream=True, prompt=[PICTURE]), None),
    ],
)  # fmt: skip
def test_images_are_found_before_a_rollout(trainer, where):
    assert generation.images(trainer) == where


def logs(
    prompts: list,
    completions: list,
    rewards: dict[str, list[float]],
    count: int,
    *,
    extra: Any = None,
    names: Any = None,
) -> Any:
    """A trainer with these logs, of which the last `count` are of its last batch."""
    return SimpleNamespace(
        args=SimpleNamespace(generation_batch_size=count),
        reward_func_names=list(rewards) if names is None else names,
        reward_weights=torch.tensor([1.0, 0.5][: len(rewards)]),
        _logs={
            "prompt": deque(prompts), "completion": deque(completions),
            "rewards": {name: deque(values) for name, values in rewards.items()},
            "extra": {name: deque(values) for name, values in (extra or {}).items()},
        },
    )  # fmt: skip


def test_completions_are_the_last_rows_with_their_weighted_rewards():
    rewards = {"one": [9.0, 1.0, math.nan, 3.0, math.nan], "two": [9.0, 2.0, 4.0, math.nan, math.nan]}
    trainer = logs(list("pqrst"), list("abcde"), rewards, count=4)
    found = generation.completions(trainer)
    assert [row[:3] for row in found] == [("q", "b", 2.0), ("r", "c", 2.0), ("s", "d", 3.0), ("t", "e", None)]
    assert [row.rewards for row in found] == [
        {"one": 1.0, "two": 2.0}, {"one": None, "two": 4.0}, {"one": 3.0, "two": None}, {"one": None, "two": None},
    ]  # fmt: skip


def test_completions_have_what_reward_functions_logged():
    extra = {"words": [9, 1, "two"], "of an evaluation": [1]}
    found = generation.completions(logs(list("pqr"), list("abc"), {"one": [9.0, 1.0, 2.0]}, count=2, extra=extra))
    assert [row.extra for row in found] == [{"words": 1}, {"words": "two"}]


def test_functions_of_one_name_have_the_rewards_of_the_second_and_no_score():
    trainer = logs(list("pq"), list("ab"), {"one": [3.0, 4.0]}, count=2, names=["one", "one"])
    assert [(row.score, row.rewards) for row in generation.completions(trainer)] == [
        (None, {"one": 3.0}), (None, {"one": 4.0}),
    ]  # fmt: skip


def test_conversations_are_lines_of_text():
    image = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": image}]
    answer = [{"role": "assistant", "content": None}, {"role": "tool", "content": "42"}]
    (row,) = generation.completions(logs([prompt], [answer], {"one": [0.5]}, count=1))
    assert row[:3] == ("system: be brief\nuser: <image> what is it?", "assistant: \ntool: 42", 0.5)


def none_for_short(prompts: list, completions: list, log_extra: Any = None, **_: Any) -> list[float | None]:
    if log_extra is not None:
        log_extra("length", [len(text) for text in completions])
    return [None if len(text.split()) % 2 else 1.0 for text in completions]


@KINDS
def test_completions_of_a_real_trainer(kind, tmp_path):
    """Also in the second generation, and after an evaluation, whose rows go to the same logs."""
    trainer = trainer_of(
        kind, tmp_path, max_steps=3, reward_weights=[1.0, 0.25], eval_strategy="steps", eval_steps=1,
        reward_funcs=[tiny.good_words, none_for_short],
    )  # fmt: skip
    generated: list[tuple[list[str], list[str]]] = []
    found: list[Any] = []
    scored: list[tuple[Any, list[str]]] = []
    calculate = trainer._calculate_rewards

    def keep(inputs: Any, prompts: Any, completions: Any, *rest: Any) -> Any:
        if trainer.model.training:
            generated.append((list(prompts), list(completions)))
        return calculate(inputs, prompts, completions, *rest)

    trainer._calculate_rewards = keep

    class Reads(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append(generation.completions(trainer))
            ids = torch.cat([part["completion_ids"] for part in trainer._buffered_inputs])
            texts = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
            scored.append((generation.scores(trainer), texts))

    trainer.add_callback(Reads())
    trainer.train()
    assert len(found) == len(generated) == 3
    for rows, (prompts, texts) in zip(found, generated, strict=True):
        assert [row.completion for row in rows] == texts
        assert [tiny.without_special(row.prompt) for row in rows] == [tiny.without_special(each) for each in prompts]
        first, second = tiny.good_words(prompts, texts), none_for_short(prompts, texts)
        weighted = [a + 0.25 * (b or 0.0) for a, b in zip(first, second, strict=True)]
        assert [row.score for row in rows] == pytest.approx(weighted)
        assert [row.rewards["none_for_short"] for row in rows] == second
        assert [row.rewards["good_words"] for row in rows] == pytest.approx(first)
        assert [row.extra for row in rows] == [{"length": len(text)} for text in texts]
    assert any(score is None for _, texts in generated for score in none_for_short([], texts))
    for scores, texts in scored:
        both = zip(tiny.good_words([], texts), none_for_short([], texts), strict=True)
        assert scores.tolist() == pytest.approx([a + 0.25 * (b or 0.0) for a, b in both])
    assert [texts for _, texts in scored] != [texts for _, texts in generated], "TRL did not shuffle the rows"


# -- scores ------------------------------------------------------------------------------------------------------------


def chat(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents, strict=False)
    ]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def shuffled(rows: list[tuple[Any, Any, float, float]], order: list[int], process: int = 0) -> Any:
    """A trainer whose logs have these rows (prompt, completion, advantage, reward), and whose batch those of `order`, in two
    micro-batches, of this one of two processes."""
    tokenizer = tiny.tokenizer()
    prompts, completions, advantages, rewards = zip(*rows, strict=True)
    trainer = logs(list(prompts), list(completions), {"one": list(rewards)}, count=len(rows))
    trainer._logs["advantages"] = deque(advantages)
    trainer.processing_class, trainer.accelerator = tokenizer, SimpleNamespace(process_index=process)

    def ids(texts: list[str], side: str) -> torch.Tensor:
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, encoded))
        pads = [[tokenizer.pad_token_id] * (width - len(each)) for each in encoded]
        return torch.tensor([p + e if side == "left" else e + p for e, p in zip(encoded, pads, strict=True)])

    def rendered(prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, tokenize=False)

    parts = [order[: len(order) // 2], order[len(order) // 2 :]]
    trainer._buffered_inputs = [
        {
            "prompt_ids": ids([rendered(prompts[i]) for i in part], "left"),
            "completion_ids": ids([generation._contents(completions[i])[0] + " <eos>" for i in part], "right"),
            "advantages": torch.tensor([advantages[i] for i in part]),
        }
        for part in parts
    ]
    return trainer


UNIQUE = [("w1", "w2", 0.5, 3.0), ("w1", "w3", -0.5, 1.0), ("w4", "w2", 0.25, math.nan), ("w4", "w5", -0.25, 8.0)]
BY_TEXT = [("w1", "w2", 0.0, 1.0), ("w1", "w3", 0.0, 1.0), ("w4", "w5", 0.0, 0.0), ("w4", "w6 w7", 0.0, 0.0)]
BY_PROMPT = [("w1", "w2", 0.0, 1.0), ("w1", "w2", 0.0, 1.0), ("w1 w4", "w2", 0.0, 0.0), ("w1 w4", "w2", 0.0, 0.0)]
CHATS = [
    (chat("w1"), answer("w2"), 0.0, 1.0), (chat("w1"), answer("w2"), 0.0, 1.0),
    (chat("w1", "w5", "w4"), answer("w2"), 0.0, 0.0), (chat("w1", "w5", "w4"), answer("w2"), 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("rows", [UNIQUE, BY_TEXT, BY_PROMPT, CHATS])
@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0], [0, 1, 2, 3]])
def test_scores_are_in_the_order_of_the_batch(rows, order):
    wanted = [rows[i][3] for i in order]
    assert generation.scores(shuffled(rows, order)).tolist() == pytest.approx(wanted, nan_ok=True)


def test_scores_are_those_of_this_process():
    rows = [(prompt, text, advantage, reward + 10) for prompt, text, advantage, reward in UNIQUE]
    assert generation.scores(shuffled(UNIQUE + rows, [5, 4, 7, 6], process=1)).tolist() == pytest.approx(
        [11.0, 13.0, 18.0, math.nan], nan_ok=True
    )
    assert generation.scores(shuffled(UNIQUE + rows, [1, 0, 3, 2])).tolist() == pytest.approx(
        [1.0, 3.0, 8.0, math.nan], nan_ok=True
    )


def test_scores_that_cannot_be_told_apart_are_unknown():
    same = [("w1", "w2", 0.0, 1.0), ("w1", "w2", 0.0, 0.0)]
    assert generation.scores(shuffled(same, [0, 1])) is None
    parsed = [(chat("w1"), [{"role": "assistant", "content": None}], 0.0, float(i)) for i in range(2)]
    trainer = shuffled(BY_TEXT[:2], [0, 1])
    trainer._logs["completion"], trainer._logs["rewards"]["one"] = deque(row[1] for row in parsed), deque([0.0, 1.0])
    assert generation.scores(trainer) is None, "the logged completion is not the text of the tokens"


def test_scores_of_rows_that_are_not_logged_are_unknown():
    trainer = shuffled(UNIQUE, [0, 1, 2, 3])
    trainer._buffered_inputs[0]["advantages"] += 1.0
    assert generation.scores(trainer) is None
    trainer._buffered_inputs[0]["advantages"] = torch.zeros(2, 3)
    assert generation.scores(trainer) is None, "an advantage for each token"
    trainer._buffered_inputs = None
    assert generation.scores(trainer) is None
