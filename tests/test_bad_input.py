"""What a run says of input that cannot work: which field, the value received, what is valid, and what to do.

Messages are read, not only their type: each case lists the pieces that have to be there.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

from tests import tiny
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.controllers import CONTROLLERS
from trl_trustkl.divergences import ESTIMATORS
from trl_trustkl.errors import ConfigError, DataError, ModelError, RefusedError, RewardError, out_of_range
from trl_trustkl.surrogates import SURROGATES
from trl_trustkl.types import Prompts, Rollout, Scored

pytestmark = pytest.mark.filterwarnings("ignore")
PAD, BOS, EOS = 0, 1, 2
NAN, INF = math.nan, math.inf


def assert_says(error: Any, *pieces: Any) -> None:
    message = str(error.value)
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is missing in: {message}"


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, in the same order of names."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "options", "nearest"),
    [
        ("kl_estimator", "forward", (*ESTIMATORS, "exact"), "forward_kl"),
        ("kl_estimator", "exat", (*ESTIMATORS, "exact"), "exact"),
        ("kl_controller", "adaptve", CONTROLLERS, "adaptive"),
        ("trust_controller", "adaptve", CONTROLLERS, "adaptive"),
        ("clip_rule", "roll-back", SURROGATES, "rollback"),
        ("kl_placement", "reword", ("reward", "loss", "both"), "reward"),
        ("trust_estimator", "exct", ("exact", "k1", "k3"), "exact"),
        ("stop_token", "EOS_", ("eos", "none"), None),
        ("stop_token", "eso", ("eos", "none"), "eos"),
        ("score_position", "after-eos", ("after_eos", "eos"), "after_eos"),
    ],
)
def test_an_unknown_name_is_answered_with_those_that_exist_and_the_nearest(tmp_path, field, value, options, nearest):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", repr(value), *map(repr, options))
    assert ("Did you mean" in str(error.value)) == (nearest is not None)
    if nearest is not None:
        assert_says(error, f"Did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"kl_estimator_kwargs": {"order": 0.5}}, ("`kl_estimator_kwargs`", "'order'", "'k1'", "leave it empty")),
        ({"clip_kwargs": {"delta": 1}}, ("`clip_kwargs`", "'delta'", "'ppo'", "leave it empty")),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"clap": 1}},
            ("`kl_controller_kwargs`", "'clap'", "'clip'", "'horizon'", "Did you mean 'clip'?"),
        ),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": '{"clip": -1}'},
            ("`kl_controller_kwargs['clip']`", "-1", "above 0"),
        ),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"horizon": 8, "clip": 1.0}},
            ("`kl_controller_kwargs['horizon']` got 8", "above 8", "1 × 8"),
        ),
    ],
)
def test_an_unknown_argument_of_a_mechanism_is_named(tmp_path, settings, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, *pieces)


# -- numbers -----------------------------------------------------------------------------------------------------------

ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 1.0}


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        (ADAPTIVE | {"kl_target": 0.0}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_target": -1.0}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_target": NAN}, ("positive", "nats per response")),
        (ADAPTIVE | {"kl_horizon": 0}, ("positive number of episodes",)),
        (ADAPTIVE | {"kl_horizon": -5}, ("positive number of episodes",)),
        (ADAPTIVE | {"kl_horizon": 1}, ("`kl_horizon` got 1", "above 1.6", "0.2 × 8")),
        ({"cliprange": 0.0}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange": 1.0}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange": NAN}, ("(0, 1)", "clip_rule='none'")),
        ({"cliprange_high": 0.0}, ("> 0", "the same as cliprange")),
        ({"cliprange_value": 0.0}, ("> 0", "clip_value=False")),
        ({"kl_coef": -0.1}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": INF}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": "a lot"}, (">= 0", "0 turns the anchor off")),
        ({"kl_coef": True}, (">= 0", "0 turns the anchor off")),
        ({"trust_coef": -1.0}, (">= 0", "0 turns the penalty off")),
        ({"vf_coef": -1.0}, (">= 0",)),
        ({"gamma": 1.1}, ("[0, 1]",)),
        ({"lam": -0.1}, ("[0, 1]",)),
        ({"temperature": 0.0}, ("> 0", "temperature=0.01")),
        ({"learning_rate": -1.0}, (">= 0",)),
        ({"learning_rate": "1e-5"}, (">= 0", "without quotes", "1.0e-5")),
        ({"max_grad_norm": "1.0"}, (">= 0", "without quotes")),
        ({"value_learning_rate": -1.0}, (">= 0",)),
        ({"measure_fraction": 0.0}, ("(0, 1]", "no way to turn the measurement off")),
        ({"measure_fraction": 1.5}, ("(0, 1]",)),
        ({"trust_stop": 0.0}, ("nats per token", "None turns it off")),
        ({"trust_max_kl": -1.0}, ("nats per token", "None turns it off")),
        ({"trust_lr_target": 0.0}, ("nats per token", "None turns it off")),
        ({"trust_target": -1.0}, ("nats per token", "None turns it off")),
        ({"missing_eos_penalty": -1.0}, (">= 0",)),
        ({"max_grad_norm": -1.0}, (">= 0", "turns it off")),
        ({"num_train_epochs": 0}, ("positive",)),
        ({"total_episodes": 0}, ("positive",)),
        ({"reward_weights": [1.0, NAN]}, ("list of finite numbers", "one for each reward function")),
        ({"reward_weights": 1.0}, ("list of finite numbers", "one for each reward function")),
    ],
    ids=lambda each: ",".join(f"{k}={v}" for k, v in each.items()) if isinstance(each, dict) else "",
)
def test_a_number_out_of_range_is_answered_with_the_range(tmp_path, settings, pieces):
    *_, (field, value) = settings.items()
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, f"`{field}`", f"got {value!r}", *pieces)


@pytest.mark.parametrize("value", [0, -1, 1.5])
@pytest.mark.parametrize(
    "field",
    [
        "num_ppo_epochs",
        "num_mini_batches",
        "response_length",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "local_rollout_forward_batch_size",
    ],
)
def test_batch_arithmetic_is_in_whole_numbers_from_1(tmp_path, field, value):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", f"got {value!r}", "integer >= 1")


@pytest.mark.parametrize("number", [3, 5, 16])
def test_mini_batches_that_do_not_divide_the_batch_are_answered_with_the_arithmetic(tmp_path, number):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, num_mini_batches=number)
    assert_says(error, "`num_mini_batches`", f"got {number}", "must divide", "4 × 2 = 8")
    assert_says(error, "per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.mark.parametrize("prefix", ["kl", "trust"])
@pytest.mark.parametrize("controller", ["adaptive", "threshold", "pid", "dual"])
def test_a_controller_that_multiplies_refuses_a_coefficient_of_0(tmp_path, prefix, controller):
    settings = {"controller": controller, "target": 1.0, "coef": 0.0}
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{f"{prefix}_{name}": value for name, value in settings.items()})
    assert_says(error, f"`{prefix}_coef`", "0.0", "above 0", "multiplies", "'fixed'")


# -- combinations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"kl_target": 3.0}, ("`kl_target`", "3.0", "kl_controller='fixed'", "'adaptive'", "None")),
        ({"kl_controller": "adaptive"}, ("`kl_target`", "None", "'adaptive'", "'fixed'")),
        (
            {"measure_fraction": 0.5, "trust_max_kl": 0.1},
            ("`measure_fraction`", "0.5", "must be 1", "trust_max_kl=0.1", "subset"),
        ),
        (
            {"trust_controller": "adaptive", "trust_coef": 0.1},
            ("`trust_target`", "None", "trust_controller='adaptive'", "'fixed'"),
        ),
        ({"trust_target": 0.1}, ("`trust_target`", "0.1", "trust_controller='fixed'", "'adaptive'", "None")),
        (
            {"kl_controller": "adaptive", "kl_target": 1.0, "kl_controller_kwargs": {"target": 2.0}},
            ("`kl_controller_kwargs`", "'target'", "set `kl_target` instead"),
        ),
        (
            {"kl_controller": "schedule", "kl_controller_kwargs": {"episodes": 10}},
            ("`kl_controller_kwargs`", "end_coef", "'schedule'"),
        ),
        ({"kl_offpolicy": True}, ("`kl_offpolicy`", "True", "kl_placement='reward'", "'loss' or 'both'")),
        ({"kl_placement": "loss"}, ("`kl_placement`", "'loss'", "kl_estimator='k1'", "zero", "'exact' or 'k3'")),
        ({"cliprange_high": 0.3, "clip_rule": "none"}, ("`cliprange_high`", "0.3", "clip_rule='none'", "None")),
        ({"cliprange_high": 0.3, "clip_rule": "sapo"}, ("`cliprange_high`", "0.3", "clip_rule='sapo'", "None")),
        ({"stop_token": "eos", "stop_token_id": 2}, ("`stop_token`", "'eos'", "`stop_token_id`", "2", "only one")),
    ],
)
def test_options_that_contradict_each_other_are_both_named(tmp_path, settings, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **settings)
    assert_says(error, *pieces)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("max_new_tokens", "set response_length"),
        ("max_length", "set response_length"),
        ("temperature", "set temperature"),
        ("eos_token_id", "set stop_token_id"),
        ("pad_token_id", "tokenizer's pad token"),
        ("do_sample", "leave it out"),
        ("num_beams", "leave it out"),
        ("num_return_sequences", "leave it out"),
        ("use_cache", "leave it out"),
    ],
)
def test_generation_kwargs_that_the_trainer_owns_are_refused(tmp_path, key, fix, as_json):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, generation_kwargs=f'{{"{key}": 1}}' if as_json else {key: 1})
    assert_says(error, "`generation_kwargs`", repr(key), fix)


@pytest.mark.parametrize(
    "field",
    [
        "kl_estimator_kwargs",
        "kl_controller_kwargs",
        "clip_kwargs",
        "trust_controller_kwargs",
        "generation_kwargs",
        "model_init_kwargs",
    ],
)
@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("order=0.5", ("not JSON", "write an object such as")),
        ("{'order': 0.5}", ("not JSON", "double quotes", '{"order": 0.5}')),
        ("[1]", ("a dict, or a JSON object",)),
        (3, ("a dict, or a JSON object",)),
    ],
)
def test_arguments_that_are_neither_a_dict_nor_json_are_refused(tmp_path, field, value, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{field: value})
    assert_says(error, f"`{field}`", value, *pieces)


# -- datasets, prompts, tokenizers -------------------------------------------------------------------------------------


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def long_prompt(words: int) -> str:
    return " ".join(["w1"] * words)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("dataset", "pieces"),
    [
        (Dataset.from_dict({"prompt": []}), ("is empty", "at least one row")),
        (Dataset.from_dict({"text": ["w1"] * 8}), ("['text']", "'prompt'", "'input_ids'")),
        ([{"prompt": "w1"}] * 8, ("got list", "datasets.Dataset")),
        (Dataset.from_dict({"prompt": ["w1"] * 8}).to_iterable_dataset(), ("IterableDataset", "no length")),
        (Dataset.from_dict({"prompt": ["w1"] * 7 + [""]}), ("row 7", "no tokens", "''", "bos token")),
        (Dataset.from_dict({"prompt": [1] * 8}), ("row 0", "1", "text or a list of")),
        (Dataset.from_dict({"prompt": ["w1", None] * 4}), ("row 1", "None", "text or a list of")),
        (Dataset.from_dict({"prompt": [[]] * 8}), ("row 0", "[]", "text or a list of")),
        (Dataset.from_dict({"input_ids": [[3]] * 6 + [[]] * 2}), ("row 6", "no token", "at least one")),
        (
            Dataset.from_dict({"prompt": ["w1"] * 3 + [long_prompt(123)] * 5}),
            ("row 3", "123 prompt tokens", "response_length=6", "context of `model`, 128", "shorten or drop", "lower"),
        ),
        (Dataset.from_dict({"input_ids": [[3] * 123] * 8}), ("row 0", "123 prompt tokens", "context of `model`, 128")),
    ],
    ids=[
        "empty", "no usable column", "list", "streaming", "empty prompt", "number", "None", "no message", "no ids",
        "text too long", "ids too long",
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_used_is_named_with_the_row(tmp_path, which, dataset, pieces):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, **{which: dataset})
    assert_says(error, f"`{which}`", *pieces)


def test_the_longest_prompt_that_fits_the_context_is_accepted(tmp_path):
    trainer = tiny.trainer(
        tmp_path, train_dataset=Dataset.from_dict({"prompt": [long_prompt(122)] * 8}), changes={"max_steps": 1}
    )
    trainer.train()
    assert load_records(tmp_path)[0]["length"] > 0


def short_gpt2(kind: Any) -> Any:
    """A model of 8 learned positions; one more is an index error in its embedding."""
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCAB, n_positions=8, n_embd=32, n_layer=1, n_head=2, pad_token_id=0
    )
    config.num_labels = 1
    return kind(config)


@pytest.mark.parametrize("which", ["ref_model", "value_model", "reward_funcs[0]"])
def test_a_prompt_has_to_fit_every_model_that_reads_its_tokens(tmp_path, which):
    kind = transformers.GPT2LMHeadModel if which == "ref_model" else transformers.GPT2ForSequenceClassification
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, **{which.removesuffix("[0]"): short_gpt2(kind)})
    assert_says(error, "`train_dataset` row 2", "3 prompt tokens", "response_length=6", f"the context of `{which}`, 8")


def test_a_text_too_long_for_a_reward_model_with_a_tokenizer_of_its_own_is_named(tmp_path):
    judge = short_gpt2(transformers.GPT2ForSequenceClassification)
    trainer = tiny.trainer(tmp_path, reward_funcs=judge, reward_processing_classes=tiny.tokenizer())
    with pytest.raises(RewardError) as error:
        trainer.train()
    assert_says(error, "`GPT2ForSequenceClassification`", "more than its context of 8", "lower response_length")


@pytest.mark.parametrize("rows", [1, 7])
def test_a_dataset_shorter_than_a_batch_is_an_error_and_no_endless_loop(tmp_path, rows):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, train_dataset=tiny.prompts(rows))
    assert_says(error, "`train_dataset`", f"{rows} rows", "one batch of 8", "add prompts or shrink the batch")


def test_chat_prompts_without_a_chat_template_are_an_error(tmp_path):
    with pytest.raises(DataError) as error:
        tiny.trainer(tmp_path, processing_class=tiny.tokenizer(chat=False), train_dataset=tiny.prompts(chat=True))
    assert_says(error, "`train_dataset` row 0", "chat template", "give prompts as text")


def test_no_evaluation_set_is_an_error_of_evaluate(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path).evaluate()
    assert_says(error, "`eval_dataset`", "None", "give one")


def test_one_of_several_evaluation_sets_goes_by_its_name(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_dataset={"few": tiny.prompts(2), "more": tiny.prompts(5)})
    few = trainer.evaluate("few")
    assert few["eval_score"] == trainer.evaluate()["eval_few_score"]
    assert len(trainer.evaluate_completions("more")) == 5
    with pytest.raises(ConfigError) as error:
        trainer.evaluate("fewer")
    assert_says(error, "`eval_dataset`", "'fewer'", "'few', 'more'")
    with pytest.raises(ConfigError) as error:
        trainer.evaluate_completions()
    assert_says(error, "`eval_dataset`", "'few', 'more'")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collator_may_pad_on_either_side(tmp_path, side):
    """Most tokenizers pad on the right, and so does transformers' collator with them."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    tiny.trainer(tmp_path / "with", data_collator=transformers.DataCollatorWithPadding(tokenizer)).train()
    tiny.trainer(tmp_path / "without").train()
    one, other = ([without_seconds(r) for r in load_records(tmp_path / name)] for name in ("with", "without"))
    assert one == other


