"""Train with rollouts by a vLLM server, or by a vLLM in this process.

Start the server first, in another terminal (see README.md), then

    python examples/vllm_server/train.py --model FOLDER_OR_NAME --url http://localhost:8000

Without --url, vLLM runs in this process. The reward is the share of words that are not repeated.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer


def distinct_words(prompts, completions, **columns):
    words = [completion.split() for completion in completions]
    return [len(set(some)) / max(len(some), 1) for some in words]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--url", help="the server's address; without it vLLM runs in this process")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--response-length", type=int, default=24)
    parser.add_argument("--output-dir", default="runs/vllm")
    options = parser.parse_args(argv)
    server = {"vllm_mode": "server", "vllm_server_base_url": options.url} if options.url else {}
    args = TrustKLPPOConfig(
        output_dir=options.output_dir,
        use_vllm=True,
        **server,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_ppo_epochs=2,
        max_steps=options.updates,
        response_length=options.response_length,
        learning_rate=3e-4,
        trust_max_kl=0.02,  # a hard limit in nats per token, measured on the training pass
        report_to="none",
    )
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    trainer = TrustKLPPOTrainer(
        args=args,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        model=model,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=Dataset.from_dict({"prompt": [f"A short story about the number {n}:" for n in range(64)]}),
        reward_funcs=distinct_words,
    )
    trainer.train()
    print(f"The report is {options.output_dir}/report.html. sampler/kl in it is KL(vLLM‖training pass).")


if __name__ == "__main__":
    main()
