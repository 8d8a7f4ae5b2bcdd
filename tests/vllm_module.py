"""A stand-in for the package vLLM: an `LLM` that samples with a tiny model, and keeps its arguments and calls."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import tiny
from tests.vllm_server import loaded, sampled

PARAMETERS = {
    "max_tokens", "temperature", "stop_token_ids", "ignore_eos", "logprobs", "seed", "top_k", "top_p", "min_p", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", "allowed_token_ids", "stop",
}  # fmt: skip
"""Of vLLM's SamplingParams, which rejects any other name."""


class LLM:
    """vocabulary, context: of the model that it says to serve. failing: the name of a method, and the error that it raises."""

    vocabulary, context = tiny.VOCAB, 128
    failing: tuple[str, BaseException] | None = None
    built: list[LLM]

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.environment = {
            name: os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "WORLD_SIZE")
        }
        self.calls: list[Any] = []
        self.built.append(self)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        self._call("start")
        self.model = loaded(Path(arguments["model"]))
        config = SimpleNamespace(get_vocab_size=lambda: self.vocabulary, max_model_len=self.context)
        core = SimpleNamespace(shutdown=lambda: self._call("shutdown"))
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=core)

    def _call(self, name: str, *about: Any) -> None:
        self.calls.append((name, *about) if about else name)
        if self.failing is not None and self.failing[0] == name:
            raise self.failing[1]

    def collective_rpc(self, method: str, kwargs: dict[str, Iterator[tuple[str, Tensor]]]) -> None:
        assert method == "reload_weights"
        self.weights = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}
        self.model.load_state_dict(self.weights)
        self._call("reload")

    def reset_prefix_cache(self) -> None:
        self._call("reset")

    def wake_up(self) -> None:
        self._call("wake")

    def sleep(self, level: int) -> None:
        self._call("sleep", level)

    def generate(
        self, prompts: Sequence[dict[str, Any]], params: Sequence[dict[str, Any]], *, use_tqdm: bool
    ) -> list[Any]:
        self._call("generate")
        self.asked = [(each["prompt_token_ids"], own) for each, own in zip(prompts, params, strict=True)]
        found = [sampled(self.model, *each) for each in self.asked]
        outputs = [
            SimpleNamespace(token_ids=tuple(ids), finish_reason=why, logprobs=[
                {token: SimpleNamespace(logprob=logp), 999: None} for token, logp in zip(ids, logps, strict=True)
            ])
            for ids, logps, why in found
        ]  # fmt: skip
        return [SimpleNamespace(outputs=[self.changed(output)]) for output in outputs]

    def changed(self, output: Any) -> Any:
        """For a subclass."""
        return output


def sampling_params(**given: Any) -> dict[str, Any]:
    assert given.keys() <= PARAMETERS, given.keys() - PARAMETERS
    return given


def install(monkeypatch: Any, **attributes: Any) -> type[LLM]:
    """Put the stand-in in the place of vLLM; returns its class, with these attributes."""
    kind = type("LLM", (LLM,), {"built": [], "destroyed": [], **attributes})
    package, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    names = ("destroy_model_parallel", "destroy_distributed_environment")
    distributed.parallel_state = SimpleNamespace(  # type: ignore[attr-defined]
        **{name: lambda name=name: kind.destroyed.append(name) for name in names}
    )
    package.LLM, package.SamplingParams = kind, sampling_params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    return kind