class Scripted(TrustKLPPOTrainer):
    """Responses from a list of token ids and lengths instead of sampling; `scored` keeps the last score phase's result."""

    script: list[tuple[list[int], int]]
    scored: Scored

    def rollout(self, prompts: Prompts) -> Rollout:
        count, length = len(prompts.ids), self.args.response_length
        rows = [self.script[i % len(self.script)] for i in range(count)]
        ids = torch.tensor([(tokens + [PAD] * length)[:length] for tokens, _ in rows])
        mask = torch.arange(length) < torch.tensor([n for _, n in rows]).unsqueeze(-1)
        return Rollout(prompts.ids, prompts.mask, ids, mask, None, prompts.rows)

    def score(self, rollout: Rollout) -> Scored:
        self.scored = super().score(rollout)
        return self.scored


def scripted(folder: Any, script: list[tuple[list[int], int]], **arguments: Any) -> Scripted:
    changes = {"max_steps": 1} | arguments.pop("changes", {})
    settings = {
        "model": tiny.llama(),
        "processing_class": tiny.tokenizer(),
        "reward_funcs": tiny.good_words,
        "train_dataset": tiny.prompts(),
        "peft_config": tiny.lora(),
    }
    trainer = Scripted(args=tiny.config(folder, **changes), **settings | arguments)
    trainer.script = script
    return trainer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_without_a_pad_token_gets_its_eos_and_the_masks_stay_right(tmp_path, family):
    tokenizer = tiny.tokenizer(pad=False)
    script = [([5, 7, EOS], 3), ([5, EOS], 2), ([9, 8, 7, 6, 5, 4], 6)]
    trainer = scripted(tmp_path, script, processing_class=tokenizer, model=tiny.FAMILIES[family]())
    trainer.train()
    scored = trainer.scored
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    # The end of a response is one of its tokens, though it is the padding as well; what follows it is not.
    assert scored.loss_mask.sum(1).tolist() == [script[i % 3][1] for i in range(8)]
    assert (scored.logp[scored.loss_mask] < 0).all() and (scored.logp[~scored.loss_mask] == 0).all()
    record = load_records(tmp_path)[0]
    assert record["eos_rate"] == 6 / 8
    assert record["length"] == scored.loss_mask.sum() / 8


