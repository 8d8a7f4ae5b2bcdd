"""Training on an IterableDataset: its order, resuming, several processes, and its errors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from tests import survival, tiny
from tests.watched import run
from trl_trustkl import load_records
from trl_trustkl.errors import ConfigError, DataError
from trl_trustkl.rollout.prompt_stream import PromptStream, StreamOrder

pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(count: int) -> IterableDataset:
    return Dataset.from_dict({"number": range(count)}).to_iterable_dataset()


def numbers_at(stream: PromptStream, wanted: Any) -> list[int]:
    return [stream[place]["number"] for place in wanted]


def stream_of(count: int, seed: int = 3) -> PromptStream:
    return PromptStream(numbers(count), seed, lambda row, place: row | {"place": place})


def test_every_pass_has_each_row_once_in_another_order():
    found = numbers_at(stream_of(10), range(30))
    passes = [found[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_the_row_at_a_place_follows_from_the_seed():
    stream = stream_of(10)
    found = numbers_at(stream, range(25))
    assert found == numbers_at(stream_of(10), range(25)) != numbers_at(stream_of(10, seed=4), range(25))
    assert numbers_at(stream, [24, 3, 17]) == [found[24], found[3], found[17]]
    assert stream[7] == {"number": found[7], "place": 7}


def test_rows_are_prepared_only_where_they_are_asked_for():
    prepared: list[int] = []
    stream = PromptStream(numbers(10), 3, lambda row, place: prepared.append(place) or row)
    for place in (2, 3, 8, 1):
        stream[place]
    assert prepared == [2, 3, 8, 1]


def test_the_order_takes_the_next_rows():
    order = StreamOrder(batch_size=4, updates=7)
    assert [order.rows(update) for update in (0, 2)] == [[0, 1, 2, 3], [8, 9, 10, 11]] and order.batches_per_pass == 7


def fails_at(number: int) -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        for place in range(10):
            if place == number:
                raise OSError("the connection was lost")
            yield {"number": place}

    return IterableDataset.from_generator(rows)


def test_a_stream_that_cannot_be_read_or_is_empty_is_an_error():
    with pytest.raises(DataError, match=r"row 0 of the stream could not be read \(OSError: the connection was lost\)"):
        PromptStream(fails_at(3), 0, lambda row, place: row)[0]
    with pytest.raises(DataError, match="`train_dataset` is empty"):
        PromptStream(IterableDataset.from_generator(lambda: iter(())), 0, lambda row, place: row)[0]


# -- in a run ----------------------------------------------------------------------------------------------------------


def streamed(count: int = 12, **changes: Any) -> IterableDataset:
    return tiny.prompts(count, **changes).to_iterable_dataset()


def prompts_of(folder: Path) -> list[Any]:
    return [json.loads(line)["prompt"] for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_takes_every_row_of_the_stream(tmp_path, chat):
    trainer, records = run(tmp_path, train_dataset=streamed(12, chat=chat), changes={"max_steps": 3})
    assert len(records) == 3 and [entry.get("epoch") for entry in trainer.state.log_history][:3] == [1 / 3, 2 / 3, 1.0]
    wanted = Counter(str(row) for row in tiny.prompts(12, chat=chat)["prompt"])
    assert Counter(map(str, prompts_of(tmp_path))) == Counter({row: 2 * count for row, count in wanted.items()})
    assert next(iter(trainer.dataloader))["input_ids"].shape[0] == 8


def test_a_stream_of_token_ids(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[0, 5 + i, 7] for i in range(8)], "attention_mask": [[0, 1, 1]] * 8})
    trainer, _ = run(tmp_path, train_dataset=rows.to_iterable_dataset(), changes={"max_steps": 1})
    rollout = trainer.seen["rollout"][0]
    assert sorted(rollout.prompt_ids[:, -2:].tolist()) == [[5 + i, 7] for i in range(8)]
    assert rollout.prompt_mask.sum(1).tolist() == [2] * 8


def build(folder: Any, **changes: Any) -> Any:
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    return tiny.trainer(folder, train_dataset=streamed(), reward_funcs=survival.noisy_reward, changes=common | changes)


def test_a_run_on_a_stream_is_resumed_bit_for_bit(tmp_path):
    build(tmp_path / "uninterrupted").train()
    assert survival.cut_off(build(tmp_path / "resumed"), ("rollout", 4)) is not None
    build(tmp_path / "resumed").train(resume_from_checkpoint=True)
    assert survival.same(tmp_path / "uninterrupted", tmp_path / "resumed")


def read(dataset: IterableDataset, seed: int, count: int) -> list[str]:
    """The first prompts in the order of a run."""
    stream = PromptStream(dataset, seed, lambda row, place: row)
    return [stream[place]["prompt"] for place in range(count)]


def test_a_bad_row_ends_the_run_with_the_last_finished_update_saved(tmp_path):
    rows = [*tiny.prompts(16)["prompt"], "", *["w1"] * 8]
    bad = Dataset.from_dict({"prompt": rows}).to_iterable_dataset()
    found = {seed: read(bad, seed, 25).index("") for seed in range(9)}
    seed, place = next((seed, place) for seed, place in found.items() if place > 8)
    trainer = tiny.trainer(tmp_path, train_dataset=bad, changes={"max_steps": 6, "save_strategy": "no", "seed": seed})
    with pytest.raises(DataError, match=f"`train_dataset` row {place} has a prompt of no tokens"):
        trainer.train()
    done = place // 8
    assert len(load_records(tmp_path)) == done == trainer.state.global_step
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{done}"]


@pytest.mark.parametrize(
    ("dataset", "changes", "error", "pieces"),
    [
        (
            streamed(),
            {"max_steps": -1},
            ConfigError,
            "`max_steps` got -1 with a `train_dataset` that is an IterableDataset",
        ),
        (Dataset.from_dict({"text": ["w1"]}).to_iterable_dataset(), {}, DataError, "it must have 'prompt'"),
        (Dataset.from_dict({"prompt": [""]}).to_iterable_dataset(), {}, DataError, "row 0 has a prompt of no tokens"),
        (Dataset.from_dict({"prompt": ["w1 " * 130]}).to_iterable_dataset(), {}, DataError, "more than the context"),
        (Dataset.from_dict({"input_ids": [[99]]}).to_iterable_dataset(), {}, DataError, "row 0 has the token id 99"),
        (Dataset.from_dict({"prompt": ["w1"], "images": [[]]}).to_iterable_dataset(), {}, DataError, "'images'"),
        (IterableDataset.from_generator(lambda: iter(())), {}, DataError, "is empty"),
        (fails_at(0), {}, DataError, "the connection was lost"),
    ],
)
def test_what_is_wrong_from_the_start_is_an_error_at_construction(tmp_path, dataset, changes, error, pieces):
    with pytest.raises(error, match=pieces):
        tiny.trainer(tmp_path, train_dataset=dataset, changes=changes)


def test_an_evaluation_reads_the_stream_to_its_end(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_dataset={"few": streamed(3)})
    assert trainer.evaluate()["eval_few_length"] > 0
    assert len(trainer.evaluate_completions(streamed(5))) == 5
    with pytest.raises(DataError, match="`eval_dataset`: the stream could not be read"):
        tiny.trainer(tmp_path, eval_dataset=fails_at(2))
