"""AdaptiveKLCallback on TRL's trainers, against the rules of the controllers applied by hand to the measured KL."""

from __future__ import annotations

import json
import math
import textwrap
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from transformers import TrainerCallback
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from tests import tiny
from tests.processes import in_two_processes
from tests.trl_trainers import DUAL, KINDS, TARGET, TRAINERS, controlled, logged, trainer_of, trl_ppo
from trl_trustkl import AdaptiveKLCallback
from trl_trustkl.callbacks.adaptive_kl import SMALLEST
from trl_trustkl.controllers import AdaptiveKL, DualKL, ScheduledKL, ThresholdKL
from trl_trustkl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


def dual(coef: float, kl: float, target: float = TARGET) -> float:
    return coef * math.exp(0.3 * min(max(max(kl, 0.0) / target - 1, -1.0), 1.0))


@KINDS
def test_the_coefficient_follows_the_rule(kind, tmp_path):
    trainer = controlled(kind, tmp_path, max_steps=6)
    trainer.train()
    coefs, kls = logged(trainer, "kl/coef"), logged(trainer, "kl")
    assert len(coefs) == 6 and coefs[0] == 0.1
    for (coef, after), kl in zip(pairwise([*coefs, trainer.beta]), kls, strict=True):
        assert after == pytest.approx(dual(coef, kl), rel=1e-12)
    assert min(kls) < TARGET < max(kls), "the coefficient moved in one direction only"
    assert logged(trainer, "kl/measured") == kls and set(logged(trainer, "kl/target")) == {TARGET}
    used = [{beta for beta, _ in trainer.seen[step]} for step in range(6)]
    assert used == [{coef} for coef in coefs], "the loss used another coefficient than the one logged"


class State(NamedTuple):
    coef: float
    calls: int


class Recorder:
    """A user-defined controller that keeps the KLs and episodes that it is given."""

    def __init__(self) -> None:
        self.received: list[tuple[float, int]] = []

    def init(self) -> State:
        return State(0.1, 0)

    def update(self, state: State, *, kl: float, episodes: int) -> State:
        self.received.append((kl, episodes))
        return State(state.coef * 1.1, state.calls + 1)


ODD = {
    "accumulation": {"gradient_accumulation_steps": 3, "num_generations": 2, "per_device_train_batch_size": 2},
    "iterations": {"num_iterations": 2},
    "several_steps_per_generation": {"steps_per_generation": 4, "num_iterations": 2},
    "several_generations_per_step": {"steps_per_generation": 1},
    "rare_logs": {"logging_steps": 3},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "eval_on_start": True},
}


@KINDS
@pytest.mark.parametrize("case", ODD)
def test_every_kl_is_seen_once(kind, case, tmp_path):
    recorder = Recorder()
    trainer = controlled(kind, tmp_path, recorder, max_steps=8, **ODD[case])
    trainer.train()
    expected = {step: [kl for _, kl in seen] for step, seen in trainer.seen.items()}
    assert [kl for kl, _ in recorder.received] == [max(0.0, sum(kls) / len(kls)) for kls in expected.values()]
    used = [{beta for beta, _ in seen} for seen in trainer.seen.values()]
    assert all(len(betas) == 1 for betas in used), "the coefficient changed within a step"
    assert [beta for betas in used for beta in betas] == pytest.approx([0.1 * 1.1**i for i in range(len(used))])
    args, last = trainer.args, max(expected) + 1
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert sum(episodes for _, episodes in recorder.received) == last * batch // args.num_iterations


@KINDS
def test_episodes_are_those_of_an_update(kind, tmp_path):
    controller = AdaptiveKL(coef=0.1, target=TARGET, horizon=40, clip=0.5)
    trainer = controlled(kind, tmp_path, controller)
    trainer.train()
    for (coef, after), kl in zip(
        pairwise([*logged(trainer, "kl/coef"), trainer.beta]), logged(trainer, "kl"), strict=True
    ):
        error = min(max(max(kl, 0.0) / TARGET - 1, -0.5), 0.5)
        assert after == pytest.approx(coef * (1 + error * 8 / 40), rel=1e-12)  # 4 × 2 responses a step


def test_a_horizon_that_does_not_suit_the_run_is_rejected_or_named(tmp_path, caplog):
    """With 8 responses a step, of which a clip of 0.5 takes half in one update at a horizon of 8."""
    with pytest.raises(ConfigError, match="`horizon` got 4; it must be above 4, clip × responses of a step = 0.5 × 8"):
        controlled("grpo", tmp_path, AdaptiveKL(coef=0.1, target=TARGET, horizon=4, clip=0.5)).train()
    for horizon, said in (
        (6, "by up to 67%"),
        (40, None),
        (1000, "5 updates of this run, of 8 responses each, change"),
    ):
        caplog.clear()
        controlled("grpo", tmp_path, AdaptiveKL(coef=0.1, target=TARGET, horizon=horizon, clip=0.5)).train()
        messages = [each.getMessage() for each in caplog.records if "AdaptiveKLCallback: horizon" in each.getMessage()]
        assert len(messages) == (said is not None) and all(said in message for message in messages)


