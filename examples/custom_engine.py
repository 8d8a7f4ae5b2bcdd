"""A rollout engine in a few lines: it samples from a copy of the model, which could be on another device or machine.

python examples/custom_engine.py
"""

from __future__ import annotations

import copy

import torch
from datasets import Dataset

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer
from trl_trustkl.demo.smollm2 import load_smollm2
from trl_trustkl.rollout.engine import Samples


# docs: begin
class CopyEngine:
    """Samples token by token from a copy of the model."""

    def __init__(self, model, *, length, eos):
        self.model, self.length, self.eos, self.version = copy.deepcopy(model), length, eos, None

    def check(self):
        """Raise an error here if the engine cannot sample from the policy."""

    def sync(self, version, weights):
        if version != self.version:
            self.model.load_state_dict(dict(weights))
            self.version = version

    @torch.no_grad()
    def generate(self, prompt_ids, seeds):
        samples = Samples([], [], [])
        for prompt, seed in zip(prompt_ids, seeds, strict=True):
            tokens, logps, generator = prompt.tolist(), [], torch.Generator().manual_seed(seed)
            while len(logps) < self.length and (not logps or tokens[-1] != self.eos):
                logp = self.model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
                tokens.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
                logps.append(logp[tokens[-1]])
            samples.ids.append(torch.tensor(tokens[len(prompt) :]))
            samples.logps.append(torch.stack(logps))
            samples.finish_reasons.append("stop" if tokens[-1] == self.eos else "length")
        return samples

    def close(self):
        """Release what the engine holds."""


# docs: end


def short(prompts, completions, **columns):
    return [-len(completion.split()) for completion in completions]


def main(updates: int = 2, output_dir: str = "runs/custom_engine") -> None:
    model, tokenizer = load_smollm2(quantize=False)
    args = TrustKLPPOConfig(
        output_dir=output_dir, per_device_train_batch_size=4, gradient_accumulation_steps=1, num_ppo_epochs=1,
        max_steps=updates, response_length=12, learning_rate=1e-5, report_to="none", bf16=False,
    )  # fmt: skip
    trainer = TrustKLPPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model,
        train_dataset=Dataset.from_dict({"prompt": [f"Count to {n}:" for n in range(16)]}),
        reward_funcs=short,
        rollout_engine=CopyEngine(model, length=args.response_length, eos=tokenizer.eos_token_id),
    )
    trainer.train()


if __name__ == "__main__":
    main()