def test_sampling_without_a_pad_token_equals_sampling_with_one(tmp_path):
    def even_ids(prompts, completions, completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    for name, pad in (("with", True), ("without", False)):
        tiny.trainer(tmp_path / name, processing_class=tiny.tokenizer(pad=pad), reward_funcs=even_ids).train()
    one, other = ([without_seconds(r) for r in load_records(tmp_path / name)] for name in ("with", "without"))
    assert one == other


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_tokenizer_with_neither_pad_nor_eos_token_is_an_error(tmp_path):
    tokenizer = tiny.tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError) as error:
        tiny.trainer(tmp_path, processing_class=tokenizer)
    assert_says(error, "`processing_class`", "neither a pad token nor an eos token", "add_special_tokens")


# -- responses ---------------------------------------------------------------------------------------------------------

EMPTY = ([], 0)
WORDS = ([5, 7, 9, 11], 4)
ALL_PAD = ([PAD] * 6, 6)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "script",
    [[EMPTY, WORDS], [EMPTY], [ALL_PAD], [ALL_PAD, EMPTY, WORDS], [([EOS], 1), ([PAD], 1), WORDS]],
    ids=["some empty", "all empty", "all PAD", "mixed", "one token"],
)
def test_empty_and_all_pad_responses_leave_a_run_finite(tmp_path, script, peft):
    trainer = scripted(
        tmp_path,
        script,
        reward_funcs=lambda prompts, completions: [float(i) for i in range(len(prompts))],
        peft_config=tiny.lora() if peft else None,
        changes={"max_steps": 2},
    )
    before = weights(trainer.model)
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    for record in load_records(tmp_path):
        assert record["refused"] is None
        assert all(math.isfinite(record["trust"][key]) for key in ("kl", "kl_max", "max_ratio"))
        assert record["length"] == sum(script[i % len(script)][1] for i in range(8)) / 8
    # An empty response has no token to be rewarded for: nothing moves when there is no other.
    assert same(before, weights(trainer.model)) == (script == [EMPTY])
    assert trainer.scored.scores.isnan().tolist() == [script[i % len(script)] == EMPTY for i in range(8)]


