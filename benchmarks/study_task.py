"""The tasks of `benchmarks/study.py`: SmolLM2-135M trained with GRPO or PPO, and measured on held-out prompts.

The reward asks for three things that can be verified: the completion names the subject of its prompt, is positive (VADER), and
does not repeat its words. Each prompt has another subject, so that a policy that collapses onto one phrase loses the reward.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_trustkl.compare.metrics import distinct
from trl_trustkl.demo.prompts import EVAL_PROMPTS
from trl_trustkl.demo.rewards import sentiment
from trl_trustkl.files import write_atomically

HELD_OUT_FILE = "held_out.json"
SAMPLES = 2
"""Completions of each held-out prompt."""
WITHOUT_MEANING = (
    "about", "after", "describe", "from", "into", "over", "sentence", "that", "this", "what", "when", "which", "with", "write",
)  # fmt: skip

TOKENS = 16
"""Tokens of a completion at most: about a sentence."""

Reward = Callable[..., list[float | None]]


def subject_words(prompt: str) -> list[str]:
    """The words of a prompt that name its subject, as their first five letters, so that other forms count."""
    words = re.findall(r"[a-z]{4,}", prompt.lower())
    return [word[:5] for word in words if word not in WITHOUT_MEANING]


def cheerful_and_on_the_subject(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Positive sentiment, from 0 to 1, times the share of distinct words; 0 for a completion that names no word of the
    subject."""
    scores = []
    for prompt, completion, positive in zip(prompts, completions, sentiment(prompts, completions), strict=True):
        words = text_of(completion).lower().split()
        named = any(word in text_of(completion).lower() for word in subject_words(text_of(prompt)))
        scores.append(max(0.0, positive or 0.0) * len(set(words)) / len(words) if named and words else 0.0)
    return scores


def text_of(message: Any) -> str:
    """A prompt or completion as text."""
    return message if isinstance(message, str) else " ".join(str(part["content"]) for part in message)


class Measured:
    """A trainer whose `train` also measures the held-out prompts, before and after.

    Writes held_out.json to the run's folder. The reference is the model without its adapter. All numbers are of `SAMPLES`
    completions of each prompt, sampled at temperature 1 with a fixed seed: score, the mean reward; distinct_2, the share of
    distinct pairs of words among all of them; ref_logp, log π_ref in nats per token; kl, the mean of log(π/π_ref) summed over a
    completion, in nats.
    """

    def __init__(self, trainer: Any, prompts: Sequence[str], reward: Reward, tokens: int) -> None:
        self.trainer, self.prompts, self.reward, self.tokens = trainer, list(prompts), reward, tokens

    @property
    def policy(self) -> Any:
        """The model with its adapter."""
        return getattr(self.trainer.model, "policy", self.trainer.model)

    def train(self) -> None:
        before = self.measure()
        self.trainer.train()
        found = {"before": before, "after": self.measure()}
        write_atomically(Path(self.trainer.args.output_dir) / HELD_OUT_FILE, json.dumps(found))

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        policy, tokenizer = self.policy, self.trainer.processing_class
        chats = [[{"role": "user", "content": prompt}] for prompt in self.prompts for _ in range(SAMPLES)]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        inputs = inputs.to(policy.device)
        was_training = policy.training
        policy.eval()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # The model's own defaults (top_k and others) would make it another distribution.
            ids = policy.generate(
                **inputs, max_new_tokens=self.tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        completions = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        mask = counted(ids[:, start:], tokenizer.eos_token_id)
        logp = log_probabilities(policy, ids, inputs["attention_mask"], start)
        with policy.disable_adapter():
            ref_logp = log_probabilities(policy, ids, inputs["attention_mask"], start)
        policy.train(was_training)
        scores = self.reward([text_of(chat) for chat in chats], completions)
        return {
            "score": sum(score or 0.0 for score in scores) / len(scores),
            "distinct_2": distinct(completions, 2),
            "ref_logp": float(ref_logp[mask].mean()),
            "kl": float(((logp - ref_logp) * mask).sum(1).mean()),
            "completions": completions[:: SAMPLES * 4],
        }


def counted(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """The tokens of each completion up to and including its end."""
    ended = (completion_ids == eos_token_id).cumsum(1)
    return (ended == 0) | ((ended == 1) & (completion_ids == eos_token_id))


def log_probabilities(model: Any, ids: Tensor, prompt_mask: Tensor, start: int) -> Tensor:
    """log π of the completion's tokens, [B, T], 16 completions at a time."""
    mask = torch.cat([prompt_mask, torch.ones_like(ids[:, start:])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for rows in torch.arange(len(ids)).split(16):
        logits = model(input_ids=ids[rows], attention_mask=mask[rows], position_ids=positions[rows]).logits
        logps = logits[:, start - 1 : -1].float().log_softmax(-1)
        found.append(logps.gather(-1, ids[rows, start:, None]).squeeze(-1))
    return torch.cat(found)


def grpo(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Measured:
    """TRL's GRPO with its defaults, and with the trust region that the settings describe."""
    from trl_trustkl.demo.task import sentiment_grpo_trainer

    changes = {"max_completion_length": TOKENS} | changes
    trainer = sentiment_grpo_trainer(
        output_dir, callbacks=callbacks, reward_funcs=cheerful_and_on_the_subject, **changes
    )
    return Measured(trainer, EVAL_PROMPTS, cheerful_and_on_the_subject, trainer.args.max_completion_length)


def ppo(output_dir: str, *, callbacks: Sequence[Any] = (), **changes: Any) -> Measured:
    """This package's PPO on the same task."""
    from trl_trustkl.demo.task import sentiment_trainer

    changes = {"response_length": TOKENS} | changes
    trainer = sentiment_trainer(output_dir, callbacks=callbacks, reward_funcs=cheerful_and_on_the_subject, **changes)
    return Measured(trainer, EVAL_PROMPTS, cheerful_and_on_the_subject, trainer.args.response_length)
