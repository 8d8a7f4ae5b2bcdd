"""Requests to a vLLM server, each with a time-out."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import ConfigError, RolloutError, shown
from ..run.signals import Overdue, StopRequest

Answer = TypeVar("Answer")

CONCURRENT = 256
"""Requests at a time of one process; the server batches them."""
_PROBE = 5.0
"""Seconds for a request that only asks whether the server is there, and for opening a connection."""
_POLL = 0.2
_NOT_FINITE = "Out of range float values"
"""vLLM's answer where a log-probability is NaN, which JSON cannot hold."""


class BadRequest(RolloutError):
    """The server rejected a request (status 400)."""


class NotFound(RolloutError):
    """The server does not know the path of a request (status 404)."""


class VLLMServer:
    """A vLLM server at an address.

    A request raises RolloutError where the server cannot be reached, answers with an error, or does not answer within `timeout`
    seconds, and Overdue where the grace period of a signal to `stop` ends meanwhile. In any case it closes its connections,
    which ends its threads. No connection is used twice: a server may be closing one that is idle.
    """

    def __init__(self, url: str, timeout: float, stop: StopRequest | None = None) -> None:
        self.url = url
        self.timeout = timeout
        self._stop = StopRequest(math.inf) if stop is None else stop
        self._address = urlsplit(url)
        self._model: str | None = None

    def wait_until_ready(self) -> None:
        """Wait until the server answers, for `timeout` seconds. A signal ends the wait at once."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self._get("/health", seconds=max(0.1, min(_PROBE, deadline - time.monotonic())))
                return
            except RolloutError as error:
                if self._stop.wait(0):
                    raise Overdue from error
                if time.monotonic() + 1 > deadline:
                    raise RolloutError(
                        f"there is no vLLM server at {self.url}, after vllm_server_timeout={self.timeout:g} seconds; start one "
                        "with `trl vllm-serve`, and set vllm_server_base_url, or vllm_server_host and vllm_server_port, to its "
                        f"address. The last attempt: {error}"
                    ) from error
            self._stop.wait(1)

    def model(self) -> dict[str, Any]:
        """What is served: `id` for requests, `root` for the files, `max_model_len`."""
        path = "/v1/models"
        found = self._part(path, self._get(path), "data", 0)
        self._model = self._part(path, found, "id")
        return {"root": self._model, "max_model_len": None, **found}

    def config(self) -> dict[str, Any]:
        """The server's configuration: `model_config` with `dtype` and `logprobs_mode`, `weight_transfer_config`."""
        path = "/server_info"
        try:
            found = self._part(path, self._get(f"{path}?config_format=json"), "vllm_config")
        except NotFound:
            raise ConfigError(
                f"the vLLM server at {self.url} takes no weights: it was started without VLLM_SERVER_DEV_MODE=1; start it with "
                "`trl vllm-serve`, which sets it."
            ) from None
        for name in ("dtype", "logprobs_mode"):
            self._part(path, found, "model_config", name)
        return found

    def has_token(self, token: int) -> bool:
        """Whether the served model has a token. Versions of vLLM hold other parameters with tokens against the tokenizer, whose
        vocabulary may be smaller, but `logit_bias` against the model."""
        body = {"model": self._model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(token): 0}}
        try:
            self.post("/v1/completions", body)
        except BadRequest as error:
            if "vocab" not in str(error):
                raise
            return False
        return True

    def complete(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any] | None]:
        """One choice for each prompt, each by a separate request: `token_ids`, `logprobs`, `finish_reason`. None where a
        log-probability is NaN, which vLLM does not send. All together take `timeout` seconds at most."""
        bodies = [
            {
                "model": self._model,
                "prompt": prompt,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                **own,
            }
            for prompt, own in zip(prompts, parameters, strict=True)
        ]
        return self._answers("/v1/completions", [partial(self._choice, body) for body in bodies], self.timeout)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with older weights."""
        self.post("/reset_prefix_cache", {})

    def label_weights(self, label: str) -> None:
        """Name the weights that the server has now. Versions of vLLM before 0.27 have no such names."""
        with suppress(NotFound):
            self.post("/update_weight_version", {"new_version": label})

    def weights_label(self) -> str | None:
        """The name of its weights, which a restarted server does not know; None where the server has no such names."""
        try:
            return self._part("/weight_info", self._get("/weight_info"), "weight_version")
        except NotFound:
            return None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request; returns its answer as JSON."""
        return self._answers(path, [partial(self._exchange, "POST", path, body)], self.timeout)[0]

    def _get(self, path: str, seconds: float | None = None) -> Any:
        calls = [partial(self._exchange, "GET", path, None)]
        return self._answers(path, calls, self.timeout if seconds is None else seconds)[0]

    def _choice(self, body: dict[str, Any], connections: _Connections) -> dict[str, Any] | None:
        path = "/v1/completions"
        try:
            choices = self._part(path, self._exchange("POST", path, body, connections), "choices")
        except BadRequest as error:
            if _NOT_FINITE not in str(error):
                raise
            return None
        found = choices[0] if len(choices) == 1 else {}
        if found.get("token_ids") is None or found.get("logprobs") is None:
            raise RolloutError(
                f"the vLLM server at {self.url} answered with {len(choices)} responses, or without their token ids or "
                "log-probabilities; it must return one with both: use a version of vLLM that this version of TRL supports."
            )
        return found

    def _part(self, path: str, answer: Any, *keys: str | int) -> Any:
        """A part of an answer. Raises RolloutError if it is not there."""
        found = answer
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                raise RolloutError(
                    f"the vLLM server at {self.url} answered {path} with {shown(answer)}, which has no {key!r}; use a version "
                    "of vLLM that this version of TRL supports."
                ) from None
        return found

    def _answers(self, path: str, calls: Sequence[Callable[[_Connections], Answer]], seconds: float) -> list[Answer]:
        """The results of calls, each in a thread. Raises the first error, RolloutError after `seconds`, and Overdue."""
        deadline = time.monotonic() + seconds
        connections = _Connections(seconds)
        pool = ThreadPoolExecutor(min(CONCURRENT, max(1, len(calls))), thread_name_prefix="vllm-request")
        try:
            futures = [pool.submit(call, connections) for call in calls]
            waiting: set[Future[Answer]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL)
                for error in (future.exception() for future in done):
                    if error is not None:
                        raise error
                if self._stop.overdue:
                    raise Overdue
                if waiting and time.monotonic() > deadline:
                    raise RolloutError(
                        f"the vLLM server at {self.url} has not answered {len(waiting)} of {len(calls)} requests to {path} "
                        f"within {seconds:g} seconds. Look at its log; if it is only slow, set vllm_server_timeout higher."
                    )
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            connections.close()

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, connections: _Connections) -> Any:
        """Send a request, and wait for its answer."""
        secure, host = self._address.scheme == "https", self._address.hostname or ""
        port = self._address.port or (443 if secure else 80)
        connection = (HTTPSConnection if secure else HTTPConnection)(host, port, timeout=_PROBE)
        try:
            connections.open(connection)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            data = None if body is None else json.dumps(body)
            connection.request(method, self._address.path + path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        except (OSError, HTTPException, UnicodeError) as error:
            raise RolloutError(
                f"the vLLM server at {self.url} cannot be reached, or ended the connection ({path}: {type(error).__name__}: "
                f"{error}). Look at its log, and start it again."
            ) from error
        finally:
            connection.close()
        if status != 200:
            kind = {404: NotFound, 400: BadRequest}.get(status, RolloutError)
            raise kind(f"the vLLM server at {self.url} answered {path} with status {status}: {shown(text)}.")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise RolloutError(
                f"the vLLM server at {self.url} answered {path} with {shown(text)}, which is not JSON; check the address."
            ) from None


class _Connections:
    """Connections that another thread can close while an answer is waited for."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sockets: list[socket.socket] = []
        self._closed = threading.Event()

    def open(self, connection: HTTPConnection) -> None:
        """Connect. Raises ConnectionAbortedError after `close`."""
        connection.connect()
        connection.sock.settimeout(self._seconds + _PROBE)  # the thread that waits for all gives up before
        self._sockets.append(connection.sock)
        if self._closed.is_set():
            raise ConnectionAbortedError("closed")

    def close(self) -> None:
        """Close all connections, also those that are opened later."""
        self._closed.set()
        for each in self._sockets:
            with suppress(OSError):  # it is closed
                each.shutdown(socket.SHUT_RDWR)