@pytest.mark.parametrize("token", [PAD, EOS], ids=["PAD", "EOS"])
def test_a_model_that_only_says_pad_or_eos_trains_on(tmp_path, token):
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits, and the bias below decides
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + 1e3 * torch.eye(tiny.VOCAB)[token])
    trainer = tiny.trainer(tmp_path, model, changes={"max_steps": 2}, peft_config=tiny.lora(target_modules=["q_proj"]))
    trainer.train()
    for record in load_records(tmp_path):
        assert record["refused"] is None
        assert record["length"] == (6 if token == PAD else 1)  # a sampled PAD is a token like any other
        assert record["eos_rate"] == (0 if token == PAD else 1)
        assert record["entropy"] == 0 and record["trust"]["max_ratio"] == 1


# -- reward functions --------------------------------------------------------------------------------------------------


def raises(prompts, completions, **_):
    raise KeyError("no such judge")


async def raises_later(prompts, completions, **_):
    raise KeyError("no such judge")


def rewards(*some: Any):
    """A reward function that gives these to the first completions, and 1.0 to the others."""

    def given(prompts, completions, **_):
        return [*some, *[1.0] * (len(completions) - len(some))]

    return given


def returns(value: Any):
    def given(prompts, completions, **_):
        return value

    return given


@pytest.mark.parametrize(
    ("function", "pieces"),
    [
        (raises, ("`raises`", "raised KeyError", "no such judge")),
        (raises_later, ("`raises_later`", "raised KeyError", "no such judge")),
        (returns([1.0] * 7), ("`given`", "7 rewards", "8 completions")),
        (returns([]), ("`given`", "0 rewards", "8 completions")),
        (returns(1.0), ("`given`", "float", "a list of 8")),
        (returns(None), ("`given`", "NoneType", "a list of 8")),
        (rewards(1.0, "good"), ("`given`", "'good'", "completion 1", "not a number")),
        (rewards(1.0, 0.5, NAN), ("`given`", "nan", "completion 2", "finite", "None to leave the completion out")),
        (rewards(INF), ("`given`", "inf", "completion 0", "finite", "None to leave the completion out")),
        (rewards(1.0, -INF), ("`given`", "-inf", "completion 1", "finite")),
        (rewards(1e39), ("`given`", "1e+39", "completion 0", "finite")),
        (returns(torch.tensor([1.0] * 7 + [NAN])), ("`given`", "nan", "completion 7", "finite")),
    ],
)
def test_a_reward_function_that_fails_is_named_with_what_it_did(tmp_path, function, pieces):
    # One that is not finite refuses the update that it belongs to; the others end the run at once.
    trainer = tiny.trainer(tmp_path, reward_funcs=function, changes={"max_refused": 1})
    with pytest.raises(RefusedError if "finite" in pieces else RewardError) as error:
        trainer.train()
    assert_says(error, "reward function", *pieces)


