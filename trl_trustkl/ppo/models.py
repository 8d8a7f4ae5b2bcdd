"""The models and datasets of a run, loaded and checked before the trainer has an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..errors import ConfigError, ModelError
from ..parallel.engines import load_everywhere
from ..policy import loading, probes
from ..policy.precision import avoid_bf16
from ..policy.reference import Reference, build_reference, warn_of_unsaved
from ..policy.value_head import PolicyAndValue
from ..rollout import sampling
from ..rollout.prompt_stream import PromptStream
from ..rollout.prompts import TokenLimits, prepare_datasets, prepare_row, token_limits
from ..rollout.rewards import build_rewards, token_readers
from .config import TrustKLPPOConfig
from .setup import check_inputs


class Models(NamedTuple):
    """trained: policy and value. token_limits: what a prompt and its response have to fit into. stop_ids: the tokens that
    end a response. train, evaluation: the datasets with token ids. stream: the rows of `train` if it is an IterableDataset."""

    trained: PolicyAndValue
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    reward_funcs: list[Any]
    reward_weights: list[float]
    token_limits: TokenLimits
    stop_ids: list[int]
    train: Dataset | IterableDataset
    stream: PromptStream | None
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
    check_inputs(args, evaluation, value_model)
    given = reward_funcs if reward_model is None else reward_model
    _check_sharing(model, value_model, given if isinstance(given, (list, tuple)) else [given])
    set_seed(args.seed)  # adapters and value heads are initialised randomly
    policy, tokenizer = loading.load_policy(model, tokenizer, args)
    start = None if peft_config is None else probes.logits(policy)
    policy = loading.prepare_policy(policy, peft_config, args)
    warn_of_unsaved(policy)
    if hasattr(policy, "add_model_tags"):
        policy.add_model_tags(tags)
    elsewhere = loading.of_other_repository(init_kwargs := loading.init_kwargs_of(args))
    padding_id, known = loading.padding_only(tokenizer), policy.get_input_embeddings().weight.shape[0]
    funcs, weights = build_rewards(
        given, reward_processing_classes, weights=args.reward_weights, init_kwargs=elsewhere,
        vocab_size=min(len(tokenizer), known), padding_id=padding_id,
    )  # fmt: skip
    value = loading.prepare_value_model(value_model, args, init_kwargs if value_model == model else elsewhere)
    trained = PolicyAndValue(
        policy, value, temperature=args.temperature, detach_value=args.detach_value_head, padding_id=padding_id,
        has_value=args.has_value,
    )  # fmt: skip
    ref_model = _given_reference(ref_model, args, init_kwargs if ref_model == model else elsewhere)
    _check_reference(policy, ref_model)
    reference = build_reference(
        policy, trained.split_lm, ref_model,
        ref_adapter_name=args.ref_adapter_name, start=start, renewed=args.sync_ref_model,
    )  # fmt: skip
    limits = token_limits(policy, {"ref_model": reference.model, "value_model": value, **token_readers(funcs)})
    train, evaluation = prepare_datasets(train, evaluation, tokenizer, limits, args)
    stream = _stream(train, tokenizer, limits, args) if isinstance(train, IterableDataset) else None
    columns = train.column_names if stream is None else stream[0]
    stops = sampling.stop_ids(policy, tokenizer, args, text="prompt" in columns)
    return Models(trained, reference, tokenizer, funcs, weights, limits, stops, train, stream, evaluation)


def _check_sharing(policy: Any, value_model: Any, rewards: Sequence[Any]) -> None:
    """ModelError for models that share weights, where training one would change the other."""
    models = {"model": policy, "value_model": value_model}
    models |= {f"reward_funcs[{index}]": func for index, func in enumerate(rewards)}
    weights = {name: set(map(id, model.parameters())) for name, model in models.items() if isinstance(model, nn.Module)}
    for one, other in combinations(weights, 2):
        if weights[one] & weights[other] and one in ("model", "value_model"):
            raise ModelError(
                f"`{other}` shares weights with `{one}`, which is trained: training would change both. Pass a separate "
                "model, such as copy.deepcopy(model); with value_model=None, the value is a head on the policy."
            )


def _given_reference(ref_model: Any, args: TrustKLPPOConfig, init_kwargs: dict[str, Any]) -> Any:
    """`ref_model`, which is loaded if it is a name."""
    if isinstance(ref_model, str):
        ref_model = loading.load_causal_lm(ref_model, init_kwargs)
    load_everywhere(ref_model)
    avoid_bf16(ref_model, args, name="ref_model")
    return ref_model


def _check_reference(policy: nn.Module, ref_model: Any) -> None:
    """ModelError for a reference that would change with the policy."""
    shared = isinstance(ref_model, nn.Module) and {*map(id, loading.trainable(policy))} & {
        *map(id, ref_model.parameters())
    }
    if shared:
        raise ModelError(
            "`ref_model` shares weights with `model` that are trained: the reference would change with the policy, and the KL "
            "stay 0. Pass a separate model, or None and the trainer makes the reference."
        )


def _stream(train: IterableDataset, tokenizer: PreTrainedTokenizerBase, limits: TokenLimits, args: Any) -> PromptStream:
    """The rows of a stream. Raises ConfigError without `max_steps`."""
    if args.max_steps < 1:
        raise ConfigError(
            f"`max_steps` got {args.max_steps} with a `train_dataset` that is an IterableDataset, which has no length; set the "
            "number of updates."
        )
    return PromptStream(train, args.prompt_seed, partial(prepare_row, tokenizer=tokenizer, limits=limits, args=args))
