"""The methods of transformers' trainer that run over batches of a dataset: loaders of prompts, and errors for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import NotAvailableYetError, shown
from ..rollout.prompts import Collator

PromptLoader: TypeAlias = DataLoader[dict[str, Tensor]]

_SCORES = "there are no labels to predict; evaluate() and evaluate_completions() sample responses and score them"
_TRAINS = (
    "the loss needs a rollout instead of a batch of the dataset; train() runs the updates, and each phase of one (`rollout`, "
    "`score`, `advantages`, `optimise`) is a method"
)
_INSTEAD = {
    "predict": _SCORES,
    "evaluation_loop": _SCORES,
    "prediction_step": _SCORES,
    "compute_loss": _TRAINS,
    "training_step": _TRAINS,
    "call_model_init": "the trainer takes models, not a function that makes one",
    "hyperparameter_search": "a trainer has one set of values; build one for each trial",
}


def not_available(name: str) -> Callable[..., NoReturn]:
    """A method that raises NotAvailableYetError, and says what to use instead."""

    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        """Raises NotAvailableYetError."""
        raise NotAvailableYetError(f"`{name}` is not supported by this trainer: {_INSTEAD[name]}.")

    return method


def reject_trial(trial: Any) -> None:
    """Raise NotAvailableYetError for a trial of a hyperparameter search, whose values nothing would set."""
    if trial is not None:
        raise NotAvailableYetError(
            f"`trial` got {shown(trial)}, which is not supported by this trainer: set its values in `args`, and build a "
            "trainer for each trial."
        )


def prompt_loader(
    dataset: Dataset | IterableDataset, collator: Collator, batch_size: int, *, drop_last: bool = False
) -> PromptLoader:
    """The prompts in the dataset's order, padded on the left."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = collator(rows)
        return {"input_ids": prompts.ids, "attention_mask": prompts.mask.long()}

    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, drop_last=drop_last)
