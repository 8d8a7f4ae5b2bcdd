"""No field of the configuration is accepted and ignored: a field changes what is observed here, or has a test that is named
here, or is rejected, or is documented as without effect."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import accelerate
import pytest
import torch
import transformers.trainer
import transformers.training_args
from accelerate.state import PartialState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import ExportableState

from tests import tiny
from tests.ppo import test_vllm_fields
from tests.watched import without_seconds
from trl_trustkl import TrustKLPPOConfig, load_records
from trl_trustkl.errors import CheckpointError, NotAvailableYetError
from trl_trustkl.ppo.unsupported import REJECTED
from trl_trustkl.trl_compat.unused_fields import WITHOUT_EFFECT

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parents[1]
FIELDS = {each.name for each in dataclasses.fields(TrustKLPPOConfig)}
OF_SOME_VERSIONS = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
    "dataloader_multiprocessing_context", "ddp_static_graph", "group_by_length", "logging_dir", "trackio_bucket_id",
    "trackio_static_space_id", "train_sampling_strategy", "warmup_ratio",
}  # fmt: skip
"""Fields that transformers 5.0 has and 5.23 has not, or the other way round."""

# -- fields with a test elsewhere --------------------------------------------------------------------------------------

TESTED = {
    # the anchor
    "kl_coef": "ppo/test_coefficients.py::test_a_fixed_coefficient_follows_the_configuration",
    "kl_estimator": "ppo/test_losses_anchor_gradients.py::test_every_anchor_gives_the_kind_of_gradient_that_the_table_says",
    "kl_estimator_kwargs": "ppo/test_losses_anchor_gradients.py::test_the_single_step_has_the_closed_forms",
    "kl_offpolicy": "ppo/test_losses_off_policy.py::"
    "test_the_token_ratio_makes_the_loss_term_that_of_the_policy_as_it_is_now",
    **dict.fromkeys(
        ["kl_controller", "kl_controller_kwargs", "kl_target", "kl_horizon"],
        "ppo/test_coefficients_in_training.py::test_the_adaptive_controller_follows_ziegler_from_the_exact_kl",
    ),
    **dict.fromkeys(
        ["sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"],
        "policy/test_renewal.py::test_the_record_says_when_and_the_kl_starts_anew",
    ),
    # the trust region
    "clip_rule": "ppo/test_attribution.py::test_a_mechanism_that_is_on_is_left_out_once",
    "clip_value": "ppo/test_attribution.py::test_clipping_the_value_counts_only_where_the_value_trains_the_policy",
    "loss_aggregation": "ppo/test_losses.py::test_the_aggregation_follows_the_rule_unless_it_is_given",
    "cliprange_high": "ppo/test_config.py::test_the_upper_clip_range_is_the_lower_one_unless_it_is_set",
    "max_grad_norm": "ppo/test_optimise.py::test_max_grad_norm_limits_the_gradient_that_is_stepped",
    **dict.fromkeys(
        ["trust_coef", "trust_controller", "trust_target", "trust_controller_kwargs"],
        "ppo/test_coefficients_in_training.py::test_the_controller_moves_the_penalty_by_the_proposed_kl",
    ),
    "trust_estimator": "ppo/test_losses_penalty.py::"
    "test_the_penalty_by_k1_makes_the_sampled_tokens_likelier_and_the_update_larger",
    "response_mask_kl": "ppo/test_response_masks.py::test_response_masks_are_recorded_and_shorten_the_update",
    "trust_stop": "ppo/test_optimise_early_stop.py::test_trust_stop_ends_the_update_after_the_step_that_went_too_far",
    "anchor_max_kl": "ppo/test_parts.py::test_the_trust_region_has_the_limits_of_the_configuration",
    "trust_max_kl": "ppo/test_parts.py::test_the_trust_region_has_the_limits_of_the_configuration",
    "trust_max_kl_token": "ppo/test_parts.py::test_the_trust_region_has_the_limits_of_the_configuration",
    "trust_max_kl_response": "ppo/test_parts.py::test_the_trust_region_has_the_limits_of_the_configuration",
    "panic_kl": "ppo/test_parts.py::test_the_trust_region_has_the_limits_of_the_configuration",
    "trust_lr_target": "ppo/test_coefficients_in_training.py::"
    "test_the_factor_is_fed_the_proposed_kl_and_not_the_enforced_one",
    # advantages and values
    "advantage_estimator": "policy/test_value_head.py::test_without_a_value_none_is_built_trained_saved_or_recorded",
    "num_generations": "rollout/test_groups.py::test_a_batch_counts_responses_and_a_pass_takes_every_prompt_once",
    "scale_rewards": "ppo/test_shaping_groups.py::test_the_anchor_is_subtracted_from_the_score_before_the_baseline",
    "whiten_rewards": "ppo/test_shaping.py::test_whitened_rewards_have_variance_1_and_keep_their_mean",
    "whiten_advantages": "ppo/test_shaping.py::test_advantages_are_whitened_over_the_tokens_that_count",
    "score_position": "ppo/test_shaping.py::test_the_score_is_placed_where_configured",
    "detach_value_head": "policy/test_value_head.py::"
    "test_the_value_loss_moves_the_policy_only_where_the_head_is_attached",
    "value_learning_rate": "ppo/test_optimise.py::test_the_value_has_a_separate_learning_rate",
    # sampling, rewards, models
    "ds3_gather_for_generation": "end_to_end/test_sharded_rollouts.py::test_engines_get_the_weights_of_all_processes",
    "local_rollout_forward_batch_size": "rollout/test_transformers_engine_in_training.py::"
    "test_prompts_are_generated_from_a_few_at_a_time",
    "vllm_importance_sampling_correction": "ppo/test_scoring_importance.py::"
    "test_an_engine_without_log_probabilities_is_named_with_the_field",
    **dict.fromkeys(
        [f"vllm_importance_sampling_{name}" for name in ("mode", "clip_max", "clip_min")],
        "ppo/test_scoring_importance.py::test_the_weights_are_those_of_the_fields_and_the_record_describes_the_ratios",
    ),
    "stop_token": "rollout/test_sampling_in_training.py::test_prompts_of_token_ids_stop_only_if_configured",
    "stop_token_id": "rollout/test_sampling_in_training.py::test_a_custom_stop_token_ends_responses",
    "missing_eos_penalty": "ppo/test_scoring.py::test_the_missing_eos_penalty_looks_for_the_stop_token",
    "chat_template_kwargs": "rollout/test_chat_template.py::test_arguments_that_are_used",
    "reward_weights": "end_to_end/test_missing_rewards.py::test_a_row_with_one_reward_of_two_keeps_that_one",
    "model_init_kwargs": "policy/test_loading.py::test_a_model_by_name_is_loaded_with_its_tokenizer",
    "model_adapter_name": "policy/test_loading.py::"
    "test_an_adapter_by_another_name_is_trained_and_an_unknown_name_is_answered_with_those_that_exist",
    "ref_adapter_name": "policy/test_reference.py::test_a_named_reference_adapter_is_used_frozen",
    **test_vllm_fields.TESTED,
    # the steps, measuring, failures
    "fp16": "ppo/test_optimise.py::test_a_step_that_the_loss_scaler_skipped_is_not_counted",
    "measure_fraction": "end_to_end/test_enforcement.py::"
    "test_without_a_limit_a_part_of_the_batch_may_be_measured_and_guarantees_nothing",
    "attribution_every": "ppo/test_attribution.py::test_only_every_nth_update_is_attributed_and_its_time_is_recorded",
    "max_refused": "end_to_end/test_rejected_updates.py::test_rejected_updates_that_are_not_in_a_row_do_not_end_a_run",
    "reward_retries": "rollout/test_scorer_retries.py::test_a_reward_function_is_retried_as_often_as_configured",
    "grace_seconds": "run/test_signals.py::"
    "test_an_update_beyond_its_grace_period_is_given_up_and_the_one_before_it_saved",
    # logging, evaluation, saving
    "output_dir": "end_to_end/test_full_disks.py::"
    "test_a_full_disk_during_a_save_ends_the_run_and_leaves_the_last_complete_checkpoint",
    **dict.fromkeys(
        ["log_completions", "num_completions_to_print"],
        "callbacks/test_completions.py::test_the_completions_are_printed_where_metrics_are_logged",
    ),
    "disable_tqdm": "callbacks/test_bound_report.py::test_when_the_table_is_printed",
    "eval_on_start": "ppo/test_loop.py::test_an_evaluation_at_the_start_comes_first_and_not_again_after_a_resume",
    "torch_empty_cache_steps": "ppo/test_loop.py::test_the_cache_is_emptied_as_often_as_configured",
    **dict.fromkeys(
        ["load_best_model_at_end", "metric_for_best_model"],
        "end_to_end/test_resume.py::test_the_best_checkpoint_is_remembered_kept_and_loaded_at_the_end",
    ),
    "greater_is_better": "ppo/test_config.py::test_a_greater_score_and_a_lower_kl_are_better",
}
"""The test that fails if a field has no effect."""


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", TESTED)
def test_the_test_of_a_field_exists(name):
    file, _, test = TESTED[name].partition("::")
    assert test in functions_in(file) and name in (TESTS / file).read_text("utf-8")


# -- fields whose effect is observed here ------------------------------------------------------------------------------

Observe = Callable[[Any, pytest.MonkeyPatch, dict[str, Any]], Any]
SHORT = {"max_steps": 1, "num_ppo_epochs": 1}


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append(("log", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(("evaluate", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("save", state.global_step))


def run(folder: Any, changes: dict[str, Any], **arguments: Any) -> Any:
    trainer = tiny.trainer(folder, changes=SHORT | changes, **arguments)
    trainer.train()
    return trainer


def events(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    watch = Events()
    run(folder, {"max_steps": 2} | changes, callbacks=[watch], eval_dataset=tiny.prompts(2))
    return watch.seen, sorted(path.name for path in folder.glob("checkpoint-*/*"))


def records(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    run(folder, {"num_ppo_epochs": 2, "max_steps": 2, "learning_rate": 0.05} | changes)
    return without_seconds(load_records(folder))


def sizes(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    trainer = tiny.trainer(folder, changes={"max_steps": -1} | changes)
    return trainer.parts.sizes, trainer.parts.order.rows(0)


def printed(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    trainer = tiny.trainer(folder, changes=SHORT | {"max_steps": 2} | changes)
    calls: list[bool] = []
    monkeypatch.setattr(trainer, "generate_completions", lambda sampling: calls.append(sampling))
    trainer.train()
    return calls


def evaluated(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    trainer = tiny.trainer(folder, changes=changes, eval_dataset=tiny.prompts(4))
    return [place for place, _ in trainer.parts.evaluator._batches(trainer.eval_dataset)]


def mapped(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """The processes that tokenize."""
    given: list[Any] = []
    real = Dataset.map
    monkeypatch.setattr(
        Dataset, "map", lambda self, *args, num_proc=None, **kw: (given.append(num_proc), real(self, *args, **kw))[1]
    )
    tiny.trainer(folder, changes=changes)
    return given


def optimizer(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """The optimizer, and the learning rates of a run."""

    class LowRank(torch.optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            options = {key: value for key, value in options.items() if key in ("lr", "betas", "eps", "weight_decay")}
            super().__init__(params, **options)

    monkeypatch.setitem(sys.modules, "apollo_torch", MagicMock(APOLLOAdamW=LowRank))
    for module in (transformers.trainer, sys.modules.get("transformers.trainer_optimizer")):
        if hasattr(module, "is_apollo_torch_available"):
            monkeypatch.setattr(module, "is_apollo_torch_available", lambda: True)
    trainer = tiny.trainer(folder, changes={"max_steps": 4} | changes)
    trainer.prepare_optimisation()
    groups = [
        ({key: value for key, value in group.items() if key != "params"}, len(group["params"]))
        for group in trainer.optimizer.param_groups
    ]
    rates = [(trainer.optimizer.step(), trainer.lr_scheduler.step(), trainer._get_learning_rate())[2] for _ in range(4)]
    return type(trainer.optimizer.optimizer).__name__, groups, rates


def wrapping(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """How models are wrapped, and the precision."""
    trainer = tiny.trainer(folder, changes=changes)
    checkpointing = [
        (module.gradient_checkpointing, str(getattr(module, "_gradient_checkpointing_func", None)).split(" at ")[0])
        for module in trainer.model.policy.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    keywords = [
        getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)
        for module in trainer.model.policy.modules()
    ]
    return str(trainer.accelerator.ddp_handler), trainer.accelerator.mixed_precision, checkpointing, keywords


def environment(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """What is set for the entire process."""
    calls: list[Any] = []
    arguments = transformers.training_args
    monkeypatch.setattr(arguments, "PartialState", lambda **given: (calls.append(given), PartialState())[1])
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(arguments, "enable_tf32", lambda on: calls.append(on))
    monkeypatch.setattr(transformers.trainer, "enable_full_determinism", lambda seed: calls.append(seed))
    monkeypatch.setattr(transformers.trainer.logging, "set_verbosity", lambda level: calls.append(level))
    tiny.trainer(folder, changes=changes)
    return calls


def second_process(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """What a process other than the main one logs at, and writes."""
    monkeypatch.setattr(TrustKLPPOConfig, "local_process_index", property(lambda self: 1))
    return tiny.config(folder, **changes).get_process_log_level()


def second_node(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """What the first process of a second node logs at, and whether it writes checkpoints."""
    monkeypatch.setattr(TrustKLPPOConfig, "local_process_index", property(lambda self: 0))
    monkeypatch.setattr(TrustKLPPOConfig, "process_index", property(lambda self: 1))
    trainer = tiny.trainer(folder, changes=changes)
    return trainer.args.get_process_log_level(), trainer._loop._new_checkpointer()._writes


def tracker(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """How trackio is called."""
    trackio = MagicMock(__version__="99.0")
    trackio.context_vars.current_space_id.get.return_value = trackio.freeze.return_value = "me/space"
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    monkeypatch.setattr(integration_utils.TrackioCallback, "_point_model_card_at_space", lambda *_: None, raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.get_trackio_space_url", lambda: None)
    run(folder, changes)
    calls = [call for call in map(str, trackio.mock_calls) if call.startswith(("call.init(", "call.freeze("))]
    return re.sub("-static-[0-9a-f]+", "-static", str(calls))


def hub(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """How the Hub is called by a run that saves twice and saves its model at the end."""
    api = MagicMock()
    api.create_repo.return_value.repo_id = "me/run"
    api.upload_folder.return_value.done.return_value = False  # the first upload takes until the end of the run
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_: api, raising=False)
    for name in ("create_repo", "upload_folder"):  # up to transformers 5.0
        monkeypatch.setattr(transformers.trainer, name, getattr(api, name), raising=False)
    run(folder, {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | changes)
    calls = [call for call in api.mock_calls if not call[0].endswith("done")]
    return str(calls).replace(str(folder), "FOLDER")


class Counter(TrainerCallback, ExportableState):
    """A callback with a state, which says how often it was built."""

    built = 0

    def __init__(self) -> None:
        Counter.built += 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {}}


def resumed(folder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Any:
    """What a checkpoint holds, and the callbacks that are built anew when a run is resumed from it."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    run(folder, saved | changes, callbacks=[Counter()])
    files = sorted(path.name for path in folder.glob("checkpoint-1/*"))
    trainer, built = tiny.trainer(folder, changes=SHORT | saved | changes, callbacks=[Counter()]), Counter.built
    with contextlib.suppress(CheckpointError):  # a checkpoint of only the model
        trainer.train(resume_from_checkpoint=True)
    return files, Counter.built - built


STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
COSINE = {"lr_scheduler_type": "cosine_with_restarts"}
GPU = {"use_cpu": False}  # of which there is none: as `use_cpu`, but transformers decides
PUSH = {"push_to_hub": True}
TRACKED = {"report_to": "trackio"}

OBSERVED: dict[str, tuple[Observe, dict[str, Any], Any]] = {
    # the mechanisms
    "kl_placement": (records, {"kl_estimator": "exact", "kl_coef": 1.0}, "both"),
    "cliprange": (records, {}, 1e-3),
    "clip_kwargs": (records, {"clip_rule": "dppo_tv"}, {"delta": 1e-4}),
    "cliprange_value": (records, {}, 1e-4),
    "gamma": (records, {}, 0.5),
    "lam": (records, {}, 0.5),
    "vf_coef": (records, {"detach_value_head": False}, 10.0),
    "num_ppo_epochs": (records, {}, 3),
    "num_mini_batches": (records, {}, 1),
    "response_length": (records, {}, 3),
    "temperature": (records, {}, 0.5),
    "generation_kwargs": (records, {}, {"top_k": 3}),
    "learning_rate": (records, {}, 0.01),
    "seed": (records, {"data_seed": 1}, 7),
    # the length of a run, and its data
    "per_device_train_batch_size": (sizes, {}, 2),
    "gradient_accumulation_steps": (sizes, {}, 1),
    "num_train_epochs": (sizes, {}, 7.0),
    "total_episodes": (sizes, {}, 80),
    "max_steps": (sizes, {}, 5),
    "data_seed": (sizes, {}, 7),
    "dataset_num_proc": (mapped, {}, 2),
    "per_device_eval_batch_size": (evaluated, {}, 1),
    # the optimizer and the schedule
    "optim": (optimizer, {}, "sgd"),
    "optim_args": (optimizer, {"optim": "apollo_adamw", "optim_target_modules": ["q_proj"]}, "rank=4"),
    "optim_target_modules": (optimizer, {"optim": "apollo_adamw", "optim_target_modules": ["q_proj"]}, "all-linear"),
    "weight_decay": (optimizer, {}, 0.1),
    "adam_beta1": (optimizer, {}, 0.5),
    "adam_beta2": (optimizer, {}, 0.5),
    "adam_epsilon": (optimizer, {}, 1e-3),
    "lr_scheduler_type": (optimizer, {}, "cosine"),
    "lr_scheduler_kwargs": (optimizer, COSINE, {"num_cycles": 3}),
    "warmup_steps": (optimizer, {}, 2),
    "warmup_ratio": (optimizer, {}, 0.5),
    # memory, processes and hardware
    "bf16": (wrapping, {}, True),
    "gradient_checkpointing": (wrapping, {}, True),
    "gradient_checkpointing_kwargs": (wrapping, {"gradient_checkpointing": True}, {"use_reentrant": True}),
    "activation_checkpointing": (wrapping, {}, True),
    "activation_checkpointing_kwargs": (wrapping, {"activation_checkpointing": True}, {"use_reentrant": True}),
    "ddp_find_unused_parameters": (wrapping, {}, False),
    "ddp_bucket_cap_mb": (wrapping, {}, 3),
    "ddp_broadcast_buffers": (wrapping, {}, False),
    "ddp_static_graph": (wrapping, {}, True),
    "ddp_backend": (environment, {}, "gloo"),
    "ddp_timeout": (environment, GPU, 7),
    "use_cpu": (environment, GPU, True),
    "tf32": (environment, {}, True),
    "full_determinism": (environment, {}, True),
    # logging, evaluation, saving
    "log_level": (environment, {}, "error"),
    "log_level_replica": (second_process, {}, "error"),
    "log_on_each_node": (second_node, {"log_level": "error"}, False),
    "logging_strategy": (events, {}, "no"),
    "logging_steps": (events, {}, 2),
    "logging_first_step": (events, {"logging_steps": 2}, True),
    "eval_strategy": (events, {}, "epoch"),
    "eval_steps": (events, STEPS, 2),
    "eval_delay": (events, STEPS, 2),
    "num_sample_generations": (printed, {}, 2),
    "save_strategy": (events, {}, "epoch"),
    "save_steps": (events, STEPS, 2),
    "save_total_limit": (events, STEPS, 1),
    "save_only_model": (resumed, {}, True),
    "save_on_each_node": (second_node, {}, True),
    "restore_callback_states_from_checkpoint": (resumed, {}, True),
    # trackers and the Hub
    "report_to": (tracker, {}, "trackio"),
    "run_name": (tracker, TRACKED, "a run"),
    "project": (tracker, TRACKED, "a project"),
    "trackio_space_id": (tracker, TRACKED, "me/space"),
    "trackio_bucket_id": (tracker, TRACKED, "me/bucket"),
    "trackio_static_space_id": (tracker, TRACKED | {"trackio_space_id": "me/space"}, "me/static"),
    "push_to_hub": (hub, {}, True),
    "hub_model_id": (hub, PUSH, "me/other"),
    "hub_token": (hub, PUSH, "secret"),
    "hub_private_repo": (hub, PUSH, True),
    "hub_strategy": (hub, PUSH, "end"),
    "hub_always_push": (hub, PUSH, True),
    "hub_revision": (hub, PUSH, "branch"),
}
"""What is observed, the other fields that are set, and a value that changes what is observed."""


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Callable[[Observe, dict[str, Any]], Any]:
    """What is observed without the field that is tested, after a check that it is observed again."""
    known: dict[str, Any] = {}

    def observed(observe: Observe, others: dict[str, Any]) -> Any:
        if (key := f"{observe.__name__} {others}") not in known:
            one, again = (seen(observe, others, tmp_path_factory.mktemp("without")) for _ in range(2))
            assert one == again
            known[key] = one
        return known[key]

    return observed


