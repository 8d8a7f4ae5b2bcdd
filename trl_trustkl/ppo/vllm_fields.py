"""The fields of TrustKLPPOConfig for rollouts by vLLM: GRPOConfig's, with its names and meanings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

from trl import GRPOConfig

from ..errors import ConfigError, out_of_range
from ..importance import CorrectionMode
from ..options import COUNT, NOT_NEGATIVE, POSITIVE, Range, inherited, option
from .training_fields import TrainingFields

_vllm = partial(option, group="rollouts by vLLM")
_trl = partial(inherited, GRPOConfig)
_PORT = Range("an integer from 1 to 65535", lambda x: 1 <= x <= 65535)


@dataclass
class VLLMFields(TrainingFields):
    """`vllm_importance_sampling_mode` has another default than GRPOConfig: see docs/vllm.md."""

    # fmt: off
    use_vllm: bool = _vllm(False, "Whether vLLM samples the responses, instead of transformers' `generate`.", off="False")
    vllm_mode: Literal["colocate", "server"] = _vllm(
        _trl("vllm_mode")[0], "'colocate': vLLM runs in the training process and shares its device. 'server': a server "
        "samples, which was started with `trl vllm-serve`.")
    vllm_model_impl: Literal["vllm", "transformers"] = _vllm(
        _trl("vllm_model_impl")[0], "Whose implementation of the model a colocated vLLM runs.")
    vllm_enable_sleep_mode: bool = _vllm(
        _trl("vllm_enable_sleep_mode")[0], "Whether a colocated vLLM releases its GPU memory while the policy is trained.",
        off="False")
    vllm_server_base_url: str | None = _vllm(
        _trl("vllm_server_base_url")[0], "The server's address, such as 'http://localhost:8000'; None: `vllm_server_host` and "
        "`vllm_server_port` are used.")
    vllm_server_host: str = _vllm(_trl("vllm_server_host")[0], "The server's host, by name or IP address.")
    vllm_server_port: int = _vllm(_trl("vllm_server_port")[0], "The port that the server listens on.", unit="port", range=_PORT)
    vllm_server_timeout: float = _vllm(
        _trl("vllm_server_timeout")[0], "Seconds after which a server that does not answer ends the run, at its start and in "
        "each request.", unit="s", range=POSITIVE._replace(valid="a positive number of seconds"))
    vllm_group_port: int = _vllm(
        _trl("vllm_group_port")[0], "Port of the group in which weights are sent from GPU to GPU.", unit="port", range=_PORT)
    vllm_gpu_memory_utilization: float = _vllm(
        _trl("vllm_gpu_memory_utilization")[0], "Share of the device's memory that a colocated vLLM takes.", unit="share",
        range=Range("in (0, 1]", lambda x: 0 < x <= 1))
    vllm_max_model_length: int | None = _vllm(
        _trl("vllm_max_model_length")[0], "Context length of a colocated vLLM, prompt and response; None: the model's.",
        unit="tokens", range=COUNT)
    vllm_tensor_parallel_size: int = _vllm(
        _trl("vllm_tensor_parallel_size")[0], "Processes that share one colocated vLLM, which is sharded over them.",
        unit="processes", range=COUNT)
    vllm_importance_sampling_correction: bool = _vllm(
        _trl("vllm_importance_sampling_correction")[0], "Whether the policy's loss is weighted by the ratio of π_old, in the "
        "training pass, to the sampler's probability of each token.", off="False")
    vllm_importance_sampling_mode: CorrectionMode = _vllm(
        "token_truncate", "Whether ratios are per token or per response, and whether a ratio outside the bounds is set to the "
        "bound or to 0.")
    vllm_importance_sampling_clip_max: float | None = _vllm(
        _trl("vllm_importance_sampling_clip_max")[0], "Upper bound of the ratio π_old/sampler; None: no bound.", unit="1",
        off="None", range=POSITIVE)
    vllm_importance_sampling_clip_min: float | None = _vllm(
        _trl("vllm_importance_sampling_clip_min")[0], "Lower bound of the ratio π_old/sampler; None: no bound.", unit="1",
        off="None", range=NOT_NEGATIVE)
    # fmt: on

    @property
    def vllm_server_url(self) -> str:
        """The address of the server."""
        return (self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}").rstrip("/")


CORRECTION = tuple(f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_max", "clip_min"))
"""The fields of the correction, which any engine that samples elsewhere uses."""
_SERVER = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port")
_COLOCATE = (
    "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_tensor_parallel_size",
)  # fmt: skip
_OF_TRANSFORMERS = {
    "local_rollout_forward_batch_size": "vLLM chooses its batches by itself",
    "ds3_gather_for_generation": "vLLM gets the weights layer by layer in any case",
}
"""Fields of the other engine, and why vLLM has no use for them."""


def changed(args: Any, names: tuple[str, ...]) -> list[str]:
    """Those of the fields that differ from their default."""
    return [name for name in names if getattr(args, name) != args.__dataclass_fields__[name].default]


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not one
        return False


def check_vllm(args: Any) -> None:
    """Raise ConfigError for a field that would be ignored, and for values that contradict each other."""
    other, needed = (_COLOCATE, "colocate") if args.vllm_mode == "server" else (_SERVER, "server")
    ignored = ("vllm_mode", *_SERVER, *_COLOCATE) if not args.use_vllm else other
    for name in changed(args, tuple(_OF_TRANSFORMERS)) if args.use_vllm else ():
        raise ConfigError(
            f"`{name}` got {getattr(args, name)} with use_vllm=True, and {_OF_TRANSFORMERS[name]}; leave it out."
        )
    for name in changed(args, ignored):
        fix = "use_vllm=True" if not args.use_vllm else f"vllm_mode={needed!r}"
        raise ConfigError(
            f"`{name}` got {getattr(args, name)!r}, which only {fix} uses; set {fix}, or leave {name} out."
        )
    url = args.vllm_server_base_url
    if url is not None and not _is_address(url):
        raise out_of_range("vllm_server_base_url", url, "an address such as 'http://localhost:8000', or None")
    if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", args.vllm_server_host):
        valid = "a name such as 'localhost', or an IP address"
        fix = "An address with 'http://' belongs in vllm_server_base_url."
        raise out_of_range("vllm_server_host", args.vllm_server_host, valid, fix)
    for name in changed(args, ("vllm_server_host", "vllm_server_port")):
        if url is not None:
            raise ConfigError(
                f"`{name}` got {getattr(args, name)!r} together with vllm_server_base_url={url!r}, which has both; leave one "
                "of them out."
            )
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise out_of_range(
            "vllm_importance_sampling_clip_min", low, f"below vllm_importance_sampling_clip_max, which is {high:g}"
        )
    if not args.vllm_importance_sampling_correction:
        for name in changed(args, CORRECTION[1:]):
            raise ConfigError(
                f"`{name}` got {getattr(args, name)!r}, but vllm_importance_sampling_correction=False ignores it; leave it out."
            )
