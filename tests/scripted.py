"""A trainer whose responses are given instead of sampled."""

from __future__ import annotations

from typing import Any

import torch

from tests import tiny
from trl_trustkl import TrustKLPPOTrainer
from trl_trustkl.types import Prompts, Rollout, Scored

PAD, BOS, EOS = 0, 1, 2
WORDS = ([5, 7, 9, 11], 4)
"""A response of four tokens: its token ids, and its length."""


class Scripted(TrustKLPPOTrainer):
    """A trainer that takes its responses from a list of token ids and lengths; `scored` is the last result of `score`."""

    script: list[tuple[list[int], int]]
    scored: Scored

    def rollout(self, prompts: Prompts) -> Rollout:
        count, length = len(prompts.ids), self.args.response_length
        rows = [self.script[i % len(self.script)] for i in range(count)]
        ids = torch.tensor([(tokens + [PAD] * length)[:length] for tokens, _ in rows])
        mask = torch.arange(length) < torch.tensor([n for _, n in rows]).unsqueeze(-1)
        return Rollout(prompts.ids, prompts.mask, ids, mask, None, prompts.rows)

    def score(self, rollout: Rollout) -> Scored:
        self.scored = super().score(rollout)
        return self.scored


def scripted(folder: Any, script: list[tuple[list[int], int]], **arguments: Any) -> Scripted:
    """A trainer that runs one update by default, with the responses of `script` in turn."""
    changes = {"max_steps": 1} | arguments.pop("changes", {})
    settings = {
        "model": tiny.llama(),
        "processing_class": tiny.tokenizer(),
        "reward_funcs": tiny.good_words,
        "train_dataset": tiny.prompts(),
        "peft_config": tiny.lora(),
    }
    trainer = Scripted(args=tiny.config(folder, **changes), **settings | arguments)
    trainer.script = script
    return trainer