def seen(observe: Observe, changes: dict[str, Any], folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        return observe(folder / "run", patch, changes)


@pytest.mark.parametrize("name", OBSERVED)
def test_a_field_has_an_effect(tmp_path, without, name):
    if name in OF_SOME_VERSIONS - FIELDS:
        pytest.skip("another version of transformers has it")
    observe, others, value = OBSERVED[name]
    assert seen(observe, others | {name: value}, tmp_path) != without(observe, others)


# -- fields that are rejected ------------------------------------------------------------------------------------------

ASKING = {
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "auto_find_batch_size": True,
    "train_sampling_strategy": "sequential",
    "group_by_length": True,
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "include_num_input_tokens_seen": "all",
    "debug": "underflow_overflow",
    "fsdp": "full_shard",
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": getattr(accelerate, "ParallelismConfig", dict)(
        dp_replicate_size=2
    ),  # accelerate 1.4 has none
}


@pytest.mark.parametrize("name", ASKING)
def test_a_field_that_asks_for_what_is_not_done_is_rejected(tmp_path, name):
    if name in OF_SOME_VERSIONS - FIELDS:
        pytest.skip("another version of transformers has it")
    with pytest.raises(NotAvailableYetError) as error:
        tiny.config(tmp_path, **{name: ASKING[name]})
    assert name in str(error.value).lower()


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_field_is_in_exactly_one_of_these_places():
    assert REJECTED.keys() | {"fsdp", "deepspeed"} == ASKING.keys()
    places = (TESTED, OBSERVED, ASKING, WITHOUT_EFFECT)
    counts = {name: sum(name in place for place in places) for name in FIELDS.union(*places)}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert counts.keys() - OF_SOME_VERSIONS == FIELDS - OF_SOME_VERSIONS
