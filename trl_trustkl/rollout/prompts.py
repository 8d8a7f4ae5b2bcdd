"""From a dataset to batches of prompts: text, chat messages or token ids, left-padded, in a seeded order."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import compress, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

import torch
from datasets import Dataset, IterableDataset
from datasets.config import HF_DATASETS_CACHE
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ConfigError, DataError, shown
from ..masking import kept
from ..run.rng import generator
from ..types import Prompts, Rollout
from .chat_template import check_template_kwargs, is_chat, is_message, render, template_kwargs_of, tools_of, unread_part
from .prompt_stream import rows_of_stream

logger = logging.get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

IDS = "input_ids"


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    num_proc: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """The dataset with a column `input_ids`, made from its column `prompt` (text or messages) if it has one.

    Messages are rendered with the columns `tools` and `chat_template_kwargs`, as in TRL, and with `template_kwargs`.

    Raises DataError: empty dataset, no usable column, images, a prompt that is neither text nor messages, or an empty one.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"`{name}` got {type(dataset).__name__}; it must be a datasets.Dataset or IterableDataset: one split of a "
            "DatasetDict, such as dataset['train']."
        )
    if len(dataset) == 0:
        raise DataError(f"`{name}` is empty; it must have at least one row with a prompt.")
    columns = dataset.column_names
    if not _has_prompts(columns, name, template_kwargs):
        return dataset

    def encode(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        return {IDS: _ids_of(row, f"`{name}` row {index}", tokenizer, template_kwargs)}

    if "attention_mask" in columns:  # it belongs to other token ids
        dataset = dataset.remove_columns("attention_mask")
    return dataset.map(
        encode, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name}", cache_file_name=_cache_file(dataset)
    )


def prepare_row(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, limits: TokenLimits, args: Any
) -> dict[str, Any]:
    """A row of a stream of training prompts, with token ids, checked as `prepare_datasets` checks those of a dataset."""
    name, where = "train_dataset", f"`train_dataset` row {index}"
    template_kwargs = getattr(args, "chat_template_kwargs", None)
    check_template_kwargs(template_kwargs or {}, tokenizer, "`chat_template_kwargs`")
    if _has_prompts(list(row), name, template_kwargs):
        row = {key: value for key, value in row.items() if key != "attention_mask"}
        row[IDS] = _ids_of(row, where, tokenizer, template_kwargs)
    _check_prompt(row, where, limits, args.response_length)
    return row


