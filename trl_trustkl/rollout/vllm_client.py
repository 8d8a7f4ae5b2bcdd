"""Requests to a vLLM server, each with a time-out."""

from __future__ import annotations

import time
from typing import Any

from ..errors import ConfigError, RolloutError, shown

_PROBE = 5.0
"""Seconds for a request that only asks whether the server is there."""


class BadRequest(RolloutError):
    """The server rejected a request (status 400)."""


class VLLMServer:
    """A vLLM server at an address. Raises RolloutError where it cannot be reached, or not answer within `timeout` seconds."""

    def __init__(self, url: str, timeout: float) -> None:
        try:
            import requests
        except ImportError as error:
            raise ConfigError(
                "`vllm_mode` got 'server', which needs the package requests; install it: pip install requests."
            ) from error
        self.url = url
        self.timeout = timeout
        self._requests = requests
        self._session: Any = None
        self._model: str | None = None
        self._labels = True

    def wait_until_ready(self) -> None:
        """Wait until the server answers, for `timeout` seconds."""
        deadline = time.monotonic() + self.timeout
        while True:
            remaining = deadline - time.monotonic()
            try:
                self._get("/health", timeout=max(0.1, min(_PROBE, remaining)))
                return
            except RolloutError as error:
                if time.monotonic() + 1 > deadline:
                    raise RolloutError(
                        f"there is no vLLM server at {self.url} after vllm_server_timeout={self.timeout:g} seconds; start one "
                        "with `trl vllm-serve`, and set vllm_server_base_url, or vllm_server_host and vllm_server_port. "
                        f"{error}"
                    ) from error
            time.sleep(1)

    def model(self) -> dict[str, Any]:
        """What is served: `id` for requests, `root` for the files, `max_model_len`."""
        found = self._get("/v1/models")["data"][0]
        self._model = found["id"]
        return {"root": found["id"], "max_model_len": None, **found}

    def config(self) -> dict[str, Any]:
        """The server's configuration."""
        try:
            return self._get("/server_info", params={"config_format": "json"})["vllm_config"]
        except NotFound:
            raise ConfigError(
                f"the vLLM server at {self.url} takes no weights: it was started without VLLM_SERVER_DEV_MODE=1; start it with "
                "`trl vllm-serve`, which sets it."
            ) from None

    def has_token(self, token: int) -> bool:
        """Whether the served model has a token."""
        body = {"model": self._model, "prompt": [0], "max_tokens": 1, "allowed_token_ids": [token]}
        try:
            self.post("/v1/completions", body)
        except BadRequest:
            return False
        return True

    def complete(self, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        """The one choice of a completion: `token_ids`, `logprobs`, `finish_reason`."""
        body = {
            "model": self._model, "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True, **parameters,
        }  # fmt: skip
        choices = self.post("/v1/completions", body)["choices"]
        if len(choices) != 1 or choices[0].get("token_ids") is None or choices[0].get("logprobs") is None:
            raise RolloutError(
                f"the vLLM server at {self.url} answered with {len(choices)} responses, or without their token ids or "
                "log-probabilities; it must return one with both: use a version of vLLM that this version of TRL supports."
            )
        return choices[0]

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with older weights."""
        self.post("/reset_prefix_cache", {})

    def label_weights(self, label: str) -> None:
        """Name the weights that the server has now."""
        try:
            self.post("/update_weight_version", {"new_version": label})
        except NotFound:  # versions of vLLM before 0.27
            self._labels = False

    def weights_label(self) -> str | None:
        """The name of its weights, which a restarted server does not know; None where the server has no such names."""
        return self._get("/weight_info")["weight_version"] if self._labels else None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request; returns its answer as JSON."""
        return self._answer("post", path, json=body)

    def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _get(self, path: str, **options: Any) -> Any:
        return self._answer("get", path, **options)

    def _answer(self, method: str, path: str, **options: Any) -> Any:
        if self._session is None:
            self._session = self._requests.Session()
            adapter = self._requests.adapters.HTTPAdapter(pool_maxsize=256)
            for scheme in ("http://", "https://"):
                self._session.mount(scheme, adapter)
        failures = (self._requests.RequestException, OSError)
        try:
            response = self._session.request(method, self.url + path, **{"timeout": self.timeout} | options)
        except failures as error:
            late = isinstance(error, self._requests.Timeout)
            what = (
                f"did not answer within {options.get('timeout', self.timeout):g} seconds"
                if late
                else "cannot be reached"
            )
            raise RolloutError(f"The vLLM server at {self.url} {what} ({path}: {type(error).__name__}).") from error
        if response.status_code == 200:
            return response.json() if response.content else None
        kind = {404: NotFound, 400: BadRequest}.get(response.status_code, RolloutError)
        raise kind(
            f"The vLLM server at {self.url} answered {path} with {response.status_code}: {shown(response.text)}."
        )


class NotFound(RolloutError):
    """The server does not know the path of a request (status 404)."""
