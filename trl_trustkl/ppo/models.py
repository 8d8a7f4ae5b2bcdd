"""The models and datasets of a run, loaded and checked before the trainer has an accelerator."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, set_seed

from ..errors import ConfigError, ModelError
from ..policy import loading, probes
from ..policy.reference import Reference, build_reference
from ..policy.value_head import PolicyAndValue
from ..rollout import sampling
from ..rollout.prompts import TokenLimits, prepare_datasets, token_limits
from ..rollout.rewards import build_rewards, token_readers
from .config import TrustKLPPOConfig
from .setup import check_inputs


class Models(NamedTuple):
    """trained: policy and value. token_limits: what a prompt and its response have to fit into. stop_ids: the tokens that
    end a response. train, evaluation: the datasets with token ids."""

    trained: PolicyAndValue
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    reward_funcs: list[Any]
    reward_weights: list[float]
    token_limits: TokenLimits
    stop_ids: list[int]
    train: Dataset
    evaluation: Dataset | dict[str, Dataset] | None


def prepare(
    args: Any,
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: Any,
    value_model: Any,
    peft_config: PeftConfig | None,
    reward_model: Any,
    reward_funcs: Any,
    reward_processing_classes: Any,
    train: Any,
    evaluation: Any,
    tags: list[str],
) -> Models:
    """Load the models that are given by name, and check that all of them fit together.

    The arguments are the trainer's; `tags` are those of the policy on the Hub.
    """
    if not isinstance(args, TrustKLPPOConfig):
        raise ConfigError(f"`args` got {type(args).__name__}; it must be a TrustKLPPOConfig.")
    if model is None or train is None:
        raise ConfigError(f"`{'model' if model is None else 'train_dataset'}` got None; it is required.")
    if ref_model is model and not isinstance(model, str):
        raise ModelError("`ref_model` is the model itself; give a copy, or None and the trainer makes the reference.")
    if reward_model is not None and reward_funcs is not None:
        raise ConfigError("`reward_model` and `reward_funcs` were both given; put the model into `reward_funcs`.")
    check_inputs(args, evaluation)
    set_seed(args.seed)  # adapters and value heads are initialised randomly
    policy, tokenizer = loading.load_policy(model, tokenizer, args)
    start = None if peft_config is None else probes.logits(policy)
    policy = loading.prepare_policy(policy, peft_config, args)
    if hasattr(policy, "add_model_tags"):
        policy.add_model_tags(tags)
    init_kwargs = args.arguments("model_init_kwargs")
    elsewhere = loading.of_other_repository(init_kwargs)
    funcs, weights = build_rewards(
        reward_funcs if reward_model is None else reward_model, reward_processing_classes, weights=args.reward_weights,
        init_kwargs=elsewhere, vocab_size=len(tokenizer),
    )  # fmt: skip
    value = loading.prepare_value_model(value_model, args, init_kwargs if value_model == model else elsewhere)
    trained = PolicyAndValue(policy, value, temperature=args.temperature, detach_value=args.detach_value_head)
    if isinstance(ref_model, str):
        ref_model = loading.load_causal_lm(ref_model, init_kwargs if ref_model == model else elsewhere)
    reference = build_reference(
        policy, trained.split_lm, ref_model, ref_adapter_name=args.ref_adapter_name, start=start
    )
    limits = token_limits(policy, {"ref_model": reference.model, "value_model": value, **token_readers(funcs)})
    train, evaluation = prepare_datasets(train, evaluation, tokenizer, limits, args)
    stops = sampling.stop_ids(policy, tokenizer, args, text="prompt" in train.column_names)
    return Models(trained, reference, tokenizer, funcs, weights, limits, stops, train, evaluation)