@KINDS
def test_a_kl_below_zero_counts_as_zero(kind, tmp_path):
    recorder = Recorder()
    trainer = controlled(kind, tmp_path, recorder)
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, AdaptiveKLCallback))
    assert callback._move(-0.5, 1)["kl/measured"] == -0.5
    assert recorder.received == [(0.0, 8)] and trainer.beta == pytest.approx(0.11)


@KINDS
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kind, kl, tmp_path):
    recorder = Recorder()
    trainer = controlled(kind, tmp_path, recorder)
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, AdaptiveKLCallback))
    callback._move(kl, 1)
    assert recorder.received == [] and trainer.beta == 0.1
    callback._move(0.3, 2)
    assert recorder.received == [(0.3, 16)], "the episodes of the step without a KL were lost"


@KINDS
def test_measuring_continues_when_a_schedule_reaches_zero(kind, tmp_path):
    trainer = controlled(kind, tmp_path, ScheduledKL(coef=0.1, end_coef=0.0, episodes=16))
    trainer.train()
    assert logged(trainer, "kl/coef") == pytest.approx([0.1, 0.05, SMALLEST, SMALLEST, SMALLEST])
    assert len(logged(trainer, "kl")) == 5 and not logged(trainer, "kl/target")


@KINDS
def test_the_run_starts_at_the_controllers_coefficient(kind, tmp_path):
    trainer = controlled(kind, tmp_path, max_steps=1, beta=0.5)
    trainer.train()
    assert [beta for beta, _ in trainer.seen[0]] == [0.1] * len(trainer.seen[0])


