"""TrustKLPPOConfig: TRL's PPO configuration, with every mechanism of the anchor and of the trust region as a switch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from ..advantages import AdvantageEstimator, RewardScale, ScorePosition
from ..controllers import (
    CONTROLLERS,
    ControllerName,
    LearningRateByKL,
    build_controller,
)
from ..divergences import ESTIMATORS, KLEstimatorName, Placement, build_estimator
from ..errors import ConfigError, is_finite
from ..options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    OF_TOKEN,
    PER_RESPONSE,
    PER_TOKEN,
    POSITIVE,
    Range,
    check_options,
    option,
    unmasked,
)
from ..parallel.options import engine_of
from ..policy.precision import choose_bf16
from ..surrogates import SURROGATES, ClipRuleName, build_surrogate
from ..trl_compat import activation_checkpointing
from ..trust.limits import Limits
from . import config_checks
from .losses import Aggregation, Penalties
from .sharding_checks import reject_sharding_options
from .training_fields import only_transformers_checks, rejected_by_transformers
from .training_fields import trl as _trl
from .unsupported import reject_accelerator_config, reject_unsupported
from .vllm_fields import VLLMFields

TrustEstimator = Literal["exact", "k1", "k3"]

_UP_TO_1 = Range("in [0, 1]", lambda x: 0 <= x <= 1)

_anchor = partial(option, group="anchor")
_trust = partial(option, group="trust region")
_value = partial(option, group="advantages and values")
_run = partial(option, group="optimising, sampling, rewards, models")
_failure = partial(option, group="when something goes wrong")


@dataclass
class TrustKLPPOConfig(VLLMFields):
    """Configuration of `TrustKLPPOTrainer`: the fields of TRL's PPO, and those of this project.

    KL divergences are in nats, of the policy at `temperature`. The anchor is KL(π‖π_ref), the trust region
    KL(π_old‖π). Raises `ConfigError`, which names the field, the value, the valid range and the likely fix.

    >>> TrustKLPPOConfig(output_dir="run", use_cpu=True, cliprange_high=0.28).high
    0.28
    >>> TrustKLPPOConfig(output_dir="run", use_cpu=True, kl_target=6.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    trl_trustkl.errors.ConfigError: `kl_target` got 6.0, but kl_controller='fixed' ignores it; ...
    """

    # fmt: off
    # -- the anchor: KL(π‖π_ref) --------------------------------------------------------------------------------------
    kl_coef: float = _anchor(
        *_trl("kl_coef"), unit="score per nat", off="0", range=NOT_NEGATIVE, fix="0 turns the anchor off.")
    kl_estimator: KLEstimatorName = _anchor(  # type: ignore[assignment]  # TRL has fewer names
        "k1", "Estimator of the KL to the reference from samples, or 'exact' (over the full vocabulary).",
        names=ESTIMATORS)
    kl_estimator_kwargs: dict | str | None = _anchor(
        None, "Arguments of kl_estimator, as a dict or JSON: {'order': 0.5}.")
    kl_placement: Placement = _anchor("reward", "Where the anchor acts: 'reward', 'loss' or 'both'.")
    kl_offpolicy: bool = _anchor(
        False, "Whether a KL term in the loss is weighted by the ratio π/π_old of the token, without its gradient; "
        "'exact' does not need it.", off="False")
    kl_controller: ControllerName = _anchor(
        "fixed", "Controller of kl_coef; its input is the exact KL.", off='"fixed"', names=CONTROLLERS)
    kl_controller_kwargs: dict | str | None = _anchor(None, "Arguments of kl_controller, as a dict or JSON.")
    kl_target: float | None = _anchor(
        None, "Target of the KL to the reference, in nats per response.", unit="nats/response", off="None",
        range=Range("a positive number of nats per response"))
    kl_horizon: int = _anchor(
        10_000, "Horizon of the adaptive controller, in responses: kl_coef changes by at most a fifth in this many.",
        unit="responses", range=Range("a positive number of responses"))
    anchor_max_kl: float | None = _anchor(
        None, "Hard limit of the batch's exact KL(π‖π_ref) after an update, in nats per response, enforced by backtracking. "
        "If the KL is above it before an update, the update must not increase the KL.", **PER_RESPONSE)
    sync_ref_model: bool = _anchor(
        False, "Whether the reference is renewed every `ref_model_sync_steps` updates, as in TRL's GRPO; with PEFT, the "
        "reference is then a copy of the policy's adapter.", off="False")
    ref_model_mixup_alpha: float = _anchor(
        0.6, "α of a renewal, θ_ref ← α·θ + (1 − α)·θ_ref.", unit="share", range=Range("in (0, 1]", lambda x: 0 < x <= 1))
    ref_model_sync_steps: int = _anchor(512, "Updates from one renewal to the next.", unit="updates", range=COUNT)

    # -- the trust region: KL(π_old‖π) --------------------------------------------------------------------------------
    clip_rule: ClipRuleName = _trust(
        "ppo", "Rule that clips the policy's update; 'none' for no clipping.", off='"none"', names=SURROGATES)
    clip_kwargs: dict | str | None = _trust(None, "Arguments of clip_rule, as a dict or JSON.")
    loss_aggregation: Aggregation | None = _trust(
        None, "How the loss is averaged: 'token_mean' over all tokens; 'sequence_mean' over the tokens of each response, then "
        "over responses; 'sequence_sum' as that, with the sum over a response divided by response_length. None: "
        "'sequence_mean' for gspo and gmpo, as in their papers, else 'token_mean'.")
    cliprange: float = _trust(
        *_trl("cliprange"), unit="1", off='clip_rule="none"', range=Range("in (0, 1)", lambda x: 0 < x < 1),
        fix="Use clip_rule='none' to turn clipping off.")
    cliprange_high: float | None = _trust(
        None, "Upper clip range; None: the same as cliprange.", unit="1", range=POSITIVE,
        fix="None means the same as cliprange.")
    clip_value: bool = _trust(True, "Whether the value loss is clipped, at cliprange_value.", off="False")
    cliprange_value: float = _trust(
        *_trl("cliprange_value"), unit="the return's", off="clip_value=False", range=POSITIVE,
        fix="Use clip_value=False to turn value clipping off.")
    max_grad_norm: float | None = _trust(
        *_trl("max_grad_norm"), unit="1", off="0", range=NOT_NEGATIVE, fix="0 or None turns it off.")
    trust_coef: float = _trust(
        0.0, "Coefficient of the penalty on KL(π_old‖π); 0 turns it off.", unit="advantage per nat", off="0",
        range=NOT_NEGATIVE, fix="0 turns the penalty off.")
    trust_estimator: TrustEstimator = _trust(
        "exact", "The penalty's KL(π_old‖π): 'exact' over the vocabulary, or 'k3' at the sampled tokens; 'k1' is unbiased "
        "too, but as the samples stay the same over the epochs, it only increases their probabilities.")
    trust_controller: ControllerName = _trust("fixed", "Controller of trust_coef.", off='"fixed"', names=CONTROLLERS)
    trust_target: float | None = _trust(None, "Target of KL(π_old‖π) after an update, in nats per token.", **PER_TOKEN)
    trust_controller_kwargs: dict | str | None = _trust(None, "Arguments of trust_controller, as a dict or JSON.")
    trust_stop: float | None = _trust(
        None, "Stop the update when the exact KL of the mini-batch just stepped exceeds this, in nats per token.",
        **PER_TOKEN)
    response_mask_kl: float | None = _trust(
        None, "Leave a response out of the loss of a step while the largest KL(π_old‖π) of its tokens exceeds this, in nats; "
        "where another engine sampled, an estimate of the KL from its distribution.",
        **OF_TOKEN)
    trust_max_kl: float | None = _trust(
        None, "Hard limit of the batch's mean KL(π_old‖π), in nats per token, enforced by backtracking.", **PER_TOKEN)
    trust_max_kl_token: float | None = _trust(
        None, "Hard limit of the largest KL(π_old‖π) of one token of the batch, in nats, enforced by backtracking.", **OF_TOKEN)
    trust_max_kl_response: float | None = _trust(
        None, "Hard limit of the largest sum of KL(π_old‖π) over one response of the batch, in nats, enforced by "
        "backtracking.", **PER_RESPONSE)
    trust_lr_target: float | None = _trust(
        None, "Target of KL(π_old‖π), in nats per token: after a proposed KL above twice this the learning rate is divided by "
        "1.5, after one below half of it multiplied by 1.5.", **PER_TOKEN)

    # -- advantages and values ----------------------------------------------------------------------------------------
    advantage_estimator: AdvantageEstimator = _value(
        "gae", "Estimator of the advantages: 'gae' uses a value. 'grpo' subtracts the mean score of all responses to the "
        "same prompt, 'rloo' that of the other responses to it.")
    num_generations: int = _value(
        1, "Responses to each prompt, as in TRL's GRPO; the batch counts responses. At least 2 without 'gae'.",
        unit="responses", range=COUNT)
    scale_rewards: RewardScale = _value(
        "group", "What 'grpo' divides by, as in TRL: the standard deviation of the rewards of a 'group' or of the 'batch'; "
        "or 'none'.", off='"none"')
    gamma: float = _value(*_trl("gamma"), unit="1", range=_UP_TO_1)
    lam: float = _value(*_trl("lam"), unit="1", range=_UP_TO_1)
    whiten_rewards: bool = _value(*_trl("whiten_rewards"), off="False")
    whiten_advantages: bool | None = _value(
        None, "Whether advantages are whitened over the batch; None: with 'gae' alone.", off="False")
    score_position: ScorePosition = _value(
        "after_eos", "Position of the score: one after the end of a response, as in TRL, or its last token.")
    detach_value_head: bool = _value(
        True, "Whether the gradient of the value loss is kept out of the policy's backbone.", off="False")
    vf_coef: float = _value(*_trl("vf_coef"), unit="1", off="0", range=NOT_NEGATIVE)
    value_learning_rate: float | None = _value(
        None, "Learning rate of the value; None: the policy's.", unit="1", range=NOT_NEGATIVE)

    # -- optimising ---------------------------------------------------------------------------------------------------
    learning_rate: float = _run(*_trl("learning_rate"), unit="1", range=NOT_NEGATIVE)
    num_ppo_epochs: int = _run(*_trl("num_ppo_epochs"), unit="epochs", range=COUNT)
    num_mini_batches: int = _run(*_trl("num_mini_batches"), unit="mini-batches", range=COUNT)
    total_episodes: int | None = _run(*_trl("total_episodes"), unit="responses", range=Range("a positive integer"))

    # -- measuring, sampling, models ----------------------------------------------------------------------------------
    measure_fraction: float = _run(
        1.0, "Share of the micro-batches measured after an update.", unit="share",
        range=Range("in (0, 1]", lambda x: 0 < x <= 1), fix="There is no way to turn the measurement off.")
    attribution_every: int = _run(
        0, "Number of updates after which one is rerun without each mechanism in turn, to record the KL(π_old‖π) that it would "
        "have had; 0: never.", unit="updates", off="0", range=COUNT_OR_0, fix="0 turns it off.")
    dataset_num_proc: int | None = _run(*_trl("dataset_num_proc"), unit="processes", range=COUNT)
    local_rollout_forward_batch_size: int = _run(*_trl("local_rollout_forward_batch_size"), unit="prompts", range=COUNT)
    ds3_gather_for_generation: bool = _run(
        True, "With FSDP2 and ZeRO-3: whether all weights are gathered for a rollout. If not, each pass gathers them layer by "
        "layer, which is slower and takes no memory for all of them.", off="False")
    num_sample_generations: int = _run(*_trl("num_sample_generations"), unit="times", off="0")
    log_completions: bool = _run(
        False, "Whether the completions of an update are shown wherever metrics are logged: in a table in the terminal if rich "
        "is installed, and in Weights & Biases or Trackio if `report_to` names them. completions.jsonl has them in any case.",
        off="False")
    num_completions_to_print: int | None = _run(
        None, "Number of completions that log_completions prints; None: all.", unit="completions", range=COUNT)
    response_length: int = _run(*_trl("response_length"), unit="tokens", range=COUNT)
    temperature: float = _run(
        *_trl("temperature"), unit="1", range=POSITIVE, fix="Near-greedy sampling is temperature=0.01.")
    stop_token: Literal["eos", "none"] | None = _run(  # type: ignore[assignment]  # TRL has no "none"
        None, "'eos' or 'none'; None: 'eos' for text and chat prompts, 'none' for a dataset of input_ids, as in TRL.",
        off='"none"')
    stop_token_id: int | None = _run(*_trl("stop_token_id"), unit="token id", off="None", range=COUNT_OR_0)
    missing_eos_penalty: float | None = _run(
        *_trl("missing_eos_penalty"), unit="the score's", off="None", range=NOT_NEGATIVE)
    generation_kwargs: dict | str | None = _run(
        None, "Further arguments of generate(), or of vLLM's SamplingParams, as a dict or JSON."
    )
    chat_template_kwargs: dict | str | None = _run(
        None, "Further arguments of the chat template, as a dict or JSON: {'enable_thinking': False}.")
    reward_weights: list[float] | None = _run(
        None, "Weight of each reward function; None: 1 each.", unit="1",
        range=Range("a list of finite numbers, one for each reward function", is_finite))
    model_init_kwargs: dict | str | None = _run(
        None, "Arguments of from_pretrained() for models given by name, as a dict or JSON.")
    model_adapter_name: str | None = _run(*_trl("model_adapter_name"))
    ref_adapter_name: str | None = _run(*_trl("ref_adapter_name"))

    # -- when something goes wrong ------------------------------------------------------------------------------------
    panic_kl: float | None = _failure(
        None, "Roll back an update whose KL(π_old‖π), before any backtracking, exceeds this, in nats per token; None: never.",
        **PER_TOKEN)
    max_refused: int = _failure(
        5, "Save and end the run when this many updates in a row were rolled back.", unit="updates", range=COUNT)
    reward_retries: int = _failure(
        0, "How often a reward function that failed is called again, after 1, 2, 4, … seconds (60 at most).",
        unit="times", off="0", range=COUNT_OR_0, fix="0 turns retries off.")
    grace_seconds: float = _failure(
        20.0, "Seconds that the current update may take after SIGTERM or Ctrl-C before it is abandoned.", unit="s",
        range=NOT_NEGATIVE._replace(valid="a finite number of seconds >= 0"))
    # fmt: on

    writes_records: ClassVar[bool] = True
    """Tells callbacks that the trainer writes records and has controllers; TRL's configurations lack it."""

    def __post_init__(self) -> None:
        config_checks.name_scale(self)
        check_options(self)
        reject_unsupported(self)
        activation_checkpointing.adopt_fields(self)
        config_checks.check_batch(self)
        config_checks.choose_best(self)
        choose_bf16(self)
        if (
            self.world_size is None and engine_of(self) == "DeepSpeed"
        ):  # transformers reads it; this field hides its property
            self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        with rejected_by_transformers(only_transformers_checks(self)):
            super().__post_init__()
        reject_accelerator_config(self.accelerator_config)
        config_checks.check(self)
        reject_sharding_options(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as transformers saves and logs them: the Hub's tokens are masked."""
        return unmasked(self, super().to_dict())

    # What the trainer reads, so that each option is interpreted in one place.

    @property
    def low(self) -> float:
        """The clip range of the ratio is [1 − low, 1 + high]."""
        return self.cliprange

    @property
    def high(self) -> float:
        return self.cliprange if self.cliprange_high is None else self.cliprange_high

    @property
    def value_range(self) -> float | None:
        """Half the width of the value's clip range; None if the value loss is not clipped, or there is none."""
        return self.cliprange_value if self.clip_value and self.has_value else None

    @property
    def has_value(self) -> bool:
        """Whether a value is built and trained, and gives the advantages."""
        return self.advantage_estimator == "gae"

    @property
    def reward_scale(self) -> RewardScale:
        """`scale_rewards`, which is of 'grpo' alone."""
        return self.scale_rewards if self.advantage_estimator == "grpo" else "none"

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, with its default."""
        return self.has_value if self.whiten_advantages is None else self.whiten_advantages

    @property
    def norm_limit(self) -> float | None:
        """`max_grad_norm`, or None if it is off."""
        return self.max_grad_norm or None

    def build_kl_controller(self):
        return self.build_controller("kl")

    def build_trust_controller(self):
        return self.build_controller("trust")

    def build_lr_controller(self):
        """The controller of the factor on the learning rate; None if it is off."""
        return None if self.trust_lr_target is None else LearningRateByKL(self.trust_lr_target)

    @property
    def exact_anchor(self) -> bool:
        """Whether the anchor is the KL over the vocabulary in each context, instead of an estimate at the sampled token."""
        return self.kl_estimator == "exact"

    def build_kl_estimator(self):
        """(logp, ref_logp) -> [B, T]; None for `exact`, which is not estimated from samples."""
        return None if self.exact_anchor else build_estimator(self.kl_estimator, self.arguments("kl_estimator_kwargs"))

    @property
    def limits(self) -> Limits:
        """The hard limits of an update."""
        return Limits(
            self.trust_max_kl, self.panic_kl, self.trust_max_kl_token, self.trust_max_kl_response, self.anchor_max_kl
        )

    @property
    def keeps_reference(self) -> bool:
        """Whether π_ref at the tokens of a batch is used after scoring: by the loss, or by the measurement."""
        return self.anchor_max_kl is not None or (self.anchor_in_loss and self.exact_anchor)

    @property
    def prompt_seed(self) -> int:
        """The seed of the order of prompts."""
        return self.seed if self.data_seed is None else self.data_seed

    def renews_reference(self, update: int) -> bool:
        """Whether the reference is renewed after this update, which is counted from 1."""
        return self.sync_ref_model and update % self.ref_model_sync_steps == 0

    def build_penalties(self, anchor_coef: float, trust_coef: float) -> Penalties:
        """The KL terms of the loss, at the coefficients of the update."""
        return Penalties(
            anchor_coef=anchor_coef if self.anchor_in_loss else 0.0,
            anchor_estimator=self.build_kl_estimator(),
            anchor_offpolicy=self.kl_offpolicy,
            trust_coef=trust_coef,
            trust_estimator=None if self.trust_estimator == "exact" else ESTIMATORS[self.trust_estimator],
        )

    @property
    def anchored(self) -> bool:
        """Whether there is an anchor."""
        return self.kl_coef > 0 or self.kl_controller != "fixed"

    @property
    def anchor_in_reward(self) -> bool:
        return self.kl_placement != "loss"

    @property
    def anchor_in_loss(self) -> bool:
        return self.anchored and self.kl_placement != "reward"

    @property
    def aggregation(self) -> Aggregation:
        """`loss_aggregation`, with the default of the clip rule."""
        return self.loss_aggregation or ("sequence_mean" if self.clip_rule in ("gspo", "gmpo") else "token_mean")

    def build_surrogate(self, clip: bool = True):
        """The rule of `clip_rule`; without `clip` the rule "none"."""
        if not clip:
            return build_surrogate("none", low=self.low, high=self.high)
        return build_surrogate(self.clip_rule, low=self.low, high=self.high, kwargs=self.arguments("clip_kwargs"))

    def arguments(self, name: str) -> dict[str, Any]:
        """A field that holds arguments, such as "clip_kwargs", as a dict; empty where it is None."""
        return getattr(self, name) or {}

    def build_controller(self, prefix: str):
        """The controller of `kl_coef` or `trust_coef`; `prefix`: "kl" or "trust"."""
        name = getattr(self, f"{prefix}_controller")
        kwargs = dict(getattr(self, f"{prefix}_controller_kwargs") or {})
        for key in ("coef", "target"):
            if key in kwargs:
                raise ConfigError(f"`{prefix}_controller_kwargs` got {key!r}; set `{prefix}_{key}` instead.")
        if prefix == "kl" and name == "adaptive":
            kwargs.setdefault("horizon", self.kl_horizon)
        coef, target = getattr(self, f"{prefix}_coef"), getattr(self, f"{prefix}_target")
        return build_controller(name, coef=coef, target=target, field=prefix, **kwargs)
