"""What TRL 1.12's tests and examples do with its PPO trainer, for TRL's trainer where it exists and for this package's.

tests/experimental/test_ppo_trainer.py of TRL trains a policy in full and with LoRA, with a separate value model, on rows of
`input_ids` and `attention_mask`, and checks that the weights changed. Its tokenizer has a pad token that was added, for which
no model has an embedding; its reference and value models are in bf16. Most settings have their defaults: bf16, gradient
checkpointing, ten samples of completions, three epochs of the dataset. examples/scripts/ppo/ppo.py and ppo_tldr.py add a pad
token in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding

from tests import tiny
from tests.watched import run
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


def tokenizer() -> Any:
    """Pads on the left, with a token that was added."""
    made = tiny.tokenizer_with_added_pad()
    made.padding_side = "left"
    return made


def rows(count: int) -> Dataset:
    """Token ids that end with the eos token, and their attention mask."""
    ids = [[5 + i, *range(10, 10 + i % 4), tiny.EOS] for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]})


def arguments(**changes: Any) -> dict[str, Any]:
    """Everything but `args`, in the order of TRL's arguments."""
    llama = tiny.llama(pad_token_id=None)
    return {
        "processing_class": tokenizer(),
        "model": llama,
        "ref_model": tiny.llama(pad_token_id=None).bfloat16(),
        "reward_model": tiny.scalar_model(llama, seed=1).bfloat16(),
        "train_dataset": rows(17),
        "value_model": tiny.scalar_model(llama, seed=2).bfloat16(),
        "data_collator": None,
        "eval_dataset": rows(2),
    } | changes


SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "num_ppo_epochs": 2,
    "response_length": 6,
    "report_to": "none",
    "use_cpu": True,
    "learning_rate": 1e-2,
}


@pytest.fixture(params=["trl", "trustkl"])
def build(request, tmp_path) -> Callable[..., Any]:
    """Builds TRL's trainer or this package's, from changes to the settings and positional or keyword arguments."""
    if request.param == "trl":
        ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
        request.getfixturevalue("fast_stock_trainer")
        make_config, make_trainer = ppo.PPOConfig, ppo.PPOTrainer
    else:
        make_config, make_trainer = TrustKLPPOConfig, TrustKLPPOTrainer

    def build(changes: dict[str, Any], *positional: Any, **keywords: Any) -> Any:
        args = make_config(output_dir=str(tmp_path), **SETTINGS | changes)
        return make_trainer(args, *positional) if positional else make_trainer(args=args, **keywords)

    return build


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def changed(before: dict[str, Tensor], module: nn.Module) -> bool:
    """Whether a weight changed; the names are the same, and every weight is finite."""
    after = weights(module)
    assert after.keys() == before.keys() and all(weight.isfinite().all() for weight in after.values())
    return any(not torch.equal(before[name], weight) for name, weight in after.items())


def test_policy_and_value_model_are_trained_and_reference_and_reward_model_are_not(build):
    given = arguments()
    models = {name: given[name] for name in ("model", "value_model", "ref_model", "reward_model")}
    before = {name: weights(model) for name, model in models.items()}
    trainer = build({}, **given)
    trainer.train()
    assert changed(before["model"], trainer.model.policy) and changed(before["value_model"], trainer.model.value_model)
    assert not changed(before["ref_model"], trainer.ref_model)
    assert not changed(before["reward_model"], trainer.reward_model)
    assert trainer.state.episode == 4 * trainer.state.global_step >= 3 * 17


def test_with_peft_the_adapter_and_the_value_model_are_trained_and_the_base_model_is_not(build):
    given = arguments(ref_model=None)
    base, value = weights(given["model"]), weights(given["value_model"])
    trainer = build({}, **given, peft_config=tiny.lora(lora_dropout=0.05, r=32))
    trainer.train()
    after = weights(trainer.model.policy)
    adapter = {name: weight for name, weight in after.items() if "lora_B" in name}
    assert adapter and all(weight.isfinite().all() and weight.any() for weight in adapter.values())
    frozen = {name.replace(".base_layer", "").removeprefix("base_model.model."): w for name, w in after.items()}
    assert all(torch.equal(frozen[name], weight) for name, weight in base.items())
    assert changed(value, trainer.model.value_model)


