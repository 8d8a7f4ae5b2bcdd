"""Against the trainer that TRL 1.12 ships: equal where nothing is meant to differ, and each difference on its own.

Parity is on the weights. Both trainers start from copies of the same models and get the same responses, written out by
`Script` instead of sampled, because sampling is the one thing the two cannot share: they draw from different streams.
The old log-probabilities that TRL takes from generation are then those of a forward pass, as ours are.

What is meant to differ has a test named after it below, `test_difference_<number>_…`, with TRL's behaviour beside ours.
The numbers are those of the table of defects in docs/.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from tests import tiny
from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer
from trl_trustkl.errors import DataError
from trl_trustkl.types import Prompts, Rollout

pytestmark = pytest.mark.filterwarnings("ignore")
ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 removed its PPO trainer")
ppo_config = pytest.importorskip("trl.experimental.ppo.ppo_config")

TOLERANCE = 5e-5
MOVED = 1e-3
ROWS, LENGTH, UPDATES = 10, 8, 4
EOS, FIRST_WORD = 2, 7
ENDS = (None, LENGTH, LENGTH - 1, 1, LENGTH // 2)
"""How many tokens a response has, the stop token included; None: it never ends."""

NEUTRAL = {
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 3,
    "total_episodes": ROWS * UPDATES,
    "response_length": LENGTH,
    "stop_token": "eos",
    "temperature": 0.7,
    "kl_estimator": "k1",
    "kl_coef": 0.2,
    "vf_coef": 0.5,
    "optim": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "num_sample_generations": 0,
}


# -- the same responses for both ---------------------------------------------------------------------------------------


class Script:
    """Responses as a function of the prompt and the update: random words, then `stop`, then padding."""

    def __init__(self, ends: tuple[int | None, ...] = ENDS, *, stop: int = EOS, pad: int = 0) -> None:
        self.ends, self.stop, self.pad = ends, stop, pad

    def response(self, prompt: list[int], update: int) -> list[int]:
        words = random.Random(f"{prompt} {update}").choices(range(FIRST_WORD, tiny.VOCAB), k=LENGTH)
        end = self.ends[(prompt[0] + update) % len(self.ends)]
        return words if end is None else words[: end - 1] + [self.stop] + [self.pad] * (LENGTH - end)

    def responses(self, ids: Tensor, mask: Tensor, update: int) -> Tensor:
        return torch.tensor([self.response(row[keep].tolist(), update) for row, keep in zip(ids, mask, strict=True)])

    def mask(self, responses: Tensor) -> Tensor:
        """True up to and including the first stop token."""
        ended = (responses == self.stop).long().cumsum(-1)
        return (ended == 0) | ((ended == 1) & (responses == self.stop))

    def as_generation(self) -> Callable:
        """Instead of TRL's `batch_generation`: its scores are the tempered logits of a forward pass, undisturbed."""
        update = -1

        @torch.no_grad()
        def batch_generation(model, queries, _, pad_token_id, generation_config):
            nonlocal update
            update += 1
            tokens = (queries != pad_token_id).long().cumsum(-1) > 0
            sequences = torch.cat([queries, self.responses(queries, tokens, update)], dim=1)
            logits = ppo_trainer.forward(model, sequences, pad_token_id).logits
            return sequences, logits[:, queries.shape[1] - 1 : -1] / generation_config.temperature

        return batch_generation


SCRIPT = Script()


class ScriptedTrainer(TrustKLPPOTrainer):
    """Ours, with the responses of a script where it is given one."""

    script: Script | None = None

    def rollout(self, prompts: Prompts) -> Rollout:
        if self.script is None:
            return super().rollout(prompts)
        responses = self.script.responses(prompts.ids, prompts.mask, self.state.global_step)
        mask = self.script.mask(responses)
        return Rollout(prompts.ids, prompts.mask, responses, mask, None, prompts.rows)


# -- the same start for both -------------------------------------------------------------------------------------------


class Models(NamedTuple):
    policy: nn.Module
    value: nn.Module
    reward: nn.Module