class Keeps(TrainerCallback):
    """A tracker that keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@KINDS
def test_trackers_get_target_kl_and_coefficient(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path)
    tracker = Keeps()
    trainer.add_callback(tracker)  # before ours
    trainer.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer))
    trainer.train()
    for key in ("kl/target", "kl/measured", "kl/coef"):
        assert [logs[key] for logs in tracker.logs if key in logs] == logged(trainer, key)
        assert len(logged(trainer, key)) == 5


@KINDS
@pytest.mark.parametrize("restored_by_transformers", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, restored_by_transformers, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings |= {"restore_callback_states_from_checkpoint": restored_by_transformers}
    controller = AdaptiveKL(coef=0.1, target=TARGET, horizon=40, clip=0.5)
    complete = controlled(kind, tmp_path / "run", controller, **settings)
    complete.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    resumed = controlled(kind, tmp_path / "resumed", controller, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for key in ("kl/coef", "kl", "reward"):
        assert logged(resumed, key) == logged(complete, key), key
    assert len(set(logged(resumed, "kl/coef"))) == 6 and resumed.beta == complete.beta
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["AdaptiveKLState"]
    assert kept["attributes"]["saved"]["state"]["coef"] == logged(complete, "kl/coef")[3]


def test_a_checkpoint_of_a_run_without_the_callback_can_be_resumed(tmp_path):
    before = trainer_of("grpo", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    before.train()
    trainer = controlled("grpo", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(trainer, "kl/coef")[0] == 0.1
    assert (tmp_path / "checkpoint-4").exists()


def test_another_controller_starts_afresh(tmp_path):
    controlled("grpo", tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = controlled("grpo", tmp_path, ThresholdKL(coef=0.7, target=TARGET), max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(trainer, "kl/coef")[2] == 0.7


def test_a_second_call_of_train_continues_the_controller(tmp_path):
    recorder = Recorder()
    trainer = controlled("grpo", tmp_path, recorder, max_steps=2)
    trainer.train()
    trainer.train()
    assert [episodes for _, episodes in recorder.received] == [8, 8, 8, 8]
    assert trainer.beta == pytest.approx(0.1 * 1.1**4)


@KINDS
def test_without_a_reference(kind, tmp_path):
    with pytest.raises(ConfigError, match="`beta` got 0.0.*beta=0.001"):
        controlled(kind, tmp_path, beta=0.0)


def test_a_loss_built_with_a_fixed_coefficient_is_rejected(tmp_path):
    trainer = trainer_of("grpo", tmp_path)
    trainer.liger_loss = object()
    with pytest.raises(ConfigError, match="`use_liger_kernel`.*Liger"):
        AdaptiveKLCallback(DUAL, trainer=trainer)


@pytest.mark.parametrize("controller", [0.1, None, DualKL, {"coef": 0.1}])
def test_no_controller(controller, tmp_path):
    with pytest.raises(ConfigError, match="`controller` got"):
        AdaptiveKLCallback(controller, trainer=trainer_of("grpo", tmp_path))


def test_a_state_that_cannot_be_saved(tmp_path):
    class Odd(Recorder):
        def init(self) -> Any:
            return {"coef": 0.1}

    with pytest.raises(ConfigError, match="NamedTuple"):
        AdaptiveKLCallback(Odd(), trainer=trainer_of("grpo", tmp_path))


@pytest.mark.parametrize("coef", [-1.0, math.nan, math.inf])
def test_an_invalid_coefficient_is_an_error(coef, tmp_path):
    class Odd(Recorder):
        def update(self, state: State, *, kl: float, episodes: int) -> State:
            return State(coef, 0)

    with pytest.raises(ConfigError, match="`controller` returned a coefficient of"):
        controlled("grpo", tmp_path, Odd(), max_steps=1).train()


def test_trainers_without_a_coefficient(tmp_path):
    sft = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        train_dataset=tiny.prompts().rename_column("prompt", "text"),
        processing_class=tiny.tokenizer(),
    )
    for trainer in (sft, object()):
        with pytest.raises(ConfigError, match="no KL coefficient that could be changed; it must be a GRPOTrainer"):
            AdaptiveKLCallback(DUAL, trainer=trainer)


def test_the_ppo_trainer_of_this_package_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="kl_controller='adaptive'"):
        AdaptiveKLCallback(DUAL, trainer=tiny.trainer(tmp_path))


def test_two_callbacks_or_one_of_another_trainer_are_rejected(tmp_path):
    trainer = controlled("grpo", tmp_path)
    trainer.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer))
    with pytest.raises(ConfigError, match="two AdaptiveKLCallbacks"):
        trainer.train()
    other = trainer_of("grpo", tmp_path)
    other.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer_of("grpo", tmp_path)))
    with pytest.raises(ConfigError, match="not the trainer that"):
        other.train()


def test_a_trainer_that_measures_no_kl(tmp_path):
    class Silent(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            del self._metrics["train"]["kl"]
            return loss

    trainer = trainer_of("grpo", tmp_path)
    trainer.__class__ = Silent
    trainer.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer))
    with pytest.raises(ConfigError, match="Silent, which measured no 'kl'"):
        trainer.train()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_stock_ppo(estimator, tmp_path):
    trainer = trl_ppo(tmp_path, kl_estimator=estimator)
    tracker = Keeps()
    trainer.add_callback(tracker)
    trainer.add_callback(AdaptiveKLCallback(DualKL(coef=0.2, target=0.01, lr=0.3), trainer=trainer))
    trainer.train()
    coefs, kls = logged(trainer, "kl/coef"), logged(trainer, "objective/kl")
    assert len(coefs) == 4 and coefs[0] == 0.2 and logged(trainer, "kl/measured") == kls
    for (coef, after), kl in zip(pairwise([*coefs, trainer.args.kl_coef]), kls, strict=True):
        assert after == pytest.approx(dual(coef, kl, 0.01), rel=1e-12)
    assert max(kls) > 0.01
    # the penalty that the trainer logs, −β·KL, shows which β it used
    penalties = logged(trainer, "objective/non_score_reward")
    assert [-coef * kl for coef, kl in zip(coefs, kls, strict=True)] == pytest.approx(penalties, rel=1e-4, abs=1e-7)
    for key in ("kl/target", "kl/measured", "kl/coef"):
        assert [logs[key] for logs in tracker.logs if key in logs] == logged(trainer, key)


def test_stock_ppo_keeps_the_state_in_its_checkpoints(tmp_path):
    trainer = trl_ppo(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(AdaptiveKLCallback(DUAL, trainer=trainer))
    trainer.train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    saved = json.loads(file.read_text())["stateful_callbacks"]["AdaptiveKLState"]["attributes"]["saved"]
    assert saved["state"]["coef"] == logged(trainer, "kl/coef")[2] and saved["step"] == 2


TWO_PROCESSES = """
    import json, sys
    from pathlib import Path

    from tests.trl_trainers import controlled

    for kind in ("grpo", "rloo"):
        trainer = controlled(kind, f"{sys.argv[1]}/{kind}", per_device_train_batch_size=2, max_steps=3, ddp_backend="gloo")
        trainer.train()
        assert trainer.accelerator.num_processes == 2
        used = [beta for seen in trainer.seen.values() for beta, _ in seen]
        kls = [kl for seen in trainer.seen.values() for _, kl in seen]
        out = dict(used=used, kls=kls, beta=trainer.beta)
        Path(f"{sys.argv[1]}/{kind}-rank{trainer.accelerator.process_index}.json").write_text(json.dumps(out))
"""


@pytest.mark.processes
def test_two_processes_take_the_same_coefficient(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    in_two_processes(script, str(tmp_path), cwd=tmp_path)
    for kind in TRAINERS:
        one, other = (json.loads((tmp_path / f"{kind}-rank{rank}.json").read_text()) for rank in range(2))
        assert one == other
        assert one["beta"] != 0.1
