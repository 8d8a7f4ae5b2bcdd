"""The ends of responses, and sampled responses as the padded tensors of a rollout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RolloutError, TrustKLError, out_of_range
from ..parallel.lockstep import in_lockstep
from ..parallel.processes import Processes
from ..run.failure_handling import raised_on_all
from ..run.rng import mixed_seed
from ..run.signals import Overdue
from ..types import Prompts, Rollout, UpdateContext
from .engine import RolloutEngine, Samples


def stop_ids(
    policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: Any, *, text: bool
) -> list[int]:
    """The tokens that end a response.

    If `stop_token_id` is set, only that. With `stop_token="eos"`, the default for text and chat prompts, every end of
    sequence that the tokenizer or the model's generation config declares, such as a chat model's end of turn. None with
    `stop_token="none"`, the default for a dataset of token ids, as in TRL.
    """
    if args.stop_token_id is not None:
        vocabulary = policy.get_input_embeddings().weight.shape[0]
        if not 0 <= args.stop_token_id < vocabulary:
            raise out_of_range("stop_token_id", args.stop_token_id, f"a token of the model's, 0 to {vocabulary - 1}")
        return [args.stop_token_id]
    if (args.stop_token or ("eos" if text else "none")) == "none":
        return []
    eos = policy.generation_config.eos_token_id
    declared = eos if isinstance(eos, list) else [eos]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})


def is_stop(response: Tensor, stop_ids: list[int]) -> Tensor:
    """Where a response has a stop token, [b, t]."""
    return torch.isin(response, torch.tensor(stop_ids, dtype=response.dtype, device=response.device))


def response_mask(ends: Tensor) -> Tensor:
    """True up to and including the first end, [b, t]; True everywhere in a row without one. `ends` is True where a row ends
    with a stop token or a stop string."""
    ends = ends.long()
    return ends.cumsum(-1) - ends == 0


def ended(rollout: Rollout, stop_ids: list[int]) -> Tensor:
    """Whether each response ended with a stop token or a stop string, [B]; where the rollout does not say, whether it has a
    stop token."""
    if rollout.ended is not None:
        return rollout.ended
    return (is_stop(rollout.response_ids, stop_ids) & rollout.response_mask).any(-1)


class Rollouts:
    """Samples responses with an engine, to which it gives the policy's weights whenever they may have changed.

    weights: returns the policy's weights, as `RolloutEngine.sync` gets them. vocabulary: the number of tokens of the policy.
    length: of a response, at most; responses are padded to it on the right. together: whether all processes have to request the
    weights together, as those of a sharded policy.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        processes: Processes,
        *,
        vocabulary: int,
        length: int,
        pad_token_id: int,
        together: bool = False,
    ) -> None:
        self.engine = engine
        self._weights = weights
        self._processes = processes
        self._vocabulary = vocabulary
        self._length = length
        self._pad_token_id = pad_token_id
        self._together = together
        self._version = 0

    @property
    def name(self) -> str:
        """The engine's, for records and messages."""
        return type(self.engine).__name__

    def weights_changed(self) -> None:
        """The next rollout needs the weights again."""
        self._version += 1

    def check(self) -> None:
        """Raise an error on all processes if the engine does not support the policy, or does not work, on any of them."""
        with raised_on_all(self._processes, TrustKLError, Overdue), self._as_rollout_error():
            self.engine.check()

    def sync(self) -> float:
        """Give the engine the policy's weights, on all processes; returns the seconds that this took."""
        started = time.perf_counter()
        with raised_on_all(self._processes, TrustKLError, Overdue), self._as_rollout_error():
            reading = in_lockstep(self._weights(), self._processes) if self._together else nullcontext(self._weights())
            with reading as weights:
                self.engine.sync(self._version, weights)
        return time.perf_counter() - started

    def close(self) -> None:
        """Release what the engine holds."""
        self.engine.close()

    def sample(self, prompts: Prompts, context: UpdateContext) -> Rollout:
        """Sample a response to each prompt. Raises RolloutError if the engine fails, or returns anything else.

        In training it is called by all processes, and an error is raised on all of them. In an evaluation, in which they may
        have different numbers of batches, `sync` is called once before.
        """
        agreed: AbstractContextManager[None] = nullcontext()
        if context.training:
            context.sync_seconds = self.sync()
            agreed = raised_on_all(self._processes, TrustKLError, Overdue)
        ids = [row[mask] for row, mask in zip(prompts.ids, prompts.mask, strict=True)]
        with agreed, self._as_rollout_error():
            samples = self.engine.generate(ids, response_seeds(context, len(ids)))
            self._check(samples, len(ids))
        return self._rollout(samples, prompts, context)

    @contextmanager
    def _as_rollout_error(self) -> Iterator[None]:
        try:
            yield
        except (TrustKLError, Overdue):
            raise
        except Exception as error:
            raise RolloutError(f"the rollout engine {self.name} failed: {type(error).__name__}: {error}") from error

    def _check(self, samples: Samples, count: int) -> None:
        longest = max(map(len, samples.ids), default=0)
        if not len(samples.ids) == len(samples.finish_reasons) == count or longest > self._length:
            raise RolloutError(
                f"the rollout engine {self.name} returned {len(samples.ids)} responses of up to {longest} tokens and "
                f"{len(samples.finish_reasons)} finish reasons; it must return {count}, one for each prompt, of at most "
                f"response_length={self._length} tokens."
            )
        if samples.logps is not None and list(map(len, samples.logps)) != list(map(len, samples.ids)):
            raise RolloutError(
                f"the rollout engine {self.name} returned log-probabilities of other shapes than the token ids; it must return "
                "one for each token, or None for all."
            )
        if longest == 0:
            return
        least, most = torch.stack(torch.aminmax(torch.cat(samples.ids))).tolist()
        if not 0 <= least <= most < self._vocabulary:
            raise RolloutError(
                f"the rollout engine {self.name} returned the tokens {least} to {most}; the policy's are 0 to "
                f"{self._vocabulary - 1}: it samples from another model."
            )

    def _rollout(self, samples: Samples, prompts: Prompts, context: UpdateContext) -> Rollout:
        device, length = prompts.ids.device, self._length

        def padded(rows: list[Tensor], fill: float) -> Tensor:
            return torch.stack([nn.functional.pad(row.to(device), (0, length - len(row)), value=fill) for row in rows])

        lengths = torch.tensor([len(each) for each in samples.ids], device=device)
        return Rollout(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            response_ids=padded(samples.ids, self._pad_token_id),
            response_mask=torch.arange(length, device=device) < lengths.unsqueeze(-1),
            sampler_logp=None if samples.logps is None else padded(samples.logps, 0.0),
            rows=prompts.rows,
            context=context,
            ended=torch.tensor([reason == "stop" for reason in samples.finish_reasons], device=device),
        )


def response_seeds(context: UpdateContext, count: int) -> list[int]:
    """The seed of each of this process's `count` responses."""
    rows = range(context.first_row, context.first_row + count * context.row_step, context.row_step)
    return [mixed_seed(context.sampling_seed, row) for row in rows]
