"""The models and data of a run, checked and ready, before there is an accelerator."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ..policy import loading
from ..policy.reference import Reference, build_reference
from ..policy.value_head import PolicyAndValue
from ..rollout import sampling
from ..rollout.prompts import TokenLimits, prepare_datasets, token_limits
from ..rollout.rewards import build_rewards, token_readers
from .config import TrustKLPPOConfig


class Models(NamedTuple):
    """trained: policy and value. reward_funcs, reward_weights: the reward functions with their weights. token_limits: what
    a prompt and its response have to fit into. stop_ids: the tokens that end a response. train, evaluation: the datasets
    with token ids."""

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
    args: TrustKLPPOConfig,
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: Any,
    value_model: Any,
    peft_config: PeftConfig | None,
    reward_funcs: Any,
    reward_processing_classes: Any,
    train: Any,
    evaluation: Any,
    tags: list[str],
) -> Models:
    """Load what is given by name, and check everything against each other. The arguments are the trainer's; `tags` are
    those of the model on the hub."""
    policy, tokenizer = loading.load_policy(model, tokenizer, args, peft_config)
    if hasattr(policy, "add_model_tags"):
        policy.add_model_tags(tags)
    funcs, weights = build_rewards(
        reward_funcs,
        reward_processing_classes,
        weights=args.reward_weights,
        init_kwargs=args.arguments("model_init_kwargs"),
        vocab_size=len(tokenizer),
    )
    value = loading.prepare_value_model(value_model, args)
    trained = PolicyAndValue(policy, value, temperature=args.temperature, detach_value=args.detach_value_head)
    reference = build_reference(
        policy,
        trained.split_lm,
        loading.load_causal_lm(ref_model, args.arguments("model_init_kwargs"))
        if isinstance(ref_model, str)
        else ref_model,
        ref_adapter_name=args.ref_adapter_name,
        new_adapter=peft_config is not None,
    )
    limits = token_limits(policy, {"ref_model": reference.model, "value_model": value, **token_readers(funcs)})
    train, evaluation = prepare_datasets(train, evaluation, tokenizer, limits, args)
    stops = sampling.stop_ids(policy, tokenizer, args, text="prompt" in train.column_names)
    return Models(trained, reference, tokenizer, funcs, weights, limits, stops, train, evaluation)
