"""PPO on a model of 7 to 8 billion parameters, on one GPU of 24 GB: what uses the memory, and which settings change it.

PPO needs a policy, a reference, a value, and memory for sampling. The weights of three full models of 8 billion parameters
would take about 50 GB. Here one backbone in 4 bits has three uses: with the LoRA adapter it is the policy, without the
adapter it is the reference, and a small head on its hidden states predicts the value. Before training, the script estimates
the memory from the shapes in the model's configuration. It counts the weights (embeddings, head and norms stay in bf16), the
adapter and the value head in 32 bits with their gradients and Adam's two moments, what the backward pass of one micro-batch
keeps, and the keys and values of sampling. Training and sampling use their memory at different times: `--micro-batch` and
`--response-length` determine the peak of training, and `--sample-batch` that of sampling. On a GPU the script prints the
measured peak after the run. For the shape of Qwen2.5-7B the estimate was compared with an H100 (docs/performance.md).

    python examples/qlora_ppo.py                                        # SmolLM2-135M on a CPU, a few minutes
    python examples/qlora_ppo.py --model Qwen/Qwen2.5-7B-Instruct --updates 200        # one GPU of 24 GB
    python examples/qlora_ppo.py --model Qwen/Qwen2.5-7B-Instruct --estimate-only      # reads its config.json, no weights
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from trl_trustkl import TrustKLPPOConfig, TrustKLPPOTrainer, load_records
from trl_trustkl.demo.prompts import TRAIN_PROMPTS
from trl_trustkl.demo.smollm2 import smollm2_path
from trl_trustkl.policy.exact_kl import BUFFERS, gpu_chunk_elements

GB = 1e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, 1 byte of scale per 64 weights, 4 bytes per 256 scales


def estimate(config, options: argparse.Namespace) -> dict[str, float]:
    """Bytes by purpose, from the shapes of the model, which is created on the meta device, without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    quantised = sum(m.weight.numel() for m in linear)
    kept = sum(p.numel() for p in model.parameters()) - quantised
    adapter = sum(options.lora_r * (m.in_features + m.out_features) for m in linear)
    text = config.get_text_config()
    trained = adapter + text.hidden_size + 1  # the value head
    layers, hidden, inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    length = options.prompt_length + options.response_length
    tokens = options.micro_batch * length
    chunk = gpu_chunk_elements(int(options.gpu_memory * GB))
    logits = options.micro_batch * options.response_length * text.vocab_size
    keys = text.num_key_value_heads * (getattr(text, "head_dim", None) or hidden // text.num_attention_heads)
    return {
        "4-bit weights": NF4 * quantised,
        "embeddings, head, norms in bf16": 2.0 * kept,
        "reward model in bf16": reward_model_bytes(options.reward_model),
        "trained weights, gradients, moments": 16.0 * trained,
        # Before and after an update, for backtracking. Adam's moments are copied to host memory.
        "trained weights kept of an update": 8.0 * trained,
        "hidden states under π_old and π_ref": 4.0 * options.batch * options.response_length * hidden,
        "CUDA context and buffers": 1.0 * GB,
        # Checkpointing keeps each layer's input; then one layer is recomputed with all that its backward pass needs.
        "training: inputs of the layers": 2.0 * layers * tokens * hidden,
        "training: one recomputed layer": tokens * (28.0 * hidden + 10.0 * inner) + 2.0 * hidden * inner,
        "training: logits of a chunk": 4.0 * BUFFERS * min(chunk, logits),
        "sampling: keys and values": 4.0 * options.sample_batch * length * layers * keys,
        "sampling: next-token scores": 12.0 * options.sample_batch * text.vocab_size,
    }


def reward_model_bytes(name: str | None) -> float:
    """Bytes of a reward model, which is loaded in the dtype of its files: bf16, as most are."""
    if name is None:
        return 0.0
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(name, num_labels=1))
    return 2.0 * sum(p.numel() for p in model.parameters())


def peak(parts: dict[str, float]) -> float:
    """The peak of all parts. Training and sampling alternate, so only the larger of the two counts."""
    sums = {phase: sum(v for k, v in parts.items() if k.startswith(phase)) for phase in ("training", "sampling")}
    return sum(parts.values()) - min(sums.values())


def build(name: str, options: argparse.Namespace) -> TrustKLPPOTrainer:
    gpu = torch.cuda.is_available()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=gpu,
        bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
    )  # fmt: skip
    return TrustKLPPOTrainer(
        args=TrustKLPPOConfig(
            output_dir=options.output_dir, max_steps=options.updates, response_length=options.response_length,
            per_device_train_batch_size=options.micro_batch, num_mini_batches=4, num_ppo_epochs=2, temperature=1.0,
            gradient_accumulation_steps=options.batch // options.micro_batch, gradient_checkpointing=gpu,
            local_rollout_forward_batch_size=options.sample_batch, learning_rate=1e-4 if gpu else 1e-3,
            kl_controller="adaptive", kl_target=6.0, kl_horizon=500, trust_max_kl=0.05, missing_eos_penalty=0.5,
            bf16=gpu, use_cpu=not gpu, report_to="none", logging_strategy="no", save_strategy="no",
        ),
        model=AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bit, dtype=torch.bfloat16 if gpu else None),
        processing_class=AutoTokenizer.from_pretrained(name),
        reward_funcs=options.reward_model or brief,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TRAIN_PROMPTS]}),
        peft_config=LoraConfig(r=options.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def brief(prompts, completions, **columns):
    """A stand-in for a reward model: 1 for an empty reply, falling to 0 at 40 words."""
    return [max(0.0, 1 - len(completion[0]["content"].split()) / 40) for completion in completions]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="QLoRA PPO with an estimate of its memory.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="a name or folder; default: SmolLM2-135M-Instruct, from the Hub or its wheel")
    parser.add_argument("--reward-model", help="a sequence classifier with one label; default: a rule on the length")
    for option, default in {"updates": 4, "batch": 32, "micro-batch": 4, "sample-batch": 32, "lora-r": 16}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens of the longest prompt, for the estimate")
    parser.add_argument("--response-length", type=int, default=128 if torch.cuda.is_available() else 24)
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GB")
    parser.add_argument("--estimate-only", action="store_true")
    parser.add_argument("--output-dir", default="runs/qlora_ppo")
    options = parser.parse_args(arguments)
    name = options.model or smollm2_path()
    parts = estimate(AutoConfig.from_pretrained(name), options)
    for purpose, size in parts.items():
        print(f"{purpose:40} {size / GB:7.2f} GB")
    fits = "fits" if peak(parts) < options.gpu_memory * GB else "does not fit"
    print(f"{'estimated peak (training or sampling)':40} {peak(parts) / GB:7.2f} GB: {fits} {options.gpu_memory:g} GB")
    if options.estimate_only:
        return
    build(name, options).train()
    if torch.cuda.is_available():
        print(f"{'measured peak of the tensors':40} {torch.cuda.max_memory_allocated() / GB:7.2f} GB")
    for record in load_records(options.output_dir):
        kl, step = record["anchor"]["kl_exact"], record["trust"]["kl"]
        print(
            f"update {record['update']:3d}  score {record['score']:.3f}  KL to ref {kl:6.3f}  KL of the update {step:.4f}"
        )


if __name__ == "__main__":
    main()
