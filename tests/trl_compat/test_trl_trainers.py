"""What the callbacks rely on beyond the documented interface of TRL's trainers and of transformers, as installed."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict

import pytest
from transformers import Trainer, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.training_args import OptimizerNames
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from trl_trustkl.trl_compat.trl_trainers import steps_in_backward

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])


def source(thing: object) -> str:
    return inspect.getsource(thing)


@BOTH
def test_metrics_are_lists_by_mode_pooled_and_cleared_at_a_log(trainer):
    assert '_metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source(trainer.__init__)
    log = source(trainer.log)
    # the dict is cleared, so that the next value goes to a new list; before that, the average over the list is logged
    assert "self._metrics[mode].clear()" in log and "sum(valid) / len(valid)" in log
    assert log.index("super().log(") < log.index(".clear()")
    metrics = {"train": defaultdict(list)}
    metrics["train"]["kl"].append(1.0)
    before = metrics["train"]["kl"]
    metrics["train"].clear()
    assert metrics["train"]["kl"] is not before and before == [1.0]


def test_the_kl_of_grpo_is_a_token_mean_of_k3_at_every_micro_step():
    loss = source(GRPOTrainer._compute_loss)
    assert 'self._metrics[mode]["kl"].append(global_masked_mean(per_token_kl))' in loss
    k3 = r"torch\.exp\(ref_per_token_logps - per_token_logps\) - \(ref_per_token_logps - per_token_logps\) - 1"
    assert re.search(k3, loss)
    assert 'reduce(torch.stack([local_sum, local_count]), reduction="sum")' in loss, (
        "the KL is no longer reduced over processes"
    )
    assert re.search(r"use_bias_correction_kl:\s+per_token_kl = per_token_kl \* coef_1", loss)


def test_the_kl_of_rloo_is_a_token_mean_of_k1_at_every_generation():
    generate = source(RLOOTrainer._generate_and_score_completions)
    assert "per_token_kl = old_per_token_logps - ref_per_token_logps" in generate
    reduced = (
        r"\[\(per_token_kl \* completion_mask\)\.sum\(\), completion_mask\.sum\(\)\.float\(\)\]\), reduction=\"sum\""
    )
    assert re.search(reduced, generate)
    assert 'self._metrics[mode]["kl"].append((kl_stats[0] / kl_stats[1].clamp(min=1.0)).item())' in generate
    assert '["kl"]' not in source(RLOOTrainer._compute_loss)
    assert "rewards = rewards - self.beta * kl" in generate


@BOTH
def test_beta_is_read_when_it_is_used(trainer):
    """If a trainer copied the coefficient at construction, changing `beta` would have no effect."""
    code = source(trainer)
    assert "self.beta = args.beta" in code
    # In TRL 1.12 only Liger's loss is built with it, under the attribute that the callback checks.
    for copy in re.finditer(r"\w+\((?=\s*beta=self\.beta)", code):
        assert code[: copy.start()].rstrip().endswith("self.liger_loss ="), "another loss has the coefficient built in"
    assert len(re.findall(r"self\.args\.beta\b", code)) == 0


@BOTH
def test_without_beta_there_is_no_reference(trainer):
    assert re.search(r"if self\.beta == 0\.0:\s+#[^\n]*\n\s+self\.ref_model = None", source(trainer.__init__))


def test_steps_end_before_they_are_logged_and_saved():
    loop = source(Trainer)
    end = loop.index("self.callback_handler.on_step_end(")
    assert loop.index("self.state.global_step += 1") < end < loop.index("self._maybe_log_save_evaluate(", end)


def test_states_of_callbacks_in_checkpoints():
    assert "self.state.stateful_callbacks[cb_name] = cb_state" in source(Trainer._save_checkpoint)
    loaded = TrainerState(stateful_callbacks={"AdaptiveKLState": {"args": {}, "attributes": {"saved": {}}}})
    assert loaded.stateful_callbacks == {"AdaptiveKLState": {"args": {}, "attributes": {"saved": {}}}}
    # rebuilt from only the checkpoint, which is why the state is a separate callback
    assert "type(callback)(**args)" in source(Trainer._load_callback_state)


def test_callbacks_run_in_the_order_of_a_list():
    assert "self.callbacks = []" in source(CallbackHandler.__init__)
    assert "for callback in self.callbacks:" in source(CallbackHandler.call_event)


def test_training_logs_have_a_loss_and_a_learning_rate():
    report = source(Trainer._maybe_log_save_evaluate)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert f'logs["{key}"]' in report


@BOTH
def test_the_names_that_records_are_made_from(trainer):
    code = source(trainer)
    for key in ("reward", "entropy", "kl", "completions/mean_length", "completions/clipped_ratio", "step_time"):
        assert f'["{key}"].append(' in code, key
    for key in ("low_mean", "high_mean", "region_mean"):
        assert f'["clip_ratio/{key}"].append(' in code, key


def test_stock_ppo_logs_once_an_update_and_clips_no_gradient():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer").PPOTrainer
    train = source(ppo.train)
    assert train.count("self.log(metrics)") == 1
    assert train.index("self.state.global_step += 1") < train.index("self.log(metrics)")
    assert "-args.kl_coef * kl" in train and "kl.sum(1).mean()" in train
    assert "max_grad_norm" not in source(ppo) and "clip_grad" not in source(ppo)
    keys = ("objective/kl", "objective/scores", "policy/clipfrac_avg", "policy/entropy_avg", "val/clipfrac_avg", "lr")
    assert all(f'metrics["{key}"]' in train for key in keys)


def test_the_optimizers_that_step_within_the_backward_pass(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    found = {name.value for name in OptimizerNames if steps_in_backward(GRPOConfig(optim=name.value, **common))}
    layerwise = {
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "apollo_adamw_layerwise",
    }
    assert found == {"lomo", "adalomo"} | layerwise
