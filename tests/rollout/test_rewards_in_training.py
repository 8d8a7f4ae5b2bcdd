"""Reward functions and reward models in a run: what they are given, and the scores they return."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing

from tests import tiny
from tests.watched import CUT, ENDED, run
from trl_trustkl.errors import RewardError
from trl_trustkl.rollout import rewards

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_columns_reach_the_reward_function_as_in_grpo(tmp_path, kind):
    seen = []

    def judge(prompts, completions, wanted, completion_ids, trainer_state):
        seen.append((prompts, completions, wanted, completion_ids, trainer_state.global_step))
        return [float(len(ids)) for ids in completion_ids]

    async def judge_later(prompts, completions, wanted, completion_ids, trainer_state):
        await asyncio.sleep(0)
        return judge(prompts, completions, wanted, completion_ids, trainer_state)

    trainer, records = run(tmp_path, reward_funcs=judge if kind == "plain" else judge_later)
    assert [step for *_, step in seen] == [0, 1, 2]
    for (prompts, completions, wanted, ids, _), rollout, record in zip(
        seen, trainer.seen["rollout"], records, strict=True
    ):
        assert prompts == [row["prompt"] for row in rollout.rows]
        assert wanted == [row["wanted"] for row in rollout.rows]
        assert ids == [r[m].tolist() for r, m in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        assert completions == tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
        assert record["score"] == record["length"]


def test_a_function_with_keywords_gets_every_column(tmp_path):
    names = set()

    def judge(prompts, completions, **columns):
        names.update(columns)
        return [0.0] * len(prompts)

    run(tmp_path, reward_funcs=judge, changes={"max_steps": 1})
    assert names == {"wanted", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def test_a_list_of_rewards_is_weighted_and_added_up(tmp_path):
    def one(prompts, completions):
        return [1.0] * len(prompts)

    async def index(prompts, completions):
        return [float(i) for i in range(len(prompts))]

    model = tiny.scalar_model(tiny.llama())
    changes = {"reward_weights": [10.0, 0.5, 2.0], "max_steps": 1}
    script = [ENDED, CUT]
    trainer, _ = run(tmp_path, changes=changes, reward_funcs=[one, index, model], script=script)
    plain, _ = run(tmp_path / "model", changes={"max_steps": 1}, reward_funcs=copy.deepcopy(model), script=script)
    expected = 10 + 0.5 * torch.arange(8.0) + 2 * plain.seen["score"][0].scores
    torch.testing.assert_close(trainer.seen["score"][0].scores, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_reward_model_reads_the_policys_tokens_up_to_the_last_one_that_counts(tmp_path, family):
    reward = tiny.scalar_model(tiny.FAMILIES[family]())
    script = [ENDED, CUT]
    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=copy.deepcopy(reward), script=script)
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    reward.eval()
    for i in range(8):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        with torch.no_grad():
            states = getattr(reward, reward.base_model_prefix)(input_ids=ids).last_hidden_state
            expected = reward.score(states[0, -1])
        assert float(scored.scores[i]) == pytest.approx(float(expected), abs=1e-4)


def test_a_reward_model_with_another_tokenizer_gets_the_text(tmp_path):
    """Its vocabulary is the policy's in another order, so that only re-encoding the text gives the right scores."""
    own = tiny.tokenizer()
    texts = []
    encode = type(own).__call__

    class Other(type(own)):
        def __call__(self, text, **kwargs):
            texts.append(text)
            out = encode(self, text, **kwargs)
            out["input_ids"] = torch.where(out["input_ids"] > 2, 45 - out["input_ids"], out["input_ids"])
            return out

    own.__class__ = Other
    reward = tiny.scalar_model(tiny.llama())
    script = [ENDED, CUT]
    trainer, _ = run(
        tmp_path, changes={"max_steps": 1}, reward_funcs=copy.deepcopy(reward),
        reward_processing_classes=own, script=script,
    )  # fmt: skip
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    expected_texts = [row["prompt"] + c for row, c in zip(rollout.rows, scored.completions, strict=True)]
    assert [text for batch in texts for text in batch] == expected_texts
    reward.eval()
    for text, score in zip(expected_texts, scored.scores.tolist(), strict=True):
        ids = torch.tensor([[45 - i if i > 2 else i for i in tiny.tokenizer()(text)["input_ids"]]])
        with torch.no_grad():
            assert score == pytest.approx(float(reward(input_ids=ids).logits), abs=1e-4)


def test_a_reward_model_of_a_chat_gets_the_full_conversation(tmp_path):
    tokenizer, calls = tiny.tokenizer(), []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **k: (calls.append(messages), apply(messages, **k))[1]
    run(
        tmp_path, changes={"max_steps": 1}, reward_funcs=tiny.scalar_model(tiny.llama()),
        reward_processing_classes=tokenizer, train_dataset=tiny.prompts(chat=True),
    )  # fmt: skip
    assert len(calls) == 8 and all([m["role"] for m in messages] == ["user", "assistant"] for messages in calls)


def test_only_the_chat_template_adds_special_tokens_to_a_conversation():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    reward = rewards.RewardModel(tiny.scalar_model(tiny.llama()), tokenizer)
    prompt, completion = ([{"role": role, "content": "w1 w2"}] for role in ("user", "assistant"))
    for messages, ids in (
        (
            (prompt, completion),
            tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False))["input_ids"][1:],
        ),
        (("w1 ", "w2"), tokenizer("w1 w2")["input_ids"]),
    ):
        assert ids.count(1) == (2 if len(ids) > 3 else 1)
        expected = reward.model(input_ids=torch.tensor([ids])).logits[:, 0]
        torch.testing.assert_close(reward.score_text(*([each] for each in messages)), expected)


def test_a_reward_model_with_an_adapter_reads_the_policys_tokens(tmp_path):
    classifier = get_peft_model(tiny.scalar_model(tiny.llama()), tiny.lora(task_type="SEQ_CLS"))
    trainer, _ = run(tmp_path, changes={"max_steps": 1}, reward_funcs=classifier)
    rollout, scored = trainer.seen["rollout"][0], trainer.seen["score"][0]
    for i, score in enumerate(scored.scores.tolist()):
        ids = torch.cat(
            [rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.response_ids[i][rollout.response_mask[i]]]
        )
        if ids[-1] == tiny.PAD:  # transformers reads the score at the last token that is not padding
            continue
        with torch.no_grad():
            assert score == pytest.approx(float(classifier(input_ids=ids[None]).logits), abs=1e-4)


def test_a_sampled_token_that_the_reward_model_does_not_know_is_named(tmp_path):
    """The policy's vocabulary is padded beyond the tokenizer's, as is common, and the reward model's is not."""
    policy = tiny.llama(vocab_size=tiny.VOCAB + 200)
    trainer = tiny.trainer(tmp_path, policy, reward_funcs=tiny.scalar_model(tiny.llama()), changes={"max_steps": 1})
    with pytest.raises(RewardError, match=f"0 to {tiny.VOCAB - 1}") as error:
        trainer.train()
    assert "reward_processing_classes" in str(error.value)
