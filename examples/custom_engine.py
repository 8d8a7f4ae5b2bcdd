"""A custom rollout engine: responses that are sampled outside of the trainer.

An engine has four methods. `check` raises an error before the first rollout if the engine cannot work. `sync` gets the
policy's weights whenever they may have changed, as those of a plain checkpoint with the adapter merged. `generate`
returns for each prompt the token ids of one response, without padding, their log-probabilities, and why the response
ended. `close` releases what the engine holds. The engine of this example samples from a copy of the model, token by
token. The copy could be on another device, or `generate` could ask another machine. The trainer pads the responses and
computes everything else in the training pass. It weights the loss by the ratio of the policy to the engine's
distribution, which corrects differences between the two. It also records them (sampler/kl).

    python examples/custom_engine.py                            # SmolLM2 on a CPU, a few minutes
    python examples/custom_engine.py --model Qwen/Qwen2.5-0.5B-Instruct --updates 100       # a GPU
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.demo.prompts import TRAIN_PROMPTS
from trl_trustkl.demo.smollm2 import smollm2_path
from trl_trustkl.rollout.engine import Samples


# docs: begin
class CopyEngine:
    """Samples token by token from a separate copy of the model."""

    def __init__(self, model, *, length, temperature, eos):
        self.model, self.length, self.temperature, self.eos = model.eval(), length, temperature, eos
        self.version = None

    def check(self):
        pass

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
                logits = self.model(torch.tensor([tokens], device=self.model.device)).logits[0, -1]
                logp = (logits.float() / self.temperature).log_softmax(-1).cpu()
                tokens.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
                logps.append(logp[tokens[-1]])
            samples.ids.append(torch.tensor(tokens[len(prompt) :]))
            samples.logps.append(torch.stack(logps))
            samples.finish_reasons.append("stop" if tokens[-1] == self.eos else "length")
        return samples

    def close(self):
        pass


# docs: end


def short_words(prompts, completions, **columns):
    words = [completion.split() for completion in completions]
    return [-sum(map(len, some)) / max(len(some), 1) for some in words]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A rollout engine that samples from a copy of the model.")
    parser.add_argument("--model", help="a name or folder (default: SmolLM2-135M-Instruct, from the Hub or its wheel)")
    parser.add_argument("--updates", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/custom_engine", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    name, gpu = options.model or smollm2_path(), torch.cuda.is_available()
    model, copy = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(name)
    args = TrustKLPPOConfig(
        output_dir=options.output_dir, max_steps=options.updates, response_length=12, temperature=1.0,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, num_ppo_epochs=2, learning_rate=1e-3,
        trust_max_kl=0.02, bf16=False, use_cpu=not gpu, save_strategy="no", logging_strategy="no", report_to="none",
    )  # fmt: skip
    engine = CopyEngine(copy, length=args.response_length, temperature=args.temperature, eos=tokenizer.eos_token_id)
    trainer = TrustKLPPOTrainer(
        args=args,
        model=model,
        processing_class=tokenizer,
        reward_funcs=short_words,
        train_dataset=Dataset.from_dict({"prompt": TRAIN_PROMPTS}),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_engine=engine,
    )
    trainer.train()
    print("\nupdate   score   sampler/kl (nats/token)   KL(π_old‖π) (limit 0.02)")
    for record in load_records(options.output_dir):
        kl, trust = record["sampler"]["kl"], record["trust"]["kl"]
        print(f"{record['update']:6d}  {record['score']:6.3f}  {kl:24.1e}  {trust:24.4f}")


if __name__ == "__main__":
    main()