@pytest.mark.parametrize("function", [raises, raises_later])
def test_the_error_of_a_reward_function_stays_attached(tmp_path, function):
    with pytest.raises(RewardError) as error:
        tiny.trainer(tmp_path, reward_funcs=function).train()
    assert isinstance(error.value.__cause__, KeyError)


def none_for_even_rows(prompts, completions, **_):
    return [None if i % 2 == 0 else float(i) for i in range(len(completions))]


async def gives_up(prompts, completions, **_):
    raise asyncio.CancelledError


def test_an_async_reward_function_that_gives_up_has_failed(tmp_path):
    with pytest.raises(RewardError, match="`gives_up` raised CancelledError"):
        tiny.trainer(tmp_path, reward_funcs=gives_up).train()


@pytest.mark.parametrize("chat", [True, False])
def test_what_a_reward_function_does_to_its_arguments_reaches_nothing_else(tmp_path, chat):
    seen = []

    def vandal(prompts, completions, completion_ids, wanted, trainer_state, **_):
        trainer_state.global_step = 99
        torch.set_grad_enabled(False)
        for messages in (*prompts, *completions) if chat else ():
            messages[0]["content"] = "broken"
        for given in (prompts, completions, completion_ids[0], completion_ids, wanted):
            given.clear()
        return [0.0] * 8

    def watch(prompts, completions, completion_ids, wanted, **_):
        seen.append(str((prompts, completions, completion_ids, wanted)))
        return tiny.good_words(prompts, completions)

    for name, functions in (("alone", [watch]), ("after", [vandal, watch])):
        tiny.trainer(tmp_path / name, reward_funcs=functions, train_dataset=tiny.prompts(chat=chat)).train()
    assert len(seen) == 6 and seen[:3] == seen[3:]
    one, other = ((tmp_path / name / "completions.jsonl").read_text() for name in ("alone", "after"))
    assert one == other and "broken" not in one


@pytest.mark.parametrize("position", ["after_eos", "eos"])
def test_a_row_without_a_reward_gets_no_gradient_and_leaves_the_others_theirs(tmp_path, position):
    script = [([5, 7, EOS], 3), WORDS]
    changes = {"score_position": position, "vf_coef": 1.0}
    trainer = scripted(tmp_path, script, reward_funcs=none_for_even_rows, changes=changes)
    captured = {}
    advantages = trainer.advantages
    trainer.advantages = lambda scored: captured.setdefault("batch", advantages(scored))
    trainer.train()
    batch, scored = captured["batch"], trainer.scored
    without = torch.tensor([True, False] * 4)
    assert scored.scores.isnan().tolist() == without.tolist()
    assert not scored.loss_mask[without].any() and not scored.value_mask[without].any()
    assert scored.loss_mask[~without].sum(1).tolist() == [4] * 4
    assert (batch.advantages[without] == 0).all() and (
        batch.advantages[~without][scored.loss_mask[~without]] != 0
    ).any()
    assert not batch.advantages.isnan().any() and not batch.returns.isnan().any()
    assert load_records(tmp_path)[0]["score"] == 4.0  # the mean of 1, 3, 5 and 7


def test_the_gradient_does_not_depend_on_a_row_without_a_reward(tmp_path):
    """Other tokens in the rows without a reward, the same weights after the update."""
    outcomes = []
    for name, tokens in (("one", [5, 7, 9, 11]), ("other", [30, 31, 32, 33])):
        changes = {"num_mini_batches": 1, "num_ppo_epochs": 1, "learning_rate": 0.01}
        trainer = scripted(tmp_path / name, [(tokens, 4), WORDS], reward_funcs=none_for_even_rows, changes=changes)
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        assert not same(before, after)
        outcomes.append(after)
    for name, weight in outcomes[0].items():
        torch.testing.assert_close(weight, outcomes[1][name], rtol=0, atol=1e-6)