def test_arguments_by_position_and_a_reference_that_is_left_out(build):
    given = arguments(ref_model=None, data_collator=DataCollatorWithPadding(tokenizer()))
    before = weights(given["model"])
    trainer = build({"total_episodes": 8}, *given.values())
    trainer.train()
    assert trainer.state.global_step == 2
    assert changed(before, trainer.model.policy) and not changed(before, trainer.ref_model)


SIZES = ("local_batch_size", "micro_batch_size", "batch_size", "local_mini_batch_size", "mini_batch_size")


@pytest.mark.parametrize(
    ("batch", "accumulation", "mini_batches", "sizes", "updates"),
    [(4, 1, 1, (4, 4, 4, 4, 4), 8), (2, 4, 2, (8, 2, 8, 4, 4), 4), (1, 6, 3, (6, 1, 6, 2, 2), 6)],
)
def test_batch_sizes_follow_from_three_settings(build, batch, accumulation, mini_batches, sizes, updates):
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    changes |= {"num_mini_batches": mini_batches, "total_episodes": 32, "num_sample_generations": 0}
    trainer = build(changes, **arguments())
    assert tuple(getattr(trainer.args, name) for name in SIZES) == sizes
    assert trainer.args.num_total_batches == updates and trainer.args.total_episodes == 32
    trainer.train()
    assert trainer.state.global_step == updates and trainer.state.episode == updates * sizes[2]


def test_a_response_without_eos_costs_the_penalty(build):
    changes = {"per_device_train_batch_size": 16, "total_episodes": 16, "stop_token": "eos", "response_length": 12}
    scores = []
    for penalty in (None, 100.0):
        given = arguments(reward_model=tiny.scalar_model(tiny.llama(), seed=1))
        trainer = build(changes | {"missing_eos_penalty": penalty, "num_sample_generations": 0}, **given)
        trainer.train()
        scores += [log["objective/scores"] for log in trainer.state.log_history if "objective/scores" in log]
    missing = (scores[0] - scores[1]) / 100 * 16
    assert missing == pytest.approx(round(missing), abs=1e-3) and 0 < round(missing) < 16


@pytest.mark.parametrize(("samples", "expected"), [(0, 0), (2, 2), (10, 4)])
def test_completions_are_shown_during_the_run(build, samples, expected, monkeypatch):
    changes = {"num_sample_generations": samples, "total_episodes": 16}
    trainer = build(changes, **arguments())
    shown: list[bool] = []
    monkeypatch.setattr(trainer, "generate_completions", lambda sampling=False: shown.append(sampling))
    trainer.train()
    assert shown == [True] * expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_dataset": None},
        {"num_mini_batches": 3},
        {"stop_token": "eos", "stop_token_id": 5},
        {"stop_token": "stop"},
        {"kl_estimator": "k9"},
    ],
    ids=str,
)
def test_what_cannot_work_is_a_value_error(build, wrong):
    given = arguments()
    changes = {name: wrong[name] for name in wrong.keys() - given.keys()}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build(changes, **given | {name: wrong[name] for name in wrong.keys() & given.keys()})


def test_the_model_cannot_be_its_own_reference(build):
    given = arguments()
    with pytest.raises(ValueError, match="`ref_model`"):
        build({}, **given | {"ref_model": given["model"]})


# -- examples/scripts/ppo ----------------------------------------------------------------------------------------------

PAD = tiny.VOCAB
"""The id of the added pad token."""
EMBEDDINGS = [(PAD, PAD), (PAD, PAD + 1), (PAD + 1, PAD)]
"""Of policy and reference, and of reward and value model; PAD + 1 includes one of the pad token."""


