"""The fields of transformers' and TRL's configurations that have no effect on a run of this package's PPO trainer."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

_LOADER = "the trainer reads its batches from the dataset itself, without a data loader"
_PREDICTIONS = "an evaluation samples and scores responses; it has no predictions"
_SCRIPT = "a script's switch; call trainer.train() or trainer.evaluate()"

COMPUTED = {
    "world_size": "the number of processes",
    "local_batch_size": "per_device_train_batch_size × gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size × processes",
    "batch_size": "per_device_train_batch_size × gradient_accumulation_steps × processes",
    "local_mini_batch_size": "per_device_train_batch_size × gradient_accumulation_steps / num_mini_batches",
    "mini_batch_size": "per_device_train_batch_size × gradient_accumulation_steps × processes / num_mini_batches",
    "num_total_batches": "total_episodes / (responses of an update), or max_steps",
}
"""The fields that follow from others, and how."""

WITHOUT_EFFECT = {
    # data
    "dataloader_drop_last": "rows that do not fill a batch are always left out of a pass",
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "accelerator_config": "all but `use_configured_state` is for a data loader, which the trainer does not have",
    "remove_unused_columns": "all columns of the dataset are passed to the reward functions",
    "label_names": "prompts have no labels",
    "length_column_name": "for sampling by length, which is rejected",
    "ignore_data_skip": "the prompts of an update follow from its number, so that resuming skips no data",
    # evaluation and logging
    "prediction_loss_only": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "eval_accumulation_steps": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "logging_nan_inf_filter": "metrics are logged as they are; an update whose loss is not finite is rolled back",
    "logging_dir": "transformers does not read it either; set the environment's TENSORBOARD_LOGGING_DIR",
    "skip_memory_metrics": "the memory is not measured",
    # memory and processes
    "use_cache": "sampling always uses a cache, and training never does; the field is only saved with the model",
    "fsdp_config": "for `fsdp`, which is off",
    "enable_jit_checkpoint": "the trainer saves on SIGTERM and Ctrl-C by itself",
    "local_rank": "the launcher sets it; the process is identified by the environment",
    # scripts
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "resume_from_checkpoint": "only `trustkl train` reads it; call trainer.train(resume_from_checkpoint=…)",
    "sft_model_path": "for TRL's scripts; give the trainer `model`",
    "reward_model_path": "for TRL's scripts; give the trainer `reward_funcs`",
    **{name: f"computed: {how}" for name, how in COMPUTED.items()},
}
"""Why each of them has none. Some exist only in some versions of transformers."""


def set_in_vain(args: Any) -> dict[str, str]:
    """The fields of `WITHOUT_EFFECT` that the user has set to something other than the default, with the reasons.

    Left out are values that a launcher, transformers or TRL sets, and the computed fields.
    """
    set_by_itself = {
        *COMPUTED,
        "local_rank",
        *(["do_eval"] if args.eval_strategy != "no" else []),
        *(["dataloader_pin_memory"] if args.use_cpu else []),
        *(["dataloader_multiprocessing_context"] if args.dataloader_num_workers > 1 else []),
    }
    given = {name: why for name, why in WITHOUT_EFFECT.items() if name not in set_by_itself and hasattr(args, name)}
    return {name: why for name, why in given.items() if _differs(args, name)}


def _differs(args: Any, name: str) -> bool:
    """Whether a field differs from its default."""
    value = getattr(args, name)
    if name == "accelerator_config":  # its other fields have an effect, or are rejected
        ignored = ("dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")
        return any(getattr(value, key) != getattr(AcceleratorConfig(), key) for key in ignored)
    if name == "fsdp_config" and isinstance(value, dict):  # transformers 5.0 fills it with values that mean off
        return not args.fsdp and any(value.values())
    field = next(each for each in dataclasses.fields(args) if each.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return bool(value != default)
