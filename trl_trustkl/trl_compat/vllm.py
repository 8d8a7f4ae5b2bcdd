"""TRL's client of a vLLM server, for sending weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def weights_client(url: str, group_port: int, timeout: float, device: torch.device) -> Any:
    """A `VLLMClient` whose group for weights is open, and whose requests have a time-out and are not repeated.

    Raises whatever TRL, requests or NCCL raise.
    """
    from requests.adapters import HTTPAdapter
    from trl.generation.vllm_client import VLLMClient

    class Client(VLLMClient):
        session: Any

        def check_server(self, *args: Any, **options: Any) -> None:
            """TRL's constructor calls this before its first request. TRL's would wait for a server without a time-out."""
            for scheme in ("http://", "https://"):
                self.session.mount(scheme, HTTPAdapter())
            self.session.request = partial(self.session.request, timeout=timeout)

    client = Client(base_url=url, group_port=group_port)
    client.init_communicator(device=device)
    return client