def scripted(policy: int, reward: int) -> dict[str, Any]:
    """The script's arguments, for models of these numbers of embeddings; the dataset has only token ids."""
    made, texts = tokenizer(), tiny.prompts(20).select_columns("prompt")
    assert made.pad_token_id == PAD
    ids = texts.map(lambda row: {"input_ids": made(row["prompt"], padding=False)["input_ids"]}, remove_columns="prompt")
    causal, scalar = (tiny.llama(vocab_size=size, pad_token_id=None) for size in (policy, reward))
    return {
        "processing_class": made,
        "model": causal,
        "ref_model": copy.deepcopy(causal),
        "reward_model": tiny.scalar_model(scalar, seed=1),
        "value_model": tiny.scalar_model(scalar, seed=2),
        "train_dataset": ids.select(range(12)),
        "eval_dataset": ids.select(range(12, 20)),
    }


@pytest.mark.parametrize("with_peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize("embeddings", EMBEDDINGS, ids=str)
def test_the_script_of_trl_trains_saves_and_shows_completions(embeddings, with_peft, build, tmp_path, capsys):
    given = scripted(*embeddings)
    given |= {"ref_model": None, "peft_config": tiny.lora()} if with_peft else {}
    changes = {"total_episodes": 16, "missing_eos_penalty": 1.0, "stop_token": "eos", "response_length": 12}
    trainer = build(changes | {"bf16": False}, **given)
    trainer.train()
    trainer.save_model(str(tmp_path))
    capsys.readouterr()
    trainer.generate_completions()
    assert "score" in capsys.readouterr().out
    assert trainer.state.global_step == 4
    base = tiny.llama(vocab_size=embeddings[0])
    saved = PeftModel.from_pretrained(base, tmp_path) if with_peft else AutoModelForCausalLM.from_pretrained(tmp_path)
    text = AutoTokenizer.from_pretrained(tmp_path)("w1 w2", return_tensors="pt")
    torch.testing.assert_close(saved(**text).logits, trainer.model.policy(**text).logits)


def test_a_sampled_pad_token_without_an_embedding_is_masked_for_the_models_that_read_it(tmp_path):
    given = scripted(PAD + 1, PAD)
    given["model"].lm_head.weight.data[PAD] *= 3
    reward = given.pop("reward_model")
    trainer, records = run(tmp_path, given.pop("model"), peft_config=None, reward_funcs=reward, **given)
    for rollout, scored in zip(trainer.seen["rollout"], trainer.seen["score"], strict=True):
        sampled = (rollout.response_ids == PAD) & rollout.response_mask
        assert sampled.any(1).sum() >= 2 and scored.logp[sampled].isfinite().all()
        for row in sampled.any(1).nonzero().flatten().tolist():
            ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.response_ids[row]])
            expected = float(reward(input_ids=ids[ids != PAD][None]).logits)
            assert scored.scores[row] == pytest.approx(expected, abs=1e-5)
    assert len(records) == 3


def test_tokens_beyond_the_policys_embedding_are_no_reason_to_reject_a_model(build):
    given = scripted(PAD, PAD)
    given["processing_class"].add_tokens(["more", "and more"])
    trainer = build({"total_episodes": 4}, **given)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("argument", "said"), [("reward_model", "43 embeddings.*45 tokens"), ("value_model", "43 embeddings.*45 tokens")]
)
def test_a_model_without_embeddings_of_two_tokens_is_still_rejected(argument, said, tmp_path):
    given = scripted(PAD + 2, PAD + 2)
    given["processing_class"].add_tokens(["more"])
    given[argument] = scripted(PAD, PAD)[argument]
    with pytest.raises(ValueError, match=said):
        TrustKLPPOTrainer(tiny.config(tmp_path), **given)
