"""TRL's client of a vLLM server, for sending weights."""

from __future__ import annotations

from typing import Any

import torch


def weights_client(url: str, group_port: int, timeout: float, device: torch.device) -> Any:
    """A `VLLMClient` whose group for weights is open, and whose requests have a time-out and are not repeated.

    Raises whatever TRL, requests or NCCL raise.
    """
    from requests.adapters import HTTPAdapter
    from trl.generation.vllm_client import VLLMClient

    class WithTimeout(HTTPAdapter):
        def send(self, request: Any, **options: Any) -> Any:  # type: ignore[override]
            options["timeout"] = options.get("timeout") or timeout
            return super().send(request, **options)

    client = VLLMClient(base_url=url, group_port=group_port, connection_timeout=timeout)
    for scheme in ("http://", "https://"):
        client.session.mount(scheme, WithTimeout())
    client.init_communicator(device=device)
    return client
