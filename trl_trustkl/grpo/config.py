"""TrustKLGRPOConfig and TrustKLRLOOConfig: TRL's configurations with this package's fields."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from trl import GRPOConfig, RLOOConfig

from ..controllers import CONTROLLERS, Controller, ControllerName, FixedKL, ScheduledKL, build_controller
from ..errors import ConfigError
from ..options import OF_TOKEN, PER_RESPONSE, PER_TOKEN, Range, check_options, option, unmasked
from ..policy.precision import choose_bf16
from ..trl_compat import activation_checkpointing
from ..trust.limits import reject_moving_reference

_anchor = partial(option, group="anchor")
_trust = partial(option, group="trust region")
_failure = partial(option, group="when something goes wrong")


@dataclass
class TrustRegionFields:
    """The fields that are added to TRL's, with the names of `TrustKLPPOConfig`."""

    # fmt: off
    kl_controller: ControllerName = _anchor(
        "fixed", "Controller of beta, which is then the coefficient at the start; its input is the KL that TRL measures.",
        off='"fixed"', names=CONTROLLERS)
    kl_target: float | None = _anchor(
        None, "Target of the KL to the reference, in nats per token, TRL's unit for this trainer (that of TrustKLPPOConfig is "
        "in nats per response).", unit="nats/token", off="None", range=Range("a positive number of nats per token"))
    kl_horizon: int = _anchor(
        10_000, "Horizon of the adaptive controller, in responses: beta changes by at most a fifth in this many.",
        unit="responses", range=Range("a positive number of responses"))
    kl_controller_kwargs: dict | str | None = _anchor(None, "Arguments of kl_controller, as a dict or JSON.")
    anchor_max_kl: float | None = _anchor(
        None, "Hard limit of the generation batch's exact KL(π‖π_ref) after an update, in nats per completion, enforced by "
        "backtracking. If the KL is above it before an update, the update must not increase it.", **PER_RESPONSE)
    trust_max_kl: float | None = _trust(
        None, "Hard limit of the generation batch's mean KL(π_old‖π), in nats per token, enforced by backtracking.",
        **PER_TOKEN)
    trust_max_kl_token: float | None = _trust(
        None, "Hard limit of the largest KL(π_old‖π) of one token of the generation batch, in nats, enforced by "
        "backtracking.", **OF_TOKEN)
    trust_max_kl_response: float | None = _trust(
        None, "Hard limit of the largest sum of KL(π_old‖π) over one completion of the generation batch, in nats, enforced by "
        "backtracking.", **PER_RESPONSE)
    trust_stop: float | None = _trust(
        None, "Make no further change on a generation batch once its KL(π_old‖π) exceeds this, in nats per token.",
        **PER_TOKEN)
    trust_lr_target: float | None = _trust(
        None, "Target of KL(π_old‖π), in nats per token: after a proposed KL above twice this the learning rate is divided by "
        "1.5, after one below half of it multiplied by 1.5.", **PER_TOKEN)
    panic_kl: float | None = _failure(
        None, "Roll back an update whose KL(π_old‖π), before any backtracking, exceeds this, in nats per token; None: never.",
        **PER_TOKEN)
    # fmt: on

    def __post_init__(self: Any) -> None:
        activation_checkpointing.adopt_fields(self)
        choose_bf16(self)
        super().__post_init__()  # type: ignore[misc]  # of a configuration of TRL
        check(self, self.beta)

    def to_dict(self: Any) -> dict[str, Any]:
        """All fields, as transformers saves and logs them: the Hub's tokens are masked."""
        return unmasked(self, super().to_dict())  # type: ignore[misc]


def build_kl_controller(args: TrustRegionFields, beta: float) -> Controller:
    """The controller of TRL's coefficient `beta`. Raises ConfigError for a target or an argument that does not suit it."""
    kwargs = args.kl_controller_kwargs if isinstance(args.kl_controller_kwargs, dict) else {}
    for key, field in (("coef", "beta"), ("target", "kl_target")):
        if key in kwargs:
            raise ConfigError(f"`kl_controller_kwargs` got {key!r}; set `{field}` instead.")
    if args.kl_controller == "adaptive":
        kwargs = {"horizon": args.kl_horizon, **kwargs}
    try:
        return build_controller(args.kl_controller, coef=beta, target=args.kl_target, field="kl", **kwargs)
    except ConfigError as error:
        raise ConfigError(str(error).replace("`kl_coef`", "`beta`")) from None


def check(args: TrustRegionFields, beta: float) -> None:
    """ConfigError for a field out of its range, or a combination that cannot work."""
    check_options(args, of_others=False)
    reject_moving_reference(args.anchor_max_kl, moves=getattr(args, "sync_ref_model", False))
    if args.kl_controller != "fixed" and not beta > 0:
        raise ConfigError(
            f"`beta` got {beta!r} with kl_controller={args.kl_controller!r}; it must be above 0: at 0 TRL loads no reference, "
            "and there is no KL to control. Set the coefficient at the start, such as beta=0.04."
        )
    if isinstance(build_kl_controller(args, beta), (FixedKL, ScheduledKL)) and args.kl_target is not None:
        raise ConfigError(
            f"`kl_target` got {args.kl_target}, but kl_controller={args.kl_controller!r} ignores it; choose "
            "kl_controller='adaptive', or leave kl_target None."
        )


@dataclass
class TrustKLGRPOConfig(TrustRegionFields, GRPOConfig):
    """TRL's `GRPOConfig`, with the fields of `TrustKLGRPOTrainer`.

    >>> TrustKLGRPOConfig(output_dir="run", use_cpu=True, kl_controller="adaptive", kl_target=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    trl_trustkl.errors.ConfigError: `beta` got 0.0 with kl_controller='adaptive'; it must be above 0: ...
    """


@dataclass
class TrustKLRLOOConfig(TrustRegionFields, RLOOConfig):
    """TRL's `RLOOConfig`, with the fields of `TrustKLRLOOTrainer`."""
