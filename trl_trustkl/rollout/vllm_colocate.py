"""The rollout engine that runs vLLM in the training process, on the same device."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import ConfigError, ModelError, RolloutError, TrustKLError
from ..parallel.processes import Processes
from ..run import rng
from .engine import FinishReason, Samples
from .vllm_model import VLLMModel
from .vllm_options import VLLMSampling

logger = logging.get_logger(__name__)

PROMPT_TOKENS = 4096
"""The prompt tokens that vLLM may compute at once on a GPU, as in TRL: its memory profiler is misled by the default."""


class ColocatedVLLMEngine:
    """Samples with a vLLM in this process. It is built when it is first needed, and after `close` again.

    TRL's VLLMGeneration is not used: it gives all responses one seed, loads the weights in the dtype of their files, and merges
    the adapter into the live policy.

    Args:
        memory: share of the device's memory. context: context length in tokens; None: the model's.
        tensor_parallel: processes that share one vLLM. sleeps: whether its memory is released between rollouts.
    """

    def __init__(
        self,
        model: VLLMModel,
        sampling: VLLMSampling,
        processes: Processes,
        *,
        memory: float,
        context: int | None,
        tensor_parallel: int,
        sleeps: bool,
        implementation: str,
    ) -> None:
        require_vllm()
        if processes.count % tensor_parallel:
            raise ConfigError(
                f"`vllm_tensor_parallel_size` got {tensor_parallel}; it must divide the number of processes, {processes.count}."
            )
        if sleeps and processes.device.type == "cpu":
            raise ConfigError("`vllm_enable_sleep_mode` got True on a CPU, where vLLM has no sleep mode; leave it out.")
        self._model = model
        self._sampling = sampling
        self._processes = processes
        self._sleeps = sleeps
        self._group_size = tensor_parallel
        self._options = {
            "gpu_memory_utilization": memory, "max_model_len": context, "tensor_parallel_size": tensor_parallel,
            "enable_sleep_mode": sleeps, "model_impl": implementation,
        }  # fmt: skip
        self._llm: Any = None
        self._group: Any = None
        self._version: int | None = None
        self._asleep = False

    def check(self) -> None:
        """Start vLLM, and check that it has loaded a model of the policy's shape."""
        llm = self._started()
        config = llm.llm_engine.model_config
        if config.get_vocab_size() != self._model.vocabulary:
            raise ModelError(
                f"`model` has {self._model.vocabulary} tokens, and its files in {self._model.name!r}, which vLLM loads, have "
                f"{config.get_vocab_size()}; save the model with its new embeddings, and load it from there."
            )
        if config.max_model_len <= self._sampling.length:
            raise ConfigError(
                f"`vllm_max_model_length` leaves vLLM a context of {config.max_model_len} tokens; it must be more than "
                f"response_length, which is {self._sampling.length}."
            )

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load the weights in place. vLLM is discarded if that fails halfway."""
        if version == self._version:
            return
        llm = self._started()
        with self._closing("could not load the policy's weights"):
            self._wake()
            cast = ((name, weight.to(self._model.dtype)) for name, weight in weights)
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
            llm.reset_prefix_cache()
        self._version = version

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        """Sample for all prompts at once; vLLM batches them continuously."""
        rows = [(ids.tolist(), seed) for ids, seed in zip(prompt_ids, seeds, strict=True)]
        mine = slice(0, len(rows))
        if self._group_size > 1:  # the processes of a group run one vLLM in step, each for the prompts of all of them
            parts: list[Any] = [None] * self._group_size
            torch.distributed.all_gather_object(parts, rows, group=self._group)
            first = sum(map(len, parts[: self._processes.index % self._group_size]))
            rows, mine = [row for part in parts for row in part], slice(first, first + len(rows))
        context = self._llm.llm_engine.model_config.max_model_len
        check_context([ids for ids, _ in rows], self._sampling.length, context, "set vllm_max_model_length higher, ")
        from vllm import SamplingParams

        params = [SamplingParams(**self._sampling.parameters(seed)) for _, seed in rows]
        with self._closing("failed while it sampled"):
            self._wake()
            outputs = self._llm.generate([{"prompt_token_ids": ids} for ids, _ in rows], params, use_tqdm=False)
            if self._sleeps:
                self._llm.sleep(level=1)  # which keeps the weights, for an evaluation has several batches
                self._asleep = True
        return as_samples([output.outputs[0] for output in outputs[mine]])

    def close(self) -> None:
        """Stop vLLM and release its memory."""
        if self._llm is None:
            return
        from vllm.distributed import parallel_state

        llm, self._llm, self._version, self._asleep = self._llm, None, None, False
        llm.llm_engine.engine_core.shutdown()
        del llm
        parallel_state.destroy_model_parallel()
        if self._processes.count == 1:  # otherwise the process group is that of the training
            parallel_state.destroy_distributed_environment()
        gc.collect()
        if self._processes.device.type != "cpu":
            torch.cuda.empty_cache()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _started(self) -> Any:
        if self._llm is None:
            # vLLM seeds the random states of the process, which reward functions and callbacks use.
            with rng.unchanged(), _environment(self._processes):
                self._llm = self._new()
        return self._llm

    def _new(self) -> Any:
        from vllm import LLM

        on_cpu = self._processes.device.type == "cpu"
        if self._group_size > 1 and self._group is None:
            first = range(0, self._processes.count, self._group_size)
            groups = [list(range(start, start + self._group_size)) for start in first]
            self._group, _ = torch.distributed.new_subgroups_by_enumeration(groups)
        plain = {"hf_overrides": {"quantization_config": None}, "load_format": "dummy"} if self._model.quantized else {}
        try:
            return LLM(
                model=self._model.name, dtype=self._model.dtype_name, **self._options, **self._model.init_kwargs, **plain,
                distributed_executor_backend="uni" if self._processes.count == 1 else "external_launcher",
                seed=self._processes.index // self._group_size,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # nothing of the model's generation config
                enforce_eager=on_cpu,  # compiling takes minutes there
                # A prompt that is computed in parts needs an offset of its random numbers, which a CPU's have not.
                max_num_batched_tokens=2**15 if on_cpu else PROMPT_TOKENS,
            )  # fmt: skip
        except Exception as error:
            raise ModelError(
                f"vLLM could not load {self._model.name!r} in {self._model.dtype_name}: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def _closing(self, failure: str) -> Iterator[None]:
        """Discard vLLM after an error or an interrupt, which may leave it in a state that is not usable."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, TrustKLError) or not isinstance(error, Exception):
                raise
            raise RolloutError(f"vLLM {failure}: {type(error).__name__}: {error}") from error


