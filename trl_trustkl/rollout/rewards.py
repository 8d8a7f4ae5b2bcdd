"""Reward functions: callables with GRPO's signature, which may be async, and reward models."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, NonFiniteRewardError, RewardError, shown
from ..parallel.engines import load_everywhere
from ..policy.loading import load_scalar_model, of_tokenizer, without_adapter
from ..policy.micro_batches import positions
from ..types import Rollout
from .chat_template import ends_with_assistant, is_chat, text_of
from .prompts import context_length

LARGEST_REWARD = torch.finfo(torch.float32).max
"""Scores are kept in float32."""

RewardFunc: TypeAlias = str | PreTrainedModel | Callable[..., Sequence[float | None]]
Tokenizers: TypeAlias = list[PreTrainedTokenizerBase | None] | tuple[PreTrainedTokenizerBase | None, ...]


class RewardModel:
    """A sequence classifier with one label as a reward: its score at the last token of prompt and response.

    With a tokenizer, the model reads the text; without one, it reads the policy's token ids. A sampled `padding_id`, for
    which it may have no embedding, is masked then, as in TRL.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None,
        padding_id: int | None = None,
    ) -> None:
        load_everywhere(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.padding_id = padding_id
        self._cannot_pad = False
        self._pads_with_eos = False
        if tokenizer is not None:
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
                self._pads_with_eos = hasattr(without_adapter(model), "score")
            config = model.config.get_text_config()
            config.pad_token_id = tokenizer.pad_token_id
            # A pad token without an embedding; a single row has no padding.
            self._cannot_pad = tokenizer.pad_token_id >= getattr(config, "vocab_size", math.inf)
        self.__name__ = type(model).__name__

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: list[Any], completions: list[Any], batch_size: int) -> list[float]:
        """The scores of a rollout; `batch_size` rows are read at a time."""
        if self._cannot_pad:
            batch_size = 1
        parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        if self.tokenizer is None:
            scores = [self._score_ids(rollout, rows) for rows in parts]
        else:
            scores = [self.score_text(prompts[rows], completions[rows]) for rows in parts]
        return torch.cat(scores).tolist()

    @torch.no_grad()
    def score_text(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        tokenizer, device = self.tokenizer, next(self.model.parameters()).device
        assert tokenizer is not None
        texts = [as_text(*pair, tokenizer) for pair in zip(prompts, completions, strict=True)]
        # A chat template writes the special tokens itself.
        special = not is_chat(prompts[0]) or tokenizer.chat_template is None
        if special and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:  # or it would come twice
            texts = [text.removeprefix(str(tokenizer.bos_token)) for text in texts]
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special
        ).to(device)
        if (length := inputs["input_ids"].shape[1]) > (context := context_length(self.model)):
            raise RewardError(
                f"a prompt with its response is {length} tokens of the reward model `{self.__name__}`, more than its context "
                f"of {context}; drop the longest prompts, or lower response_length."
            )
        if self._pads_with_eos:  # the model itself would take a final eos for padding, and score the token before it
            return self._score_last(inputs["input_ids"], inputs["attention_mask"])
        return self.model(**inputs).logits[:, 0].float()

    def _score_ids(self, rollout: Rollout, rows: slice) -> Tensor:
        ids = torch.cat([rollout.prompt_ids[rows], rollout.response_ids[rows]], dim=1)
        mask = torch.cat([rollout.prompt_mask[rows], rollout.response_mask[rows]], dim=1)
        known = self.model.get_input_embeddings().weight.shape[0]
        if self.padding_id is not None and self.padding_id >= known:
            mask = mask & (ids != self.padding_id)
        if (largest := int((ids * mask).max())) >= known:  # for example if the policy's vocabulary is padded
            raise RewardError(
                f"the policy sampled the token {largest}, and the vocabulary of the reward model `{self.__name__}` is 0 to "
                f"{known - 1}; give its tokenizer in `reward_processing_classes`, so that it reads the text."
            )
        return self._score_last(ids * mask, mask)

    def _score_last(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The score at the last token that is not masked."""
        classifier: Any = without_adapter(self.model)
        backbone = getattr(classifier, classifier.base_model_prefix)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions(mask)}
        states = backbone(**inputs, use_cache=False).last_hidden_state
        last = mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
        return classifier.score(states[torch.arange(len(ids), device=ids.device), last])[:, 0].float()


def as_text(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt with its completion for a reward model with a tokenizer."""
    if not is_chat(prompt):
        return prompt + completion
    if tokenizer.chat_template is None:
        return "\n".join(text_of(message) for message in [*prompt, *completion])
    if ends_with_assistant(prompt) and isinstance(prompt[-1].get("content"), str):
        continued = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
        prompt, completion = prompt[:-1], [continued]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def build_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | tuple[RewardFunc, ...] | None,
    reward_processing_classes: PreTrainedTokenizerBase | Tokenizers | None,
    *,
    weights: list[float] | None,
    init_kwargs: dict[str, Any] | None,
    vocab_size: int,
    padding_id: int | None = None,
) -> tuple[list[Callable | RewardModel], list[float]]:
    """Callables and reward models ready to use, and the weight of each. `vocab_size`: the tokens of the tokenizer that the
    policy can read. `padding_id`: one that only pads."""
    funcs = [func for func in _as_list(reward_funcs) if func is not None]
    if not funcs:
        raise ConfigError("`reward_funcs` got nothing; give a function, a reward model, or a list of them.")
    tokenizers = [None] * len(funcs) if reward_processing_classes is None else _as_list(reward_processing_classes)
    if len(tokenizers) != len(funcs):
        raise ConfigError(
            f"`reward_processing_classes` got {len(tokenizers)} for {len(funcs)} reward functions; give one for each "
            "(None for a callable)."
        )
    weights = [1.0] * len(funcs) if weights is None else list(weights)
    if len(weights) != len(funcs):
        raise ConfigError(f"`reward_weights` got {len(weights)} for {len(funcs)} reward functions; give one for each.")
    pairs = zip(funcs, tokenizers, strict=True)
    return [_as_reward(f, t, init_kwargs, vocab_size, padding_id) for f, t in pairs], weights


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _as_reward(
    func: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    init_kwargs: dict[str, Any] | None,
    vocab_size: int,
    padding_id: int | None,
) -> Callable | RewardModel:
    if isinstance(func, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(func, **of_tokenizer(init_kwargs))
        return RewardModel(load_scalar_model(func, init_kwargs), tokenizer)
    if not callable(func):
        raise ConfigError(f"`reward_funcs` got {func!r}; each must be a callable, a reward model or the name of one.")
    if not isinstance(func, nn.Module):
        return func
    model: Any = func  # of transformers, or any module that behaves like one
    kind = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise ConfigError(
            f"`reward_funcs` got a {kind}, which is a module of torch and no model of transformers; give a function that calls "
            "it: def reward(prompts, completions, **columns) -> list of numbers."
        )
    base: Any = without_adapter(model)
    if not hasattr(base, "score") and getattr(base, "can_generate", bool)():
        raise ConfigError(
            f"`reward_funcs` got a {type(base).__name__}, which generates text and gives no score; a reward model is a "
            "sequence classifier with one label (num_labels=1). To score with a language model, give a function."
        )
    if (labels := getattr(getattr(model, "config", None), "num_labels", 1)) != 1:
        raise ConfigError(
            f"`reward_funcs` got a {kind} with {labels} labels; a reward model has 1 (num_labels=1). For a "
            "classifier with several, give a function that returns the logit or probability to use as the reward."
        )
    if tokenizer is None and not (hasattr(base, "score") and hasattr(base, getattr(base, "base_model_prefix", ""))):
        raise ConfigError(
            f"`reward_processing_classes` got None for a {type(base).__name__}, which cannot read the policy's token ids; give "
            "the model's own tokenizer, and it reads the text."
        )
    needed = vocab_size - (padding_id == vocab_size - 1)
    if tokenizer is None and (known := model.get_input_embeddings().weight.shape[0]) < needed:
        raise ConfigError(
            f"`reward_processing_classes` got None for a reward model with {known} embeddings, fewer than the policy's "
            f"{vocab_size} tokens; give the reward model's own tokenizer."
        )
    return RewardModel(model, tokenizer, padding_id)


def token_readers(funcs: list[Callable | RewardModel]) -> dict[str, PreTrainedModel | PeftModel]:
    """The reward models that read the policy's token ids, by their position in `reward_funcs`."""
    return {
        f"reward_funcs[{index}]": func.model
        for index, func in enumerate(funcs)
        if isinstance(func, RewardModel) and func.tokenizer is None
    }


def reward_name(func: Any) -> str:
    return getattr(func, "__name__", None) or type(func).__name__


def rewards_of(
    func: Callable | RewardModel,
    rollout: Rollout,
    prompts: list[Any],
    completions: list[Any],
    keywords: dict[str, Any],
    batch_size: int,
) -> list[float | None]:
    """The rewards that one function or model gives to the completions, validated."""
    if isinstance(func, RewardModel):
        try:
            rewards: Any = func.score(rollout, prompts, completions, batch_size)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward model `{func.__name__}` raised {type(error).__name__}: {error}") from error
    else:
        rewards = _call(func, prompts, completions, keywords)
    return _validated(rewards, len(completions), reward_name(func))


def _call(func: Callable, prompts: list[Any], completions: list[Any], keywords: dict[str, Any]) -> Any:
    """Call a reward function with the keywords that it takes; await the result of an async one.

    It gets copies, and autograd's mode is restored, so that its changes reach neither other functions nor the trainer.
    """
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(func).parameters
    except (TypeError, ValueError):  # a function written in C may have no signature
        parameters = {}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        keywords = {name: value for name, value in keywords.items() if name in parameters}
    deep = (
        "prompts",
        "completions",
        "completion_ids",
    )  # a column of the dataset may hold objects that cannot be deep-copied
    given = {
        name: copy.deepcopy(value) if name in deep else copy.copy(value)
        for name, value in {**keywords, "prompts": prompts, "completions": completions}.items()
    }
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            result = func(**given)
            return _awaited(result) if inspect.isawaitable(result) else result
    except (Exception, asyncio.CancelledError) as error:
        raise RewardError(f"reward function `{reward_name(func)}` raised {type(error).__name__}: {error}") from error


def _awaited(awaitable: Any) -> Any:
    """The result, awaited in another thread: event loops cannot be nested, and a notebook already runs one."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _validated(rewards: Any, expected: int, name: str) -> list[float | None]:
    """The rewards as floats and None; RewardError for anything else."""
    if isinstance(rewards, Tensor):
        rewards = rewards.detach().cpu()
    if hasattr(rewards, "reshape") and tuple(getattr(rewards, "shape", None) or ()) == (expected, 1):
        rewards = rewards.reshape(expected)
    if isinstance(rewards, (str, bytes, dict, set, frozenset)) or not hasattr(rewards, "__iter__"):
        raise RewardError(
            f"reward function `{name}` returned {type(rewards).__name__}; it must return a list of {expected} values, each a "
            "number or None."
        )
    try:
        given = list(islice(rewards, expected + 1))  # a generator may be infinite
    except Exception as error:
        raise RewardError(f"reward function `{name}` raised {type(error).__name__}: {error}") from error
    if len(given) != expected:
        at_least = "at least " if len(given) > expected else ""
        count = len(rewards) if hasattr(rewards, "__len__") else f"{at_least}{len(given)}"
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