def test_an_update_without_any_reward_moves_nothing_and_the_run_goes_on(tmp_path):
    def none_at_first(prompts, completions, trainer_state, **_):
        return [None if trainer_state.global_step == 0 else float(i) for i in range(len(completions))]

    changes = {"learning_rate": 0.01}
    trainer = tiny.trainer(tmp_path, reward_funcs=none_at_first, changes=changes, callbacks=[watch := Watch()])
    trainer.train()
    first, second, _ = load_records(tmp_path)
    assert first["score"] is None and first["refused"] is None and first["gradient"]["norm"] == 0
    assert same(watch.snapshots[0], watch.snapshots[1])
    assert second["score"] == 3.5 and not same(watch.snapshots[1], watch.snapshots[2])


def test_a_row_with_one_reward_of_two_keeps_that_one(tmp_path):
    functions = [none_for_even_rows, returns([1.0] * 7 + [None])]
    trainer = scripted(tmp_path, [WORDS], reward_funcs=functions, changes={"reward_weights": [2.0, 1.0]})
    trainer.train()
    assert trainer.scored.scores.tolist() == [1.0, 3.0, 1.0, 7.0, 1.0, 11.0, 1.0, 14.0]


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (
            {"reward_funcs": [tiny.good_words] * 2, "changes": {"reward_weights": [1.0]}},
            ("`reward_weights`", "1", "2 reward functions", "one for each"),
        ),
        (
            {"reward_funcs": tiny.good_words, "changes": {"reward_weights": [1.0, 1.0]}},
            ("`reward_weights`", "2", "1 reward functions", "one for each"),
        ),
        (
            {"reward_funcs": [tiny.good_words] * 3, "reward_processing_classes": [None] * 2},
            ("`reward_processing_classes`", "2", "3 reward functions", "None for a callable"),
        ),
        ({"reward_funcs": None}, ("`reward_funcs`", "nothing", "a function, a reward model, or a list")),
        ({"reward_funcs": []}, ("`reward_funcs`", "nothing", "a function, a reward model, or a list")),
        ({"reward_funcs": 3}, ("`reward_funcs`", "3", "a callable, a reward model or the name of one")),
    ],
)
def test_rewards_that_do_not_match_their_settings_are_refused(tmp_path, arguments, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, **arguments)
    assert_says(error, *pieces)


def test_a_reward_model_beside_reward_functions_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_model=tiny.scalar_model(tiny.llama()))
    assert_says(error, "`reward_model`", "`reward_funcs`", "both", "put the model into `reward_funcs`")


def test_a_reward_model_with_a_smaller_vocabulary_asks_for_its_tokenizer(tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_funcs=tiny.scalar_model(tiny.llama(vocab_size=20)))
    assert_says(error, "`reward_processing_classes`", "20 embeddings", tiny.VOCAB, "own tokenizer")


@pytest.mark.parametrize("own_tokenizer", [True, False])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_a_reward_model_of_several_labels_is_refused_whichever_might_be_meant(tmp_path, kind, own_tokenizer):
    """The first of a sentiment classifier's labels is the negative one."""
    config = copy.deepcopy(tiny.llama().config)
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config) if kind == "classifier" else tiny.llama()
    tokenizers = tiny.tokenizer() if own_tokenizer else None
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, reward_funcs=model, reward_processing_classes=tokenizers)
    assert_says(error, "`reward_funcs`", type(model).__name__, "2 labels", "num_labels=1", "a function")


# -- models ------------------------------------------------------------------------------------------------------------


def adapted() -> Any:
    from peft import get_peft_model

    return get_peft_model(tiny.llama(), tiny.lora())


def encoder_decoder() -> Any:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=tiny.VOCAB, **sizes))


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"model": lambda: torch.nn.Linear(2, 2)}, ("`model`", "Linear", "causal language model")),
        ({"model": encoder_decoder}, ("`model`", "T5ForConditionalGeneration", "causal language model")),
        (
            {"model": lambda: tiny.scalar_model(tiny.llama())},
            ("`model`", "SequenceClassification", "AutoModelForCausalLM"),
        ),
        ({"processing_class": None}, ("`processing_class`", "None", "only when `model` is a name")),
        ({"processing_class": 3}, ("`processing_class`", "int", "must be a tokenizer")),
        ({"peft_config": {"r": 4}}, ("`peft_config`", "dict", "LoraConfig")),
        ({"model": adapted}, ("`peft_config`", "already has an adapter", "merge_and_unload")),
        ({"ref_model": lambda: tiny.llama(vocab_size=50)}, ("`ref_model`", "50", tiny.VOCAB, "same vocabulary")),
        ({"value_model": tiny.llama}, ("`value_model`", "LlamaForCausalLM", "num_labels=1", "None for a value head")),
        (
            {"value_model": lambda: tiny.scalar_model(tiny.llama(vocab_size=20))},
            ("`value_model`", "20 embeddings", f"{tiny.VOCAB} tokens", f"resize_token_embeddings({tiny.VOCAB})"),
        ),
        ({"ref_model": 3}, ("`ref_model`", "int", "causal language model", "None")),
        (
            {"ref_model": lambda: tiny.scalar_model(tiny.llama())},
            ("`ref_model`", "SequenceClassification", "causal language model"),
        ),
        ({"value_model": 3}, ("`value_model`", "int", "sequence classifier", "None for a value head")),
        ({"changes": {"ref_adapter_name": "sft"}}, ("`ref_adapter_name`", "'sft'", "['default']")),
        ({"changes": {"model_init_kwargs": {"dtype": "auto"}}}, ("`model_init_kwargs`", "given by name")),
        ({"train_dataset": None}, ("`train_dataset`", "None", "required")),
    ],
)
def test_models_that_do_not_fit_are_named(tmp_path, arguments, pieces):
    arguments = {key: value() if callable(value) else value for key, value in arguments.items()}
    with pytest.raises((ConfigError, ModelError)) as error:
        tiny.trainer(tmp_path, **arguments)
    assert_says(error, *pieces)