def models(family: str = "llama") -> Models:
    policy = tiny.FAMILIES[family]()
    return Models(policy, tiny.scalar_model(policy, seed=1), tiny.scalar_model(policy, seed=2))


def rows(count: int = ROWS) -> Dataset:
    """Prompts of one to four tokens; the first token tells them apart."""
    return Dataset.from_dict({"input_ids": [[FIRST_WORD + i, *range(10, 10 + i % 4)] for i in range(count)]})


def left_padding_tokenizer(**changes: Any):
    tokenizer = tiny.tokenizer(**changes)
    tokenizer.padding_side = "left"
    return tokenizer


def arguments(start: Models, **changes: Any) -> dict[str, Any]:
    policy, value, reward = copy.deepcopy(start)
    return {
        "processing_class": left_padding_tokenizer(),
        "model": policy,
        "ref_model": None,
        "reward_model": reward,
        "value_model": value,
        "train_dataset": rows(),
    } | changes


def stock_trainer(folder: Any, start: Models, settings: dict[str, Any] | None = None, **changes: Any):
    args = ppo_config.PPOConfig(output_dir=str(folder / "stock"), **NEUTRAL | (settings or {}))
    return ppo_trainer.PPOTrainer(args=args, **arguments(start, **changes))


def our_trainer(folder: Any, start: Models, settings: dict[str, Any] | None = None, **changes: Any) -> ScriptedTrainer:
    args = TrustKLPPOConfig(output_dir=str(folder / "ours"), **NEUTRAL | (settings or {}))
    return ScriptedTrainer(args=args, **arguments(start, **changes))


def fill_adapter(model: nn.Module, seed: int = 5) -> None:
    """Numbers of our own for an adapter: PEFT's start has B = 0, which leaves half of the gradient 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


# -- runs --------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Trained weights before and after a run, by name, and what was logged, an entry for each update."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    logs: list[dict[str, Any]]

    def moved(self) -> float:
        return difference(self.before, self.after)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, over the same names."""
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def weights(trainer: Any) -> dict[str, Tensor]:
    """What is trained, policy and value, under the same names for both trainers."""
    model = trainer.model
    value = model.value.model if isinstance(trainer, TrustKLPPOTrainer) else model.value_model
    parts = [("policy", model.policy), ("value", value)]
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, module in parts
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def run(trainer: Any) -> Run:
    before = weights(trainer)
    trainer.train()
    return Run(before, weights(trainer), [entry for entry in trainer.state.log_history if "objective/kl" in entry])


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """Run TRL's trainer on a script; `adapter` puts known numbers into its adapter first."""

    def go(start: Models, settings: dict | None = None, *, script=SCRIPT, adapter=False, **changes) -> Run:
        monkeypatch.setattr(ppo_trainer, "batch_generation", script.as_generation())
        trainer = stock_trainer(tmp_path, start, settings, **changes)
        if adapter:
            fill_adapter(trainer.model.policy)
        return run(trainer)

    return go


