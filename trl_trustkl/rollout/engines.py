"""The rollout engine of a run: the user's, vLLM, or transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ConfigError
from ..parallel.processes import Processes
from ..parallel.sharding import Replicated
from ..run.signals import StopRequest
from .engine import RolloutEngine
from .transformers_engine import TransformersEngine
from .vllm_client import VLLMServer
from .vllm_colocate import ColocatedVLLMEngine
from .vllm_model import vllm_model
from .vllm_options import VLLMSampling
from .vllm_server import VLLMServerEngine
from .vllm_transfer import transfer_for

logger = logging.get_logger(__name__)


def build_engine(
    args: Any,
    policy: PreTrainedModel | PeftModel,
    given: RolloutEngine | None,
    *,
    stop_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: StopRequest,
    sharding: Replicated,
) -> RolloutEngine:
    """The engine that `args` describe, or the user's if one is `given`."""
    if given is not None:
        reject_ignored(args)
        return given
    options = args.arguments("generation_kwargs")
    if not args.use_vllm:
        complete = args.ds3_gather_for_generation or not sharding.shards_weights
        if complete and not args.ds3_gather_for_generation:
            logger.warning(
                "`ds3_gather_for_generation` got False and has no effect: each process has all weights; only FSDP2 and ZeRO-3 "
                "shard them."
            )
        return TransformersEngine(
            policy, response_length=args.response_length, temperature=args.temperature, stop_ids=stop_ids,
            pad_token_id=tokenizer.pad_token_id, batch_size=args.local_rollout_forward_batch_size, autocast=autocast,
            generation_kwargs=options, tokenizer=tokenizer, run=sharding.gathered if complete else sharding.run,
            complete=complete, capture=not sharding.shards_weights,
        )  # fmt: skip
    model = vllm_model(policy, args)
    sampling = VLLMSampling(args.response_length, args.temperature, stop_ids, options)
    if args.vllm_mode == "server":
        return VLLMServerEngine(
            VLLMServer(args.vllm_server_url, args.vllm_server_timeout, stop),
            transfer_for(processes.device, args.vllm_group_port),
            model, sampling, sends=processes.is_main, stop=stop,
        )  # fmt: skip
    return ColocatedVLLMEngine(
        model, sampling, processes, memory=args.vllm_gpu_memory_utilization, context=args.vllm_max_model_length,
        tensor_parallel=args.vllm_tensor_parallel_size, sleeps=args.vllm_enable_sleep_mode,
        implementation=args.vllm_model_impl,
    )  # fmt: skip


def corrects(args: Any, engine: RolloutEngine) -> bool:
    """Whether the loss is weighted for the difference between sampler and training pass, which `generate` in the training
    process does not need."""
    return args.vllm_importance_sampling_correction and is_other(engine)


def is_other(engine: RolloutEngine) -> bool:
    """Whether something else than the policy's forward pass in the training process samples."""
    return not isinstance(engine, TransformersEngine)


def reject_ignored(args: Any) -> None:
    """Raise ConfigError for a field that the user's engine would ignore."""
    fields = {name: args.__dataclass_fields__[name].default for name in _OF_OUR_ENGINES}
    for name, default in fields.items():
        if (value := getattr(args, name)) != default:
            raise ConfigError(
                f"`{name}` got {value!r} together with the trainer's `rollout_engine`, which ignores it; leave one of them out."
            )


_OF_OUR_ENGINES = ("use_vllm", "generation_kwargs", "local_rollout_forward_batch_size", "ds3_gather_for_generation")