def test_the_model_as_its_own_reference_is_refused(tmp_path):
    model = tiny.llama()
    with pytest.raises(ModelError) as error:
        tiny.trainer(tmp_path, model, ref_model=model)
    assert_says(error, "`ref_model`", "the model itself", "a copy, or None")


# -- an optimizer of one's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "pieces"),
    [
        (
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            ("28 of the 28", "`peft_config`", "get_peft_model"),
        ),
        (lambda model: torch.optim.SGD, ("torch.optim", "in the first place")),
    ],
    ids=["made before the adapter", "a class"],
)
def test_an_optimizer_that_would_train_nothing_is_refused(tmp_path, optimizer, pieces):
    model = tiny.llama()
    with pytest.raises(ConfigError) as error:
        tiny.trainer(tmp_path, model, optimizers=(optimizer(model), None))
    assert_says(error, "`optimizers`", *pieces)


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_an_optimizer_of_ones_own_trains_the_value_too(tmp_path, peft, scheduled):
    model = adapted() if peft else tiny.llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) if scheduled else None
    changes = {} if scheduled else {"value_learning_rate": 0.01}
    trainer = tiny.trainer(tmp_path, model, optimizers=(optimizer, scheduler), peft_config=None, changes=changes)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert {name for name in before if torch.equal(before[name], after[name])} == set()
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = 1e-3 if scheduled else 0.01
    assert {rates[id(p)] for p in trainer.model.value.parameters()} == {expected}