def require_vllm() -> None:
    """Raise ConfigError if vLLM is not installed."""
    try:
        import vllm  # noqa: F401
    except Exception as error:  # a package that it needs may not fit to another
        raise ConfigError(
            f"`use_vllm` got True, and vLLM cannot be imported ({type(error).__name__}: {error}). Install it: pip install "
            "'trl[vllm]'; for a CPU see docs/vllm.md."
        ) from error


@contextmanager
def _environment(processes: Processes) -> Iterator[None]:
    """The variables that vLLM reads while it starts, of which those that were set before are restored afterwards."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # weights are passed in memory, so the engine runs in this process
    if processes.count > 1:
        wanted |= {"RANK": str(processes.index), "WORLD_SIZE": str(processes.count)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_context(prompts: Sequence[Sequence[int]], length: int, context: int, fix: str) -> None:
    """Raise RolloutError for a prompt that leaves no room for a response; vLLM's own check passes some that do not."""
    longest = max(map(len, prompts), default=0)
    if longest + length > context:
        raise RolloutError(
            f"a prompt has {longest} tokens; with response_length={length} that is more than vLLM's context of {context}: "
            f"{fix}shorten the prompt, or lower response_length."
        )


def as_samples(outputs: Sequence[Any]) -> Samples:
    """vLLM's outputs as samples. A log-probability that is missing is NaN, which rejects the update."""
    ids = [torch.tensor(list(output.token_ids), dtype=torch.long) for output in outputs]
    logps = [torch.tensor(list(map(_logp, output.token_ids, output.logprobs))) for output in outputs]
    return Samples(ids, logps, [finish_reason(output.finish_reason) for output in outputs])


def finish_reason(reason: Any) -> FinishReason:
    """vLLM's reason why a response ended. Raises RolloutError if it was aborted, as by a server that shuts down."""
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise RolloutError(
        f"vLLM ended a response with the finish reason {reason!r}; it must be 'stop' or 'length'. The response is not "
        "complete; see vLLM's log."
    )


def _logp(token: int, entries: Any) -> float:
    return entries[token].logprob if token in entries else math.nan
