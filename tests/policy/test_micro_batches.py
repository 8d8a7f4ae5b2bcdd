"""Micro-batches: rows of a rollout, trimmed, with masks and position ids. Padding changes no number."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.dense import row_logps
from tests.watched import before_the_first_step, watched
from trl_trustkl.policy.micro_batches import longest_first, micro_batch, micro_batches, predicting
from trl_trustkl.types import Rollout, indices

pytestmark = pytest.mark.filterwarnings("ignore")


def rollout() -> Rollout:
    """Four prompts of 1, 3, 2 and 2 tokens among 4 columns, with responses of 2, 1, 0 and 5 tokens among 6."""
    prompts, responses = (torch.tensor(lengths).unsqueeze(-1) for lengths in ([1, 3, 2, 2], [2, 1, 0, 5]))
    prompt_mask = torch.arange(4) >= 4 - prompts
    response_mask = torch.arange(6) < responses
    return Rollout(torch.arange(5, 21).view(4, 4), prompt_mask, torch.arange(12, 36).view(4, 6), response_mask)


def test_a_micro_batch_is_trimmed_to_its_longest_prompt_and_response():
    given = rollout()
    micro = micro_batch(given, torch.tensor([1, 0]))
    assert micro.rows.tolist() == [1, 0]
    assert micro.input_ids.tolist() == [[10, 11, 12, 18, 0], [0, 0, 8, 12, 13]]
    assert micro.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    assert torch.equal(micro.response_ids, given.response_ids[[1, 0], :2])
    assert micro.response_mask.tolist() == [[True, False], [True, True]]


def test_a_micro_batch_of_empty_responses_keeps_one_column():
    micro = micro_batch(rollout(), torch.tensor([2]))
    assert micro.response_ids.shape == (1, 1) and not micro.response_mask.any()
    assert micro.input_ids.tolist() == [[15, 16, 0]]


def test_columns_are_trimmed_up_to_the_first_that_some_row_needs():
    """Also where a prompt has a gap in its mask."""
    given = rollout()
    given.prompt_mask[1] = torch.tensor([False, False, False, True])
    given.prompt_mask[0] = torch.tensor([False, True, False, False])
    micro = micro_batch(given, torch.tensor([0, 1]))
    assert micro.attention_mask.tolist() == [[1, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
    given.prompt_mask[1, 0] = True
    assert micro_batch(given, torch.tensor([0, 1])).attention_mask.shape == (2, 6)


def test_the_longest_rows_come_first():
    assert longest_first(rollout()).tolist() == [3, 1, 0, 2]  # of 7, 4, 3 and 2 tokens
    assert [micro.rows.tolist() for micro in micro_batches(rollout(), 3)] == [[3, 1, 0], [2]]


def test_rows_in_a_given_order_make_micro_batches_with_the_indices_of_their_tokens():
    given, order = rollout(), torch.tensor([2, 0, 3, 1])
    for micro, rows in zip(micro_batches(given, 2, order), order.split(2), strict=True):
        alone = micro_batch(given, rows)
        assert torch.equal(micro.rows, rows) and torch.equal(micro.input_ids, alone.input_ids)
        assert micro.token_indices is not None and torch.equal(micro.token_indices, indices(micro.response_mask))


@pytest.mark.parametrize("before", [0, 3], ids=["the last positions", "all positions"])
def test_the_states_before_the_response_tokens_predict_them(before):
    micro = micro_batch(rollout(), torch.tensor([0, 1]))
    states = torch.randn(2, before + 3, 4, requires_grad=True)
    found, wanted = predicting(states, micro), states[:, before:-1][micro.response_mask]
    assert torch.equal(found, wanted)
    weights = torch.randn_like(found)
    mine, masked = (torch.autograd.grad((weights * each).sum(), states)[0] for each in (found, wanted))
    assert torch.equal(mine, masked)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_does_not_depend_on_its_padding(tmp_path, family):
    """Log-probabilities of the same responses to the same prompt, in a batch without and with a longer prompt."""
    dataset = Dataset.from_dict({"prompt": ["w3 w4"] * 8 + ["w3 w4", "w1 " * 30] * 4})
    trainer = watched(
        tmp_path,
        tiny.FAMILIES[family](),
        changes={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        train_dataset=dataset,
        script=[([9, 8, 7, 6, 5, 4], 6)],
    )
    alone, beside = (
        trainer.score(trainer.rollout(trainer.parts.collate([trainer.train_dataset[i] for i in rows])))
        for rows in (range(8), range(8, 16))
    )
    torch.testing.assert_close(alone.logp[::2], beside.logp[::2], rtol=0, atol=1e-4)
    assert not torch.allclose(alone.logp[1], beside.logp[1], atol=1e-2)


def test_a_padding_token_without_an_embedding_changes_no_number(tmp_path):
    """TRL's scripts add such a token and do not resize the model's embeddings."""
    tokenizer, runs = tiny.tokenizer(pad=False), []
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == tiny.VOCAB
    for name, each in (("new", tokenizer), ("own", tiny.tokenizer())):
        trainer = tiny.trainer(
            tmp_path / name, processing_class=each, changes={"max_steps": 1, "response_length": 12, "seed": 1}
        )
        batch = before_the_first_step(trainer)
        assert not batch.scored.rollout.response_mask.all(), "no response was padded"
        runs.append(batch)
    assert torch.equal(runs[0].scored.rollout.response_mask, runs[1].scored.rollout.response_mask)
    assert torch.equal(runs[0].scored.logp, runs[1].scored.logp)


def test_prompts_from_one_token_to_the_full_context_share_a_batch(tmp_path):
    lengths = [1, 122, 3, 60, 1, 2, 122, 1]  # 6 more tokens fill a context of 128
    dataset = Dataset.from_dict({"prompt": [" ".join(["w1"] * length) for length in lengths]})
    trainer = tiny.trainer(tmp_path, train_dataset=dataset, changes={"max_steps": 1})
    scored = before_the_first_step(trainer).scored
    for row in range(len(lengths)):
        rollout = scored.rollout
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        with torch.no_grad():
            p = row_logps(trainer.model.policy, prompt, response, 1.0)
        expected = p.gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(scored.logp[row][: len(response)], expected, rtol=0, atol=1e-4)