# -- losses and KL that are not finite ---------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """The trained weights before each update and after the last; `poison(step, model)` before each."""

    def __init__(self, poison: Any = None) -> None:
        self.poison = poison
        self.snapshots: list[dict[str, Tensor]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.snapshots.append(weights(model))
        if self.poison is not None:
            self.poison(state.global_step, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.snapshots.append(weights(model))


BAD_UPDATE = 2
"""Counted from 1, as in the records."""


def nan_gradient(monkeypatch, trainer):
    """A gradient that is NaN in the second of the bad update's four steps."""
    parameter = next(p for p in trainer.model.policy.parameters() if p.requires_grad)
    steps = []

    def hook(gradient: Tensor) -> Tensor:
        bad = trainer.state.global_step == BAD_UPDATE - 1 and len(steps) % 4 == 1
        return gradient * NAN if bad else gradient

    parameter.register_hook(hook)
    count_steps(monkeypatch, trainer, steps)


def nan_value_gradient(monkeypatch, trainer):
    """The value's gradient is infinite in the first of the bad update's steps."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient * (INF if trainer.state.global_step == BAD_UPDATE - 1 else 1.0)

    trainer.model.value.linear.bias.register_hook(hook)


def nan_reference(monkeypatch, trainer):
    """The reference gives NaN in the bad update."""
    snapshot = trainer.reference.snapshot

    def poisoned(micro):
        found = snapshot(micro)
        bad = trainer.state.global_step == BAD_UPDATE - 1
        return found._replace(hidden=found.hidden * NAN) if bad else found

    monkeypatch.setattr(trainer.reference, "snapshot", poisoned)


def overflowing_reward(monkeypatch, trainer):
    """A reward so large that the squared error of the value is not finite."""
    score = trainer.score
    huge = torch.tensor([3e38, -3e38] * 4)

    def scored(rollout):
        found = score(rollout)
        return found._replace(scores=huge) if trainer.state.global_step == BAD_UPDATE - 1 else found

    monkeypatch.setattr(trainer, "score", scored)


def nan_weights_after_the_last_step(monkeypatch, trainer):
    """Weights that are NaN when the update is measured."""
    optimise = trainer.optimise

    def poisoned(batch):
        stats = optimise(batch)
        if trainer.state.global_step == BAD_UPDATE - 1:
            with torch.no_grad():
                next(p for p in trainer.model.policy.parameters() if p.requires_grad).fill_(NAN)
        return stats

    monkeypatch.setattr(trainer, "optimise", poisoned)


def count_steps(monkeypatch, trainer, steps: list) -> None:
    """One entry in `steps` for each optimizer step taken."""
    create = trainer.create_optimizer

    def counted(*args):
        optimizer = create(*args)
        step = optimizer.step
        monkeypatch.setattr(optimizer, "step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", counted)


REFUSALS = [
    (nan_gradient, "the policy's gradient is not finite in epoch 1, step 2 of 4"),
    (nan_value_gradient, "the value's gradient is not finite in epoch 1, step 1 of 4"),
    (nan_reference, "the KL to the reference is not finite"),
    (overflowing_reward, "an advantage or a return is not finite"),
    (nan_weights_after_the_last_step, "the KL(π_old‖π) measured after it is not finite"),
]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("poison", "reason"), REFUSALS, ids=[poison.__name__ for poison, _ in REFUSALS])
def test_a_step_that_is_not_finite_is_refused_and_the_run_goes_on(tmp_path, monkeypatch, caplog, poison, reason, peft):
    watch = Watch()
    trainer = tiny.trainer(tmp_path, callbacks=[watch], peft_config=tiny.lora() if peft else None)
    poison(monkeypatch, trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    first, bad, last = load_records(tmp_path)
    assert first["refused"] is None and last["refused"] is None
    assert reason in bad["refused"] and bad["update"] == BAD_UPDATE
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(said) == 1 and f"update {BAD_UPDATE} is refused" in said[0] and reason in said[0]
    # The policy stays bit for bit, is measured there, and moves again with the next update.
    before, after, end = (policy_of(snapshot) for snapshot in watch.snapshots[1:])
    assert same(before, after) and not same(after, end)
    assert bad["trust"]["kl"] == 0.0 and bad["trust"]["max_ratio"] == 1.0
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def policy_of(snapshot: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in snapshot.items() if name.startswith("policy.")}


@pytest.mark.parametrize(
    "poison",
    [poison for poison, _ in REFUSALS],
)
def test_a_refused_update_leaves_the_value_as_it_was_too(tmp_path, monkeypatch, poison):
    watch = Watch()
    trainer = tiny.trainer(tmp_path, callbacks=[watch])
    poison(monkeypatch, trainer)
    trainer.train()
    assert same(watch.snapshots[1], watch.snapshots[2])


def beyond_panic(monkeypatch, trainer):
    """The bad update goes further than it may."""
    measure, measured = trainer.measure, []

    def far(batch):
        found = measure(batch)
        measured.append(trainer.state.global_step)
        first = measured.count(BAD_UPDATE - 1) == 1 and measured[-1] == BAD_UPDATE - 1
        return found._replace(kl=1e9) if first else found

    monkeypatch.setattr(trainer, "measure", far)


@pytest.mark.parametrize("limit", [1.0, None], ids=["limit", "no limit"])
@pytest.mark.parametrize("poison", [*(poison for poison, _ in REFUSALS), beyond_panic])
def test_a_refused_update_was_bound_by_nothing_and_keeps_nothing_of_its_step(tmp_path, monkeypatch, poison, limit):
    """Whether it was undone while optimising or after; the limit on the gradient bounds the updates beside it."""
    changes = {"trust_max_kl": limit, "panic_kl": 1e6, "max_grad_norm": 1e-9, "kl_coef": 1e-3}
    trainer = tiny.trainer(tmp_path, changes=changes)
    poison(monkeypatch, trainer)
    trainer.train()
    bad = BAD_UPDATE - 1
    found = load_records(tmp_path)
    assert [record["refused"] is None for record in found] == [i != bad for i in range(3)]
    assert [record["binding"] for record in found] == ["none" if i == bad else "grad_norm" for i in range(3)]
    kept = [None] * 3 if limit is None else [0.0 if i == bad else 1.0 for i in range(3)]
    assert [record["trust"]["scale"] for record in found] == kept
    assert found[bad]["trust"]["kl"] == 0 and found[bad]["trust"]["guaranteed"] == limit


class Spike(TrainerCallback):
    """A learning rate that breaks policy and value in the first update, and a usual one after it."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e36 if state.global_step == 0 else 1e-3


SPIKED = {"optim": "sgd", "max_grad_norm": 0.0, "num_ppo_epochs": 1}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_value_thrown_beyond_the_numbers_does_not_end_the_training(tmp_path, steps):
    tiny.trainer(tmp_path, changes=SPIKED | {"num_mini_batches": steps}, callbacks=[Spike()]).train()
    refused = [record["refused"] for record in load_records(tmp_path)]
    assert refused[0] is not None and refused[1:] == [None, None]


def test_a_value_model_thrown_beyond_the_numbers_ends_the_run_and_leaves_the_policy(tmp_path):
    """One that is trained in full is not taken back: nothing is learnt from it any more, and the run says so."""
    changes = SPIKED | {"num_mini_batches": 1, "max_refused": 3}
    model = tiny.scalar_model(tiny.llama())
    trainer = tiny.trainer(tmp_path, changes=changes, value_model=model, callbacks=[Spike()])
    before = [p.detach().clone() for p in trainer.model.policy.parameters()]
    with pytest.raises(RefusedError):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.policy.parameters(), strict=True))


def test_a_kl_that_is_not_finite_never_reaches_the_controller(tmp_path, monkeypatch):
    changes = {"kl_controller": "adaptive", "kl_target": 1.0, "kl_horizon": 100}
    trainer = tiny.trainer(tmp_path, changes=changes)
    nan_reference(monkeypatch, trainer)
    trainer.train()
    first, bad, last = load_records(tmp_path)
    assert bad["anchor"]["kl_exact"] is None
    assert first["anchor"]["coef"] > bad["anchor"]["coef"] == last["anchor"]["coef"] > 0


# -- the checks themselves ---------------------------------------------------------------------------------------------


def test_reading_a_message_can_fail():
    with pytest.raises(ConfigError) as error:
        raise out_of_range("field", 3, "in [0, 1]")
    with pytest.raises(AssertionError, match="is missing in"):
        assert_says(error, "in [0, 2]")


def test_a_misspelt_argument_of_train_is_refused_before_anything_is_moved(tmp_path):
    with pytest.raises(TypeError, match="resume_from_chekpoint"):
        tiny.trainer(tmp_path).train(resume_from_chekpoint=True)
