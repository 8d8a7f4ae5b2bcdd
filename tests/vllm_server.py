"""A stand-in for a vLLM server: a tiny model behind the paths of vLLM 0.31 that rollouts use, with faults on request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests import tiny

COMPLETIONS, RELOAD, RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
NAMED, LABEL = "/update_weight_version", "/weight_info"
SLACK = 10.0
"""Seconds that a loaded machine may take longer than a time-out."""
NAN = {"error": {"message": "Out of range float values are not JSON compliant: nan", "code": 400}}


class Fault(NamedTuple):
    """What happens at request number `at` to a path, and, unless `once`, at all later ones.

    kind: "stall" (never answers), "trickle" (answers by one character after the other), "die" (the server is gone), "restart"
    (with the initial weights), "500", "garbage" (no JSON), "other" (JSON of something else), "nan" (vLLM's answer), "null"
    (log-probabilities), "no ids", "no choices", "two choices", "abort" (the finish reason).
    """

    kind: str
    path: str = COMPLETIONS
    at: int = 0
    once: bool = False


def saved(folder: Path, model: Any = None) -> Path:
    """A folder with a tiny model and its tokenizer."""
    (tiny.llama() if model is None else model).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sampled(model: Any, prompt: list[int], parameters: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """A response with the request's parameters: tokens, log-probabilities of the processed distribution, finish reason."""
    generator = torch.Generator().manual_seed(parameters["seed"])
    ids, logps = list(prompt), []
    for _ in range(parameters["max_tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float() / parameters["temperature"]
        if parameters["top_k"] > 0:
            logits[logits < logits.topk(parameters["top_k"]).values[-1]] = -torch.inf
        logp = logits.log_softmax(-1)
        ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
        logps.append(float(logp[ids[-1]]))
        if ids[-1] in parameters["stop_token_ids"]:
            return ids[len(prompt) :], logps, "stop"
    return ids[len(prompt) :], logps, "length"


class FakeVLLM:
    """A server in a thread, on a free port; a context.

    folder: the model that it serves. name: by which name; None: the folder. vocabulary: the number of its tokens. dev_mode:
    whether it has the paths for weights. labels: whether weights have names, as from vLLM 0.27. requests: path and body of
    each, in order. loaded: how often it got weights. failed: when a fault happened first, by time.monotonic(); `on_failure` is
    called then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        vocabulary: int = tiny.VOCAB,
        dtype: str = "torch.float32",
        logprobs_mode: str = "processed_logprobs",
        dev_mode: bool = True,
        labels: bool = True,
        max_model_len: int | None = 128,
        port: int = 0,
        fault: Fault | None = None,
    ) -> None:
        self.model = loaded(folder).eval()
        self.initial = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.served = {"id": name or str(folder), "root": name or str(folder), "max_model_len": max_model_len}
        self.vocabulary, self.dev_mode, self.labels, self.fault = vocabulary, dev_mode, labels, fault
        about = {"model_config": {"dtype": dtype, "logprobs_mode": logprobs_mode}, "weight_transfer_config": None}
        self.config: dict[str, Any] = {"vllm_config": about}
        self.label, self.loaded = "default", 0
        self.requests: list[tuple[str, Any]] = []
        self.failed: float | None = None
        self.on_failure: Callable[[], Any] = lambda: None
        self._counts: Counter[str] = Counter()
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._http = Listener(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the port and all connections."""
        if not self._ended.is_set():
            self._ended.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.cut()

    def restart(self) -> None:
        """Forget the weights and their name."""
        with self._lock:
            self.model.load_state_dict(self.initial)
            self.label = "default"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def answer(self, path: str, body: Any) -> tuple[int, Any] | None:
        """Status and answer of a request; a str is sent as it is. None: there is none."""
        with self._lock:
            number, fault = self._counts[path], self.fault
            self._counts[path] += 1
            self.requests.append((path, body))
        kind = fault.kind if fault is not None and self._fits(fault, path, number) else ""
        if kind and self.failed is None:
            self.failed = time.monotonic()
            self.on_failure()
        if kind in ("stall", "trickle"):
            return None
        if kind == "die":
            self.die()
            return None
        if kind == "restart":
            self.restart()
        other = {"500": (500, "EngineDeadError"), "garbage": (200, "<html>hello</html>"), "other": (200, {"a": 1}),
                 "nan": (400, NAN)}  # fmt: skip
        if kind in other:
            return other[kind]
        with self._lock:
            status, found = self._routed(path, body)
        return status, mangled(found, kind) if path == COMPLETIONS and status == 200 else found

    def _fits(self, fault: Fault, path: str, number: int) -> bool:
        return path == fault.path and (
            number == fault.at if fault.once or fault.kind == "restart" else number >= fault.at
        )

    def _routed(self, path: str, body: Any) -> tuple[int, Any]:
        of_weights = {
            "/server_info": lambda: self.config,
            RELOAD: lambda: self._reload(body),
            RESET: lambda: {"success": True},
        }
        of_labels = {LABEL: lambda: {"weight_version": self.label}, NAMED: lambda: self._rename(body)}
        routes: dict[str, Callable[[], Any]] = {"/health": lambda: "", "/v1/models": lambda: {"data": [self.served]}}
        routes |= (of_weights if self.dev_mode else {}) | (of_labels if self.labels else {})
        if path == COMPLETIONS:
            return self._completed(body)
        return (200, routes[path]()) if path in routes else (404, {"detail": "Not Found"})

    def _reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        found = {}
        for file in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
            found |= safetensors.torch.load_file(file)
        self.model.load_state_dict(found)
        self.loaded += 1
        return {"results": [None]}

    def _rename(self, body: dict[str, Any]) -> dict[str, Any]:
        self.label = body["new_version"]
        return {"success": True}

    def _completed(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.served["id"]:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if wrong := [token for token in map(int, body.get("logit_bias", ())) if token >= self.vocabulary]:
            text = (
                f"token_id(s) {wrong} in logit_bias contain out-of-vocab token ids. Vocabulary size: {self.vocabulary}"
            )
            return 400, {"error": {"message": text}}
        if len(body["prompt"]) + body["max_tokens"] > (self.served["max_model_len"] or 128):
            return 400, {"error": {"message": "This model's maximum context length is exceeded."}}
        defaults = {"seed": 0, "temperature": 1.0, "top_k": 0, "stop_token_ids": []}
        ids, logps, reason = sampled(self.model, body["prompt"], defaults | body)
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}
        return 200, {"choices": [choice]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._respond(None)

            def do_POST(self) -> None:
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _respond(self, body: Any) -> None:
                path = urlsplit(self.path).path
                found = server.answer(path, body)
                if found is None:
                    trickles = server.fault is not None and server.fault.kind == "trickle"
                    while not server._ended.wait(0.05):
                        if trickles:
                            self.wfile.write(b"HTTP/1.0 200 OK\r\n"[:1])
                    return
                status, answer = found
                text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None: ...

        return Handler


class Listener(ThreadingHTTPServer):
    """Keeps its connections, so that they can be cut."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._accepted: list[Any] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._accepted.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error of these tests."""

    def cut(self) -> None:
        for connection in self._accepted:
            with suppress(OSError):
                connection.shutdown(2)


def mangled(answer: dict[str, Any], kind: str) -> dict[str, Any]:
    """The answer of a completion with a fault."""
    (choice,) = answer["choices"]
    if kind in ("no choices", "two choices"):
        return {"choices": [choice] * (2 if kind == "two choices" else 0)}
    if kind == "no ids":
        del choice["token_ids"]
    elif kind == "null":
        choice["logprobs"]["token_logprobs"][0] = None
    elif kind == "abort":
        choice["finish_reason"] = "abort"
    return answer


def left_threads() -> list[str]:
    """The threads of requests that have not ended within a second."""
    deadline = time.monotonic() + 1
    while True:
        found = [thread.name for thread in threading.enumerate() if thread.name.startswith("vllm-request")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)
