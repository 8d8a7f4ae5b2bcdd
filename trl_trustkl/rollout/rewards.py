"""Reward functions: callables with GRPO's signature, async ones, and reward models."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias, TypeGuard

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, NonFiniteRewardError, RewardError, shown
from ..policy.loading import load_scalar_model
from ..policy.micro_batches import positions
from ..types import Rollout
from .prompts import context_length, is_chat

LARGEST_REWARD = torch.finfo(torch.float32).max
"""Scores are kept in float32."""


RewardFunc: TypeAlias = str | PreTrainedModel | Callable[..., Sequence[float | None]]
Tokenizers: TypeAlias = list[PreTrainedTokenizerBase | None] | tuple[PreTrainedTokenizerBase | None, ...]


class RewardModel:
    """A sequence classifier with one label as a reward: its score at the last token of prompt and response.

    With a tokenizer of its own the text is encoded again; without one it reads the policy's token ids.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.__name__ = type(model).__name__

    @torch.no_grad()
    def score_text(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        tokenizer, device = self.tokenizer, next(self.model.parameters()).device
        assert tokenizer is not None  # a model without one is asked by `score_ids`
        texts = [
            as_text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        # A chat template writes the special tokens itself.
        special = not is_chat(prompts[0]) or tokenizer.chat_template is None
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special
        ).to(device)
        if (length := inputs["input_ids"].shape[1]) > (context := context_length(self.model)):
            raise RewardError(
                f"a prompt with its response is {length} tokens of the reward model `{self.__name__}`, more than its context "
                f"of {context}; drop the longest prompts, or lower response_length."
            )
        return self.model(**inputs).logits[:, 0].float()

    @torch.no_grad()
    def score_ids(self, rollout: Rollout, rows: slice) -> Tensor:
        ids = torch.cat([rollout.prompt_ids[rows], rollout.response_ids[rows]], dim=1)
        mask = torch.cat([rollout.prompt_mask[rows], rollout.response_mask[rows]], dim=1)
        known = self.model.get_input_embeddings().weight.shape[0]
        if (largest := int((ids * mask).max())) >= known:  # in the rows that pad a policy's vocabulary, for example
            raise RewardError(
                f"the policy sampled the token {largest}, and the reward model `{self.__name__}` knows 0 to {known - 1}; give "
                "it a tokenizer of its own in `reward_processing_classes`, so that it reads the text."
            )
        classifier: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        backbone = getattr(classifier, classifier.base_model_prefix)
        inputs = {"input_ids": ids * mask, "attention_mask": mask.long(), "position_ids": positions(mask)}
        states = backbone(**inputs, use_cache=False).last_hidden_state
        last = mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
        return classifier.score(states[torch.arange(len(ids), device=ids.device), last])[:, 0].float()


def as_text(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a reward model reads with a tokenizer of its own."""
    if not is_chat(prompt):
        return prompt + completion
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in [*prompt, *completion])
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def build_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | tuple[RewardFunc, ...] | None,
    reward_processing_classes: PreTrainedTokenizerBase | Tokenizers | None,
    *,
    weights: list[float] | None,
    init_kwargs: dict[str, Any] | None,
    vocab_size: int,
) -> tuple[list[Callable | RewardModel], list[float]]:
    """Callables and reward models ready to use, and the weight of each. `vocab_size` is the policy's tokenizer's."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    funcs = [f for f in funcs if f is not None]
    if not funcs:
        raise ConfigError("`reward_funcs` got nothing; give a function, a reward model, or a list of them.")
    tokenizers = (
        list(reward_processing_classes)
        if isinstance(reward_processing_classes, (list, tuple))
        else [reward_processing_classes] * (len(funcs) if reward_processing_classes is None else 1)
    )
    if len(tokenizers) != len(funcs):
        raise ConfigError(
            f"`reward_processing_classes` got {len(tokenizers)} for {len(funcs)} reward functions; give one for each "
            "(None for a callable)."
        )
    weights = [1.0] * len(funcs) if weights is None else list(weights)
    if len(weights) != len(funcs):
        raise ConfigError(f"`reward_weights` got {len(weights)} for {len(funcs)} reward functions; give one for each.")
    return [_as_reward(f, t, init_kwargs, vocab_size) for f, t in zip(funcs, tokenizers, strict=True)], weights


def _as_reward(
    func: Any, tokenizer: PreTrainedTokenizerBase | None, init_kwargs: dict[str, Any] | None, vocab_size: int
) -> Callable | RewardModel:
    if isinstance(func, str):
        return RewardModel(load_scalar_model(func, init_kwargs), tokenizer or AutoTokenizer.from_pretrained(func))
    if _is_model(func):
        if (labels := getattr(getattr(func, "config", None), "num_labels", 1)) != 1:
            raise ConfigError(
                f"`reward_funcs` got a {type(func).__name__} with {labels} labels; a reward model has 1 (num_labels=1). Of a "
                "classifier with several give a function that returns the logit or probability that is to be the reward."
            )
        if tokenizer is None and func.get_input_embeddings().weight.shape[0] < vocab_size:
            raise ConfigError(
                f"`reward_processing_classes` got None for a reward model with {func.get_input_embeddings().weight.shape[0]} "
                f"embeddings, fewer than the policy's {vocab_size} tokens; give the reward model's own tokenizer."
            )
        return RewardModel(func, tokenizer)
    if not callable(func):
        raise ConfigError(f"`reward_funcs` got {func!r}; each must be a callable, a reward model or the name of one.")
    return func


def _is_model(func: Any) -> TypeGuard[PreTrainedModel | PeftModel]:
    """Any module counts, one that only behaves like a model of transformers too."""
    return isinstance(func, nn.Module)


def token_readers(funcs: list[Callable | RewardModel]) -> dict[str, PreTrainedModel | PeftModel]:
    """The reward models that read the policy's token ids, by where they stand."""
    return {
        f"reward_funcs[{index}]": func.model
        for index, func in enumerate(funcs)
        if isinstance(func, RewardModel) and func.tokenizer is None
    }


def reward_name(func: Any) -> str:
    return getattr(func, "__name__", None) or type(func).__name__


def rewards_of(
    func: Any,
    rollout: Rollout,
    prompts: list[Any],
    completions: list[Any],
    keywords: dict[str, Any],
    batch_size: int,
) -> list[float | None]:
    """What one function or model says of the completions, checked."""
    if isinstance(func, RewardModel):
        rewards = _score_by_model(func, rollout, prompts, completions, batch_size).cpu().tolist()
    else:
        rewards = _call(func, prompts, completions, keywords)
    return _checked(rewards, len(completions), reward_name(func))


def _score_by_model(
    model: RewardModel, rollout: Rollout, prompts: list[Any], completions: list[Any], batch_size: int
) -> Tensor:
    rows = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    if model.tokenizer is None:
        return torch.cat([model.score_ids(rollout, part) for part in rows])
    return torch.cat([model.score_text(prompts[part], completions[part]) for part in rows])


def _call(func: Callable, prompts: list[Any], completions: list[Any], keywords: dict[str, Any]) -> Any:
    """Call a reward function with the keywords it takes, and wait for it where it is async.

    It gets copies, and leaves autograd as it was: what it changes reaches neither the next function nor the trainer.
    """
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):  # written in C, it does not tell
        parameters = []
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        keywords = {name: value for name, value in keywords.items() if name in names}
    given = {name: copy.copy(value) for name, value in keywords.items()}  # a column may hold what has no deep copy
    given |= {"prompts": copy.deepcopy(prompts), "completions": copy.deepcopy(completions)}
    if "completion_ids" in given:
        given["completion_ids"] = copy.deepcopy(keywords["completion_ids"])
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            result = func(**given)
            return _wait_for(result) if inspect.isawaitable(result) else result
    except (Exception, asyncio.CancelledError) as error:
        raise RewardError(f"reward function `{reward_name(func)}` raised {type(error).__name__}: {error}") from error


def _wait_for(awaitable: Any) -> Any:
    """Its result, from a thread of its own: a notebook has an event loop running already, and a loop cannot be nested."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _checked(rewards: Any, expected: int, name: str) -> list[float | None]:
    """The rewards as floats and None, or a RewardError that says what was wrong with them."""
    if isinstance(rewards, Tensor):
        rewards = rewards.detach().cpu()
    if (
        (shape := getattr(rewards, "shape", None)) is not None
        and tuple(shape) == (expected, 1)
        and hasattr(rewards, "reshape")
    ):
        rewards = rewards.reshape(expected)
    if isinstance(rewards, (str, bytes, dict, set, frozenset)) or not hasattr(rewards, "__iter__"):
        raise RewardError(
            f"reward function `{name}` returned {type(rewards).__name__}; it must return a list of {expected} numbers or None."
        )
    try:
        given = list(islice(rewards, expected + 1))  # a generator may have no end
    except Exception as error:
        raise RewardError(f"reward function `{name}` raised {type(error).__name__}: {error}") from error
    if len(given) != expected:
        sized = hasattr(rewards, "__len__")
        count = len(rewards) if sized else f"{'at least ' if len(given) > expected else ''}{len(given)}"
        raise RewardError(f"reward function `{name}` returned {count} rewards for {expected} completions.")
    return [_as_float(reward, index, name) for index, reward in enumerate(given)]


def _as_float(reward: Any, index: int, name: str) -> float | None:
    if reward is None:
        return None
    try:
        if isinstance(reward, (str, bytes)) or getattr(reward, "ndim", 0) > 0:
            raise TypeError
        value = float(reward)
    except OverflowError:
        value = math.inf
    except Exception:
        raise RewardError(
            f"reward function `{name}` returned {shown(reward)} for completion {index}; not a number."
        ) from None
    if not abs(value) <= LARGEST_REWARD:
        raise NonFiniteRewardError(
            f"reward function `{name}` returned {shown(reward)} for completion {index}; a reward must be finite, or None to "
            "leave the completion out."
        )
    return value


def as_completion(text: str, prompt: Any) -> str | list[dict[str, str]]:
    """A completion in the format of its prompt: text, or one assistant message."""
    return [{"role": "assistant", "content": text}] if is_chat(prompt) else text
