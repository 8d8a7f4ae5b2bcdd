"""The rollout engine that samples with a vLLM server."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import ConfigError, ModelError, RolloutError
from ..run.signals import Overdue, StopRequest
from .engine import FinishReason, Samples
from .vllm_client import BadRequest, VLLMServer
from .vllm_colocate import check_context
from .vllm_model import VLLMModel
from .vllm_options import VLLMSampling
from .vllm_transfer import Transfer

logger = logging.get_logger(__name__)

CONCURRENT = 256
"""Requests at a time of one process; the server batches them."""
_POLL = 0.5
_NOT_FINITE = "Out of range float values"
"""vLLM's answer where a log-probability is NaN, which JSON cannot hold."""


class VLLMServerEngine:
    """Samples with a vLLM server, `trl vllm-serve`, to which the main process sends the weights.

    TRL's client is used to send weights from GPU to GPU. It is not used for sampling: it gives all responses one seed, and its
    requests have no time-out. Every request here has one.

    Args:
        transfer: how weights get to the server. sends: whether this is the process that sends them. stop: a signal ends waiting
            for responses when its grace period is over.
    """

    def __init__(
        self,
        server: VLLMServer,
        transfer: Transfer,
        model: VLLMModel,
        sampling: VLLMSampling,
        *,
        sends: bool,
        stop: StopRequest,
    ) -> None:
        self._server = server
        self._transfer = transfer
        self._model = model
        self._sampling = sampling
        self._sends = sends
        self._stop = stop
        self._context: int | None = None
        self._checked = False
        self._version: int | None = None
        self._label: str | None = None
        self._name = uuid.uuid4().hex  # tells this run's weights from another's

    def check(self) -> None:
        """Wait for the server, then check what it serves."""
        self._server.wait_until_ready()
        found = self._server.model()
        served, own = {found["id"], found["root"]}, self._model.name
        if not self._model.quantized and own.rstrip("/").split("/")[-1] not in {
            str(name).rstrip("/").split("/")[-1] for name in served
        }:
            raise ModelError(
                f"the vLLM server at {self._server.url} serves {found['root']!r}, and the policy is {own!r}; serve its base "
                f"model: trl vllm-serve --model {own}."
            )
        self._context = found["max_model_len"]
        if self._context is not None and self._context <= self._sampling.length:
            raise ConfigError(
                f"`response_length` got {self._sampling.length}; the vLLM server at {self._server.url} has a context of "
                f"{self._context} tokens for prompt and response: start it with a larger --max_model_len."
            )
        config = self._server.config()["model_config"]
        if str(config["dtype"]) not in (self._model.dtype_name, str(self._model.dtype)):
            raise ModelError(
                f"the vLLM server at {self._server.url} computes in {config['dtype']}, and the trainer in "
                f"{self._model.dtype_name}; start it with --dtype {self._model.dtype_name}."
            )
        if config["logprobs_mode"] != "processed_logprobs":
            raise ConfigError(
                f"the vLLM server at {self._server.url} returns {config['logprobs_mode']}, which are not those of the "
                "distribution that it samples from; start it with --logprobs-mode processed_logprobs, as `trl vllm-serve` does."
            )
        if not self._server.has_token(self._model.vocabulary - 1) or self._server.has_token(self._model.vocabulary):
            raise ModelError(
                f"the vLLM server at {self._server.url} serves a model whose vocabulary is not the policy's, which has "
                f"{self._model.vocabulary} tokens; serve the policy's base model: trl vllm-serve --model {own}."
            )
        if self._sends:
            self._transfer.check(self._server)
        self._checked = True

    def sync(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Send the weights, from the main process; again, if the server was restarted since."""
        if not self._checked:  # an evaluation outside of a run
            self.check()
        if not self._sends:
            return
        if version == self._version:
            if not self._restarted():
                return
            logger.warning(f"The vLLM server at {self._server.url} was restarted; the weights are sent again.")
            self._transfer.close()
        self._version = None
        self._transfer.send(self._server, ((name, weight.to(self._model.dtype)) for name, weight in weights))
        self._server.reset_prefix_cache()
        self._label = f"{self._name}:{version}"
        self._server.label_weights(self._label)
        self._version = version

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        """One request for each response, which alone can have a seed."""
        prompts = [ids.tolist() for ids in prompt_ids]
        if self._context is not None:
            check_context(
                prompts, self._sampling.length, self._context, "start the server with a larger --max_model_len, "
            )
        deadline = time.monotonic() + self._server.timeout
        pool = ThreadPoolExecutor(min(CONCURRENT, max(1, len(prompts))))
        try:
            futures = [pool.submit(self._one, ids, seed) for ids, seed in zip(prompts, seeds, strict=True)]
            self._await(futures, deadline)
            rows = [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self._sends and self._restarted():
            raise RolloutError(
                f"the vLLM server at {self._server.url} was restarted while it sampled, so that it had other weights than the "
                "policy; go on with train(resume_from_checkpoint=True)."
            )
        ids, logps, reasons = zip(*rows, strict=True)
        return Samples(list(ids), list(logps), list(reasons))

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._server.close()
        self._transfer.close()
        self._version, self._checked = None, False

    def _await(self, futures: Sequence[Future[Any]], deadline: float) -> None:
        """Wait for the responses, until one fails, the time is over, or a signal's grace period is."""
        waiting: set[Future[Any]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                return
            if self._stop.overdue:
                raise Overdue
            if waiting and time.monotonic() > deadline:
                raise RolloutError(
                    f"the vLLM server at {self._server.url} has not answered {len(waiting)} of {len(futures)} requests within "
                    f"vllm_server_timeout={self._server.timeout:g} seconds. Look at its log; if it is only slow, set "
                    "vllm_server_timeout higher."
                )

    def _one(self, prompt: list[int], seed: int) -> tuple[Tensor, Tensor, FinishReason]:
        """One response: its tokens, their log-probabilities, and why it ended."""
        try:
            found = self._server.complete(prompt, self._sampling.parameters(seed))
        except BadRequest as error:
            if _NOT_FINITE not in str(error):
                raise
            return torch.zeros(1, dtype=torch.long), torch.full((1,), math.nan), "length"
        logps = [math.nan if each is None else each for each in found["logprobs"]["token_logprobs"]]
        ids = torch.tensor(found["token_ids"], dtype=torch.long)
        return ids, torch.tensor(logps), "stop" if found["finish_reason"] == "stop" else "length"

    def _restarted(self) -> bool:
        """Whether the server has other weights than this run has sent; False where the server cannot tell."""
        return self._server.weights_label() not in (self._label, None)
