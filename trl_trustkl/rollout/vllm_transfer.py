"""How the policy's weights get to a vLLM server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, RolloutError, TrustKLError
from ..run.signals import Overdue
from ..trl_compat.vllm import weights_client
from .vllm_client import VLLMServer
from .vllm_colocate import require_vllm

CHUNK = 2**29
"""Bytes of weights that are gathered before they are sent, or written into one file."""


class Transfer(Protocol):
    """Sends weights by the names of a checkpoint."""

    def check(self, server: VLLMServer) -> None:
        """Raise ConfigError if the server does not take weights in this way."""

    def send(self, server: VLLMServer, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the server's weights. Raises RolloutError where that fails."""

    def close(self) -> None:
        """Release what is held between two sends."""


def transfer_for(device: torch.device, group_port: int) -> Transfer:
    """From a GPU by NCCL; from a CPU by files, as NCCL has no CPU."""
    return NcclTransfer(device, group_port) if device.type == "cuda" else FileTransfer()


class NcclTransfer:
    """From GPU to GPU, with TRL's client and vLLM's weight transfer. The weights are streamed, `CHUNK` bytes at a time."""

    def __init__(self, device: torch.device, group_port: int) -> None:
        self._device = device
        self._port = group_port
        self._client: Any = None

    def check(self, server: VLLMServer) -> None:
        require_vllm()
        if server.config().get("weight_transfer_config") is None:
            raise ConfigError(
                f"the vLLM server at {server.url} has no weight transfer; start it with `trl vllm-serve`, or with "
                """--weight-transfer-config '{"backend": "nccl"}'."""
            )

    def send(self, server: VLLMServer, weights: Iterator[tuple[str, Tensor]]) -> None:
        try:
            if self._client is None:
                self._client = weights_client(server.url, self._port, server.timeout, self._device)
            with self._client.weight_update():
                for chunk in chunks(weights):
                    about = [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in chunk]
                    self._client.update_named_params(about, iter(chunk))
        except BaseException as error:
            self.close()
            if isinstance(error, (TrustKLError, Overdue)) or not isinstance(error, Exception):
                raise
            raise RolloutError(  # an error of TRL, requests or NCCL
                f"the weights could not be sent to the vLLM server at {server.url}: {type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.close_communicator()


class FileTransfer:
    """By files in a temporary folder, which the server on the same machine reads."""

    def check(self, server: VLLMServer) -> None:
        pass

    def send(self, server: VLLMServer, weights: Iterator[tuple[str, Tensor]]) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="trl_trustkl-weights-", ignore_cleanup_errors=True) as folder:
                for number, chunk in enumerate(chunks(weights)):
                    tensors = {name: weight.contiguous().clone() for name, weight in chunk}
                    save_file(tensors, Path(folder, f"model-{number:05}.safetensors"))
                body = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": server.timeout}
                server.post("/collective_rpc", body)
        except (OSError, SafetensorError) as error:
            raise RolloutError(
                f"the weights for the vLLM server could not be written into {tempfile.gettempdir()}: {error}. Make room there, "
                "or set TMPDIR to another folder."
            ) from error

    def close(self) -> None:
        pass


def chunks(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """The weights in lists of at least `CHUNK` bytes."""
    chunk, size = [], 0
    for name, weight in weights:
        chunk.append((name, weight))
        size += weight.numel() * weight.element_size()
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
