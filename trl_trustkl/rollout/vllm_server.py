"""The rollout engine that samples with a vLLM server."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import ConfigError, ModelError, RolloutError
from ..run.signals import Overdue, StopRequest
from .engine import FinishReason, Samples
from .vllm_client import VLLMServer
from .vllm_colocate import check_context, finish_reason
from .vllm_model import VLLMModel
from .vllm_options import VLLMSampling
from .vllm_transfer import Transfer

logger = logging.get_logger(__name__)


class VLLMServerEngine:
    """Samples with a vLLM server, `trl vllm-serve`, to which the main process sends the weights.

    TRL's client is used to send weights from GPU to GPU. It is not used for sampling: it gives all responses one seed, and its
    requests have no time-out. Every request here has one.

    Args:
        transfer: how weights get to the server. sends: whether this is the process that sends them. stop: a signal, which ends
            sending when its grace period is over.
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
                f"`model` got {own!r}, and the vLLM server at {self._server.url} serves {found['root']!r}; serve the policy's "
                f"base model: trl vllm-serve --model {own}."
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
        if self._label is not None and self._server.weights_label() not in (self._label, None):
            logger.warning(
                f"the vLLM server at {self._server.url} was restarted, or got weights of another run; the policy's are sent "
                "again."
            )
            self.close()
        if not self._checked:  # an evaluation outside of a run, or another server
            self.check()
        if not self._sends or version == self._version:
            return
        self._version = None
        self._transfer.send(self._server, self._converted(weights))
        self._server.reset_prefix_cache()
        self._label = f"{self._name}:{version}"
        self._server.label_weights(self._label)
        self._version = version

    def _converted(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if self._stop.overdue:
                raise Overdue
            yield name, weight.to(self._model.dtype)

    def generate(self, prompt_ids: Sequence[Tensor], seeds: Sequence[int]) -> Samples:
        """One request for each response, which alone can have a seed."""
        prompts = [ids.tolist() for ids in prompt_ids]
        if self._context is not None:
            check_context(
                prompts, self._sampling.length, self._context, "start the server with a larger --max_model_len, "
            )
        label = self._label if self._sends else self._server.weights_label()
        found = self._server.complete(prompts, [self._sampling.parameters(seed) for seed in seeds])
        if self._server.weights_label() not in (label, None):
            raise RolloutError(
                f"the vLLM server at {self._server.url} was restarted while it sampled, or got weights of another run, so that "
                "the responses are not the policy's. Use a separate server for each run, and resume with "
                "train(resume_from_checkpoint=True)."
            )
        rows = [_sample(each) for each in found]
        return Samples([ids for ids, _, _ in rows], [logps for _, logps, _ in rows], [reason for _, _, reason in rows])

    def close(self) -> None:
        """Release what is held between two rollouts; the server goes on."""
        self._transfer.close()
        self._version, self._label, self._checked = None, None, False


def _sample(choice: dict[str, Any] | None) -> tuple[Tensor, Tensor, FinishReason]:
    """A response: its tokens, their log-probabilities, and why it ended. None: one token of NaN, which rejects the update."""
    if choice is None:
        return torch.zeros(1, dtype=torch.long), torch.full((1,), math.nan), "length"
    logps = [math.nan if each is None else each for each in choice["logprobs"]["token_logprobs"]]
    ids = torch.tensor(choice["token_ids"], dtype=torch.long)
    return ids, torch.tensor(logps, dtype=torch.float32), finish_reason(choice.get("finish_reason"))