@pytest.fixture
def ours(tmp_path):
    """Run our trainer on a script, with the same arguments."""

    def go(start: Models, settings: dict | None = None, *, script=SCRIPT, adapter=False, **changes) -> Run:
        trainer = our_trainer(tmp_path, start, settings, **changes)
        trainer.script = script
        if adapter:
            fill_adapter(trainer.model.policy)
        return run(trainer)

    return go


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """TRL's trainer collects garbage twice an update, most of its time here; tiny matrices need no second thread."""
    monkeypatch.setattr(ppo_trainer, "gc", SimpleNamespace(collect=lambda: 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- parity ------------------------------------------------------------------------------------------------------------

SAME_METRICS = (
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/num_eos_tokens",
    "lr",
    "episode",
)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weights_equal_the_stock_trainers(stock, ours, family, adapter):
    start = models(family)
    extra = {"peft_config": tiny.lora()} if adapter else {}
    theirs, mine = (trainer(start, adapter=adapter, **extra) for trainer in (stock, ours))

    assert difference(theirs.before, mine.before) == 0.0
    assert any("lora_B" in name for name in mine.before) == adapter
    for part in ("policy", "value"):
        moves = [float((mine.after[n] - mine.before[n]).abs().max()) for n in mine.before if n.startswith(part)]
        assert max(moves) > MOVED, f"the {part} did not move: equal weights would say nothing"
    gap = difference(theirs.after, mine.after)
    print(f"\n{family}, {'lora' if adapter else 'full'}: moved {mine.moved():.3f}, differ by {gap:.1e}")
    assert gap <= TOLERANCE
    # Both clips took part, or their agreement would be untested.
    assert all(max(entry[key] for entry in mine.logs) > 0 for key in ("policy/clipfrac_avg", "val/clipfrac_avg"))


@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ({"kl_estimator": "k3"}, SCRIPT),
        ({"whiten_rewards": True}, SCRIPT),
        ({"missing_eos_penalty": 1.0}, SCRIPT),
        ({"gamma": 0.9, "lam": 0.8, "cliprange_value": 0.5}, SCRIPT),
        ({"stop_token": None}, Script(ends=(None,))),
        ({"stop_token": None, "stop_token_id": 5}, Script(stop=5)),
        ({"lr_scheduler_type": "constant", "temperature": 1.0}, SCRIPT),
        ({"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3, "weight_decay": 0.1}, SCRIPT),
    ],
    ids=["k3", "whiten_rewards", "missing_eos", "gae", "no_stop_token", "stop_token_id", "schedule", "adamw"],
)
def test_trl_options_mean_the_same(stock, ours, settings, script):
    start = models()
    settings = {"total_episodes": 2 * ROWS} | settings
    theirs, mine = (trainer(start, settings, script=script) for trainer in (stock, ours))
    assert mine.moved() > MOVED
    assert difference(theirs.after, mine.after) <= TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.21},
        {"kl_estimator": "k3"},
        {"temperature": 0.71},
        {"cliprange": 0.19},
        {"cliprange_value": 0.19},
        {"clip_rule": "none"},
        {"clip_value": False},
        {"vf_coef": 0.51},
        {"lam": 0.94},
        {"whiten_advantages": False},
        {"score_position": "eos"},
        {"max_grad_norm": 1.0},
        {"lr_scheduler_type": "constant"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_parity_can_fail(ours, settings):
    """A setting that is a little off is seen at the tolerance; so would be the same mistake in the code."""
    start = models()
    neutral, off = ours(start), ours(start, settings)
    assert difference(neutral.after, off.after) > TOLERANCE


def test_metrics_of_the_same_name_equal_the_stock_trainers(stock, ours):
    """Where TRL's numbers are right; difference 4 has those that padding dilutes."""
    start = models()
    theirs, mine = stock(start), ours(start)
    assert len(theirs.logs) == len(mine.logs) == UPDATES
    for one, other in zip(theirs.logs, mine.logs, strict=True):
        for name in SAME_METRICS:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


# -- intended differences: the update ----------------------------------------------------------------------------------


def test_difference_1_max_grad_norm_is_applied(stock, ours):
    start = models()
    settings = {"num_ppo_epochs": 1, "total_episodes": ROWS, "learning_rate": 1.0, "max_grad_norm": 1e-4}
    theirs, mine = stock(start, settings), ours(start, settings)
    assert theirs.moved() > MOVED
    assert 1e-6 < mine.moved() <= 1e-4
    assert mine.logs[0]["gradient/scale"] < 0.1


def count_steps(trainer: Any) -> list[int]:
    """The optimizer steps of each update of a run."""
    steps, updates = 0, []

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    class EndOfUpdate(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            updates.append(steps - sum(updates))

    trainer.add_callback(EndOfUpdate())
    hook = register_optimizer_step_post_hook(step)
    try:
        trainer.train()
    finally:
        hook.remove()
    return updates


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_difference_2_each_mini_batch_makes_an_optimizer_step(tmp_path, monkeypatch, mini_batches):
    """TRL's steps depend on whether the dataset ends, not on mini-batches: 1, then one per micro-batch."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": mini_batches}
    settings |= {"num_ppo_epochs": 1, "total_episodes": 16, "learning_rate": 1e-3}
    monkeypatch.setattr(ppo_trainer, "batch_generation", SCRIPT.as_generation())
    assert count_steps(stock_trainer(tmp_path, start, settings, train_dataset=rows(16))) == [1, 4]
    ours = our_trainer(tmp_path, start, settings, train_dataset=rows(16))
    assert count_steps(ours) == [mini_batches, mini_batches]


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_difference_3_statistics_are_means_over_what_was_there(stock, ours, mini_batches):
    """Nothing moves at a learning rate of 0: the ratio is 1. TRL averages over slots that it never fills."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": mini_batches}
    settings |= {"learning_rate": 0.0, "total_episodes": 8}
    theirs, mine = (trainer(start, settings, train_dataset=rows(8)).logs[0] for trainer in (stock, ours))
    assert theirs["val/ratio"] == pytest.approx(1 / mini_batches, rel=1e-3)
    assert mine["val/ratio"] == 1.0
    assert mine["policy/approxkl_avg"] == 0.0


def test_difference_4_statistics_leave_padding_out(stock, ours):
    """The same sum of squared log-ratios, divided by the tokens that there are: TRL divides by the padding too."""
    start = models()
    theirs, mine = stock(start), ours(start)
    for one, other in zip(theirs.logs, mine.logs, strict=True):
        share = other["length"] / LENGTH
        assert share < 0.9
        assert other["policy/approxkl_avg"] * share == pytest.approx(one["policy/approxkl_avg"], rel=1e-3)
        assert 1 + (other["val/ratio"] - 1) * share == pytest.approx(one["val/ratio"], rel=1e-4)


def test_difference_in_accumulation_the_split_into_micro_batches_changes_nothing(stock, ours):
    """A mini-batch's loss is the mean over its tokens; TRL's is the mean over its micro-batches of their means."""
    start = models()
    one = {"num_ppo_epochs": 1, "total_episodes": ROWS}
    two = one | {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
    np.random.seed(0)
    # A second batch of prompts: on the last one of the dataset TRL does not accumulate.
    theirs = [stock(start, settings, train_dataset=rows(2 * ROWS)) for settings in (one, two)]
    mine = [ours(start, settings, train_dataset=rows(2 * ROWS)) for settings in (one, two)]
    assert difference(theirs[0].after, theirs[1].after) > TOLERANCE
    assert difference(mine[0].after, mine[1].after) <= 1e-6


def test_difference_5_a_callback_can_stop_the_run(stock, ours):
    class StopAtOnce(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    theirs, mine = (trainer(models(), callbacks=[StopAtOnce()]).logs for trainer in (stock, ours))
    assert [len(theirs), len(mine)] == [UPDATES, 1]


class PadFirst(Script):
    """Every response opens with the padding token, sampled like any other."""

    def response(self, prompt: list[int], update: int) -> list[int]:
        return [self.pad, *super().response(prompt, update)[1:]]


def test_difference_10_a_sampled_padding_token_is_a_token(stock, ours):
    """TRL takes the first padding token for the end, and a response that opens with one for one of length −1."""
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        stock(models(), script=PadFirst(ends=(None,)))
    mine = ours(models(), script=PadFirst(ends=(None,)))
    assert mine.moved() > MOVED
    assert all(weight.isfinite().all() for weight in mine.after.values())
    assert [entry["length"] for entry in mine.logs] == [LENGTH] * UPDATES


def test_difference_11_the_score_can_land_on_the_last_token(stock, ours):
    """An option, off by default. Where no response ends early, the last token is where TRL puts the score as well."""
    start, settings = models(), {"score_position": "eos"}
    assert difference(stock(start).after, ours(start, settings).after) > TOLERANCE
    full = Script(ends=(None, LENGTH))
    assert difference(stock(start, script=full).after, ours(start, settings, script=full).after) <= TOLERANCE


def test_difference_12_the_missing_eos_penalty_looks_for_the_stop_token(stock, ours):
    """Every response ends with the stop token, which is not the tokenizer's eos: TRL fines all of them."""
    settings = {"stop_token": None, "stop_token_id": 5, "total_episodes": ROWS}
    script = Script(ends=(3,), stop=5)
    for trainer, expected in ((stock, 10.0), (ours, 0.0)):
        scores = [
            trainer(models(), settings | {"missing_eos_penalty": penalty}, script=script).logs[0]["objective/scores"]
            for penalty in (None, 10.0)
        ]
        assert scores[0] - scores[1] == pytest.approx(expected, abs=1e-4)


def test_difference_21_one_seed_gives_one_run(stock, ours):
    """Whatever the process drew before: TRL shuffles mini-batches with numpy's global state, which nothing seeds."""
    start = models()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "total_episodes": ROWS}
    ends = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        ends[name] = []
        for seed in (1, 2):
            np.random.seed(seed)
            random.seed(seed)
            torch.manual_seed(seed)
            ends[name].append(trainer(start, settings).after)
    assert difference(*ends["stock"]) > TOLERANCE
    assert difference(*ends["ours"]) == 0.0


# -- intended differences: sampling ------------------------------------------------------------------------------------

AT_REST = {"learning_rate": 0.0, "total_episodes": ROWS, "num_ppo_epochs": 1, "temperature": 1.0}
"""With a learning rate of 0 nothing moves: every divergence is 0, unless it is measured wrongly."""


def test_difference_6_processed_scores_are_not_the_policy(tmp_path):
    start = models()
    start.policy.generation_config.repetition_penalty = 1.3
    theirs = run(stock_trainer(tmp_path, start, AT_REST)).logs[0]
    assert theirs["policy/approxkl_avg"] > 1e-3
    assert abs(theirs["objective/kl"]) > 1e-2
    mine = run(our_trainer(tmp_path, start, AT_REST)).logs[0]
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0
    assert mine["sampler/kl"] < 1e-6


def test_difference_6_asking_for_processed_scores_shows_in_the_sampler_alone(tmp_path):
    settings = AT_REST | {"generation_kwargs": {"repetition_penalty": 1.3}}
    mine = run(our_trainer(tmp_path, models(), settings)).logs[0]
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0
    assert mine["sampler/kl"] > 1e-3


def test_difference_7_the_ratio_is_1_in_mixed_precision_too(tmp_path, monkeypatch):
    """TRL generates outside the wrapper that casts, and its old log-probabilities with it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = stock_trainer(tmp_path, models(), AT_REST)
    assert trainer.accelerator.mixed_precision == "bf16"
    theirs = run(trainer).logs[0]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    mine = run(our_trainer(tmp_path, models(), AT_REST | {"bf16": True})).logs[0]
    our_trainer(tmp_path, models())  # the accelerator's state is the process's: leave none of it to other tests
    assert theirs["policy/approxkl_avg"] > 1e-7
    assert mine["val/ratio"] == 1.0
    assert mine["policy/approxkl_avg"] == mine["objective/kl"] == mine["trust/kl"] == 0.0


def test_difference_8_bf16_reaches_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    # The accelerator's state is the process's: read it before the next trainer is made, and leave none to other tests.
    precision = [
        make(tmp_path, models(), {"bf16": True}).accelerator.mixed_precision for make in (stock_trainer, our_trainer)
    ]
    our_trainer(tmp_path, models())
    assert precision == ["no", "bf16"]


def test_difference_9_the_terminal_eos_is_trained_where_it_is_the_padding_too(stock, ours, monkeypatch):
    """Every response has three tokens, the eos included, which a mask made from the padding token takes for padding."""
    trained: dict[str, list[int]] = {"stock": [], "ours": []}
    whiten, advantages = ppo_trainer.masked_whiten, ScriptedTrainer.advantages

    def counting_whiten(values, mask, **kwargs):
        trained["stock"].append(int(mask.sum()))
        return whiten(values, mask, **kwargs)

    def counting_advantages(self, scored):
        trained["ours"].append(int(scored.loss_mask.sum()))
        return advantages(self, scored)

    monkeypatch.setattr(ppo_trainer, "masked_whiten", counting_whiten)
    monkeypatch.setattr(ScriptedTrainer, "advantages", counting_advantages)
    for trainer in (stock, ours):
        tokenizer = left_padding_tokenizer(pad=False)
        tokenizer.pad_token = tokenizer.eos_token
        script = Script(ends=(3,), pad=EOS)
        trainer(models(), {"total_episodes": ROWS}, script=script, processing_class=tokenizer)
    assert trained == {"stock": [2 * ROWS], "ours": [3 * ROWS]}


def test_difference_9_an_eos_inside_a_prompt_is_read_where_it_is_the_padding_too(stock, ours):
    """Two prompts that differ in an eos in their middle are different prompts; TRL reads both as the one with a gap."""
    seen: dict[str, list[Tensor]] = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        tokenizer = left_padding_tokenizer(pad=False)
        tokenizer.pad_token = tokenizer.eos_token
        start = models()
        seen[name] = []
        start.policy.model.register_forward_pre_hook(
            lambda _, args, kwargs, to=seen[name]: to.append((kwargs["input_ids"], kwargs["attention_mask"])),
            with_kwargs=True,
        )
        dataset = Dataset.from_dict({"input_ids": [[8 + i, EOS, 9] for i in range(ROWS)]})
        trainer(start, AT_REST, script=Script(ends=(None,)), processing_class=tokenizer, train_dataset=dataset)
    for name, read in (("stock", False), ("ours", True)):
        ids, mask = seen[name][-1]
        assert ((ids[:, 1] == EOS) & (mask[:, 1] == 1)).all() == read


@pytest.mark.parametrize("stop_token", [None, "eos"])
def test_difference_13_the_models_generation_config_stays_as_it_was(tmp_path, stop_token):
    start = models()
    theirs, mine = (
        make(tmp_path, start, AT_REST | {"stop_token": stop_token}) for make in (stock_trainer, our_trainer)
    )
    for trainer in (theirs, mine):
        trainer.train()
    assert theirs.model.policy.generation_config.eos_token_id == (EOS if stop_token else None)
    assert mine.model.policy.generation_config.to_dict() == start.policy.generation_config.to_dict()


# -- intended differences: models and data -----------------------------------------------------------------------------


def test_difference_15_gradient_checkpointing_is_switched_on(tmp_path):
    found = [make(tmp_path, models(), {"gradient_checkpointing": True}) for make in (stock_trainer, our_trainer)]
    assert [trainer.model.policy.is_gradient_checkpointing for trainer in found] == [False, True]


def test_difference_16_no_pass_keeps_all_hidden_states(stock, ours):
    asked: dict[str, set] = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        start = models()
        asked[name] = set()
        for model in (start.policy.model, start.value.model):  # copies keep their hooks
            model.register_forward_pre_hook(
                lambda _, args, kwargs, to=asked[name]: to.add(bool(kwargs.get("output_hidden_states"))),
                with_kwargs=True,
            )
        trainer(start, {"total_episodes": ROWS})
    assert asked == {"stock": {True}, "ours": {False}}


def test_difference_18_a_model_with_an_adapter_starts_at_its_own_reference(stock, ours):
    """The reference is the model as it was given; TRL's is the model before the adapter that it came with."""
    start = models()
    adapted = get_peft_model(copy.deepcopy(start.policy), tiny.lora())
    fill_adapter(adapted)
    theirs, mine = (trainer(start._replace(policy=adapted)) for trainer in (stock, ours))
    assert theirs.before.keys() == mine.before.keys()  # the clone that is the reference is not trained
    assert abs(theirs.logs[0]["objective/kl"]) > 0.1
    assert mine.logs[0]["objective/kl"] == 0.0
    assert mine.logs[0]["anchor/kl_exact"] == 0.0
    assert mine.logs[-1]["anchor/kl_exact"] > 0.0


def test_difference_22_a_dataset_shorter_than_a_batch_is_an_error(tmp_path):
    """TRL's loader then has no batch, and its loop asks it for the next one for ever."""
    theirs = stock_trainer(tmp_path, models(), train_dataset=rows(ROWS - 1))
    assert len(theirs.dataloader) == 0
    with pytest.raises(DataError, match=f"`train_dataset` has {ROWS - 1} rows, fewer than one batch of {ROWS}"):
        our_trainer(tmp_path, models(), train_dataset=rows(ROWS - 1))