def _has_prompts(columns: list[str], name: str, template_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether the rows have a prompt to tokenize; False for token ids. DataError for columns that this trainer cannot use."""
    if images := [column for column in ("image", "images") if column in columns]:
        raise DataError(
            f"`{name}` has the column {images[0]!r}, and this trainer passes no images to the policy; train on prompts of "
            f"text, with dataset.remove_columns({images[0]!r}). A column for reward functions needs another name."
        )
    if "prompt" not in columns:
        if IDS in columns:
            _check_unused(template_kwargs, f"`{name}` has token ids")
            return False
        raise DataError(f"`{name}` has the columns {columns}; it must have 'prompt' (text or messages) or 'input_ids'.")
    return True


def _ids_of(
    row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None
) -> list[int]:
    """The token ids of a row's prompt."""
    if not is_chat(row["prompt"]):
        _check_unused(template_kwargs, f"{where} is text")
        return encode_prompt(row["prompt"], tokenizer, where=where)
    kwargs = template_kwargs_of(row, tokenizer, template_kwargs, where)
    return encode_prompt(row["prompt"], tokenizer, where=where, tools=tools_of(row, where), template_kwargs=kwargs)


def _cache_file(dataset: Dataset) -> str | None:
    """Where the token ids are cached; None for the place that datasets chooses. Nothing is written beside the user's own files,
    as in a folder from `save_to_disk`, or into a folder that is not writable: a temporary file is used instead."""
    folders = {Path(file["filename"]).resolve().parent for file in dataset.cache_files}
    own = Path(HF_DATASETS_CACHE).resolve()
    if all(own in (folder, *folder.parents) and os.access(folder, os.W_OK) for folder in folders):
        return None
    return str(Path(_temporary_folder().name) / f"{uuid4().hex}.arrow")


@cache
def _temporary_folder() -> TemporaryDirectory[str]:
    """A folder that is removed when Python ends."""
    return TemporaryDirectory(prefix="trl_trustkl-")


def _check_unused(template_kwargs: Mapping[str, Any] | None, why: str) -> None:
    if template_kwargs:
        raise ConfigError(
            f"`chat_template_kwargs` got {shown(dict(template_kwargs))}, but {why}, which no chat template renders; leave it "
            "None, or give prompts as messages."
        )


def encode_prompt(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str = "prompt",
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt; messages go through the chat template, so that the policy answers, or continues a last message
    of the assistant."""
    chat = is_chat(prompt)
    if not isinstance(prompt, str) and not (chat and prompt and all(is_message(message) for message in prompt)):
        raise DataError(
            f"{where} got the prompt {shown(prompt)}; it must be text or a list of {{'role': …, 'content': …}}."
        )
    if chat and (part := next(filter(None, map(unread_part, prompt)), None)) is not None:
        raise DataError(
            f"{where} has a message with a part of the type {part!r}; this trainer passes only text to the policy. Leave these "
            "parts out."
        )
    if chat and tokenizer.chat_template is None:
        raise DataError(f"{where} is a list of messages, but the tokenizer has no chat template; give prompts as text.")
    try:
        # A chat template writes the special tokens itself.
        if isinstance(prompt, str):
            ids = _encode_text(prompt, tokenizer)
        else:
            text = render(prompt, tokenizer, tools=tools, template_kwargs=template_kwargs)
            ids = tokenizer(text, add_special_tokens=False)[IDS]
    except Exception as error:  # a template rejects some conversations, a tokenizer text that is not Unicode
        raise DataError(
            f"{where} got the prompt {shown(prompt)}, which the tokenizer or its chat template rejects: {error}"
        ) from error
    if not ids:
        raise DataError(
            f"{where} has a prompt of no tokens ({shown(prompt)}); give at least one, such as the bos token."
        )
    return ids


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text prompt with the special tokens that the tokenizer adds, as in TRL. Left out are a bos token before
    one that the text begins with, and an eos token behind the text, after which the policy would start another text."""
    ids, bos, eos = tokenizer(text)[IDS], tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = _has_two_bos(ids, bos) and text.lstrip().startswith(str(tokenizer.bos_token))
    if not doubled and not _ends_with_eos(ids, bos, eos):
        return ids
    own = tokenizer(text, add_special_tokens=False)[IDS]
    if doubled and ids[1 : len(own) + 1] == own:
        ids = ids[1:]
    appended = _count_at_end(ids, eos) > _count_at_end(own, eos)
    return ids[:-1] if appended and _ends_with_eos(ids, bos, eos) else ids


def _has_two_bos(ids: list[int], bos: int | None) -> bool:
    return bos is not None and ids[:2] == [bos, bos]


def _ends_with_eos(ids: list[int], bos: int | None, eos: int | None) -> bool:
    """False for a prompt that is only the bos token, which is the eos token too in some tokenizers."""
    return eos is not None and ids[-1:] == [eos] and ids != [bos]


def _count_at_end(ids: list[int], token: int | None) -> int:
    return next((n for n, each in enumerate(reversed(ids)) if each != token), len(ids))


def warn_of_special_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Warn if some of a user's rows of token ids begin with two bos tokens, or end with the eos token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    masks = dataset["attention_mask"] if "attention_mask" in dataset.column_names else repeat(None)
    doubled = ended = 0
    for row, mask in zip(dataset[IDS], masks, strict=False):
        ids = _integers(row, name)
        ids = ids if mask is None else list(compress(ids, _integers(mask, name)))
        doubled += _has_two_bos(ids, bos)
        ended += _ends_with_eos(ids, bos, eos)
    found = {
        f"with two bos tokens ({tokenizer.bos_token!r}) at the start": doubled,
        f"with the eos token ({tokenizer.eos_token!r}) at the end, after which a model starts a new text": ended,
    }
    if any(found.values()):
        of = " and ".join(f"{count} of {len(dataset)} rows {what}" for what, count in found.items() if count)
        logger.warning(
            f"`{name}` has 'input_ids' of {of}. They are used unchanged; leave such a token out of the prompt."
        )


class TokenLimits(NamedTuple):
    """The limits of prompts and responses.

    vocabulary: embeddings of the policy; other models that read its tokens are checked against it where they are built.
    context: of the model with the shortest context, in tokens; infinite if no model has a limit. model: its name.
    """

    vocabulary: int
    context: float
    model: str


def token_limits(
    policy: PreTrainedModel | PeftModel, others: Mapping[str, PreTrainedModel | PeftModel | None]
) -> TokenLimits:
    """The limits of the policy and of the other models that read token ids, by name; None for an absent one."""
    models = {"model": policy, **{name: model for name, model in others.items() if model is not None}}
    context, name = min((context_length(model), name) for name, model in models.items())
    return TokenLimits(policy.get_input_embeddings().weight.shape[0], context, name)


def context_length(model: PreTrainedModel | PeftModel) -> float:
    """The number of tokens that a model can read at once; infinite if its configuration names none."""
    config = getattr(model, "config", None)
    length = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if length is None else length


def prepare_datasets(
    train: Dataset | IterableDataset,
    evaluation: AnyDataset | dict[str, AnyDataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    args: Any,
) -> tuple[Dataset | IterableDataset, Dataset | dict[str, Dataset] | None]:
    """Both datasets with token ids, checked against `limits`; a stream for training as it is."""
    held_out: Dataset | dict[str, Dataset] | None = None
    if isinstance(evaluation, dict):
        held_out = {
            key: prepare_dataset(dataset, f"eval_dataset[{key!r}]", tokenizer, limits, args)
            for key, dataset in evaluation.items()
        }
    elif evaluation is not None:
        held_out = prepare_dataset(evaluation, "eval_dataset", tokenizer, limits, args)
    if isinstance(train, IterableDataset):
        return train, held_out
    return prepare_dataset(train, "train_dataset", tokenizer, limits, args), held_out


def prepare_dataset(
    dataset: AnyDataset, name: str, tokenizer: PreTrainedTokenizerBase, limits: TokenLimits, args: Any
) -> Dataset:
    """The dataset with token ids, checked against `limits`; the rows of a stream are read into memory."""
    template_kwargs = getattr(args, "chat_template_kwargs", None)
    check_template_kwargs(template_kwargs or {}, tokenizer, "`chat_template_kwargs`")
    if isinstance(dataset, IterableDataset):
        rows = rows_of_stream(dataset, name)
        names = dict.fromkeys(name for row in rows for name in row)  # the rows of a generator may have different ones
        dataset = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    dataset = tokenize_prompts(
        dataset, tokenizer, name=name, num_proc=args.dataset_num_proc, template_kwargs=template_kwargs
    )
    check_prompts(dataset, limits, args.response_length, name=name)
    if "prompt" not in dataset.column_names:
        warn_of_special_tokens(dataset, tokenizer, name=name)
    return dataset


def check_prompts(dataset: Dataset, limits: TokenLimits, response_length: int, *, name: str) -> None:
    """Raise DataError for a prompt that is empty, has unknown tokens, or leaves no room for the response in a context."""
    columns = [name for name in (IDS, "attention_mask") if name in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(columns)):
        _check_prompt(row, f"`{name}` row {index}", limits, response_length)


def _check_prompt(row: dict[str, Any], where: str, limits: TokenLimits, response_length: int) -> None:
    ids = _integers(row[IDS], f"{where}, 'input_ids'")
    masked = "attention_mask" in row
    mask = _integers(row["attention_mask"], f"{where}, 'attention_mask'") if masked else [1] * len(ids)
    if len(mask) != len(ids) or not {0, 1}.issuperset(mask):
        raise DataError(
            f"{where} has the attention_mask {shown(mask)} for {len(ids)} tokens; it must be 0 or 1 for each."
        )
    if not any(mask):
        raise DataError(f"{where} has no token in 'input_ids'; every prompt needs at least one.")
    ids = list(compress(ids, mask))
    if (unknown := next((token for token in ids if not 0 <= token < limits.vocabulary), None)) is not None:
        raise DataError(
            f"{where} has the token id {unknown}; the model's vocabulary is 0 to {limits.vocabulary - 1}: tokenize the "
            "dataset with the model's tokenizer."
        )
    if len(ids) + response_length > limits.context:
        raise DataError(
            f"{where} has {len(ids)} prompt tokens; with response_length={response_length} that is more than the context "
            f"of `{limits.model}`, {limits.context}: shorten or drop the prompt, or lower response_length."
        )


def _integers(values: Any, where: str) -> list[int]:
    """A flat list of integers, from a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, int) for each in values):
        raise DataError(f"{where} got {shown(values)}; it must be a list of integers.")
    return list(values)


def collate(rows: list[dict[str, Any]], pad_token_id: int, device: torch.device) -> Prompts:
    """Left-padded prompts [B, P] and their mask, which tells padding from tokens even if both have the same id."""
    longest = max(len(row[IDS]) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens = torch.as_tensor(row[IDS], dtype=torch.long)
        if "attention_mask" in row:
            tokens = tokens[torch.as_tensor(row["attention_mask"], dtype=torch.bool)]
        ids[i, longest - len(tokens) :] = tokens
        mask[i, longest - len(tokens) :] = True
    return Prompts(ids.to(device), mask.to(device), rows)


@dataclass(frozen=True)
class Collator:
    """Makes a batch of prompts from dataset rows, with the user's data collator if there is one."""

    user: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    pad_token_id: int
    device: torch.device

    def __call__(self, rows: list[dict[str, Any]]) -> Prompts:
        if self.user is None:
            return collate(rows, self.pad_token_id, self.device)
        batch = self.user([{k: row[k] for k in (IDS, "attention_mask") if k in row} for row in rows])
        if "attention_mask" not in batch and len({len(row[IDS]) for row in rows}) > 1:
            raise DataError(
                "`data_collator` returned `input_ids` of prompts of different lengths and no `attention_mask`; it must return "
                "one, since the pad token may also occur in a prompt. DataCollatorWithPadding does."
            )
        ids = batch[IDS].to(self.device)
        mask = batch.get("attention_mask", torch.ones_like(ids)).to(ids.device).bool()
        # Padded again on the left: a model cannot continue a prompt that is padded on the right.
        prompts = [{IDS: row[counts]} for row, counts in zip(ids, mask, strict=True)]
        return collate(prompts, self.pad_token_id, ids.device)._replace(rows=rows)


def prompt_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The prompts as they are in the dataset, or decoded if it has only token ids."""
    if rollout.rows and "prompt" in rollout.rows[0]:
        return [row["prompt"] for row in rollout.rows]
    return tokenizer.batch_decode(kept(rollout.prompt_ids, rollout.prompt_mask), skip_special_tokens=True)


def collate_nothing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data collator of TRL's dataloader: `Collator` pads the rows."""
    return rows


class PromptOrder:
    """The order of prompts as a pure function of the seed and the update, so that there is no state to save.

    Every pass over the dataset has a new permutation; the rows that do not fill a batch are left out of the pass.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if length < batch_size:
            raise DataError(
                f"`train_dataset` has {length} rows, fewer than one batch of {batch_size} (per_device_train_batch_size × "
                "gradient_accumulation_steps × processes / num_generations); add prompts or shrink the batch."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.batches_per_pass = length // batch_size

    def rows(self, update: int) -> list[int]:
        """The dataset rows of the batch of `update` (counted from 0), over all processes."""
        epoch, batch = divmod(update, self.batches_per_pass)
        order = torch.randperm(self.length, generator=generator(self.seed, epoch))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
