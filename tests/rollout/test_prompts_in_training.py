"""The prompts of a run: order, padding, chat templates and data collators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests import tiny
from tests.tiny import EOS, PAD
from tests.watched import run, without_seconds
from trl_trustkl.errors import DataError
from trl_trustkl.rollout.prompts import PromptOrder

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_pass_over_the_dataset_has_a_different_order(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 4})
    prompts = [[row["wanted"] for row in rollout.rows] for rollout in trainer.seen["rollout"]]
    first, second = prompts[0] + prompts[1], prompts[2] + prompts[3]
    assert sorted(first) == sorted(second) == sorted(trainer.train_dataset["wanted"])
    assert first != second


def test_every_pass_of_every_seed_has_a_different_order():
    orders = [tuple(PromptOrder(64, 64, seed).rows(update)) for seed in (42, 43, 44) for update in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(64)) for order in orders)
    assert PromptOrder(64, 16, 42).rows(5) == PromptOrder(64, 64, 42).rows(1)[16:32]


def test_text_prompts_are_left_padded_and_stop_at_eos(tmp_path):
    trainer, _ = run(tmp_path, changes={"max_steps": 1})
    rollout = trainer.seen["rollout"][0]
    tokenizer = tiny.tokenizer()
    for ids, mask, row in zip(rollout.prompt_ids, rollout.prompt_mask, rollout.rows, strict=True):
        assert ids[mask].tolist() == tokenizer(row["prompt"])["input_ids"]
        assert mask.tolist() == sorted(mask.tolist()) and (ids[~mask] == PAD).all()
    for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True):
        tokens = ids.tolist()
        end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert mask.tolist() == [i < end for i in range(len(tokens))] and set(tokens[end:]) <= {PAD}


def test_chat_prompts_go_through_the_template_and_come_back_as_messages(tmp_path):
    seen = {}

    def judge(prompts, completions, **_):
        seen["prompts"], seen["completions"] = prompts, completions
        return [1.0] * len(prompts)

    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=judge, train_dataset=tiny.prompts(chat=True))
    rollout = trainer.seen["rollout"][0]
    tokenizer = tiny.tokenizer()
    for ids, mask, prompt in zip(rollout.prompt_ids, rollout.prompt_mask, seen["prompts"], strict=True):
        assert prompt == [{"role": "user", "content": prompt[0]["content"]}]
        expected = f"<bos> user {prompt[0]['content']} <eos> <bos> assistant"
        assert tokenizer.decode(ids[mask]) == expected
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in seen["completions"])
    assert [c[0]["content"] for c in seen["completions"]] == trainer.seen["score"][0].completions


def test_the_collator_of_trl_works(tmp_path):
    from transformers import DataCollatorWithPadding

    collator = DataCollatorWithPadding(tiny.tokenizer())
    collator.tokenizer.padding_side = "left"
    one = run(tmp_path / "one", train_dataset=tiny.id_prompts(), data_collator=collator)[1]
    other = run(tmp_path / "other", train_dataset=tiny.id_prompts())[1]
    assert without_seconds(one) == without_seconds(other)


def test_a_collator_that_pads_has_to_say_where(tmp_path):
    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {"input_ids": torch.tensor([[PAD] * (longest - len(r["input_ids"])) + r["input_ids"] for r in rows])}

    with pytest.raises(DataError, match="`data_collator` .* no `attention_mask`"):
        run(tmp_path / "lengths", train_dataset=tiny.id_prompts(), data_collator=collator)
    even = Dataset.from_dict({"input_ids": [[3 + i, 4, 5] for i in range(16)]})
    one = run(tmp_path / "one", train_dataset=even, data_collator=collator)[1]
    assert without_seconds(one) == without_seconds(run(tmp_path / "other", train_dataset=even)[1])
