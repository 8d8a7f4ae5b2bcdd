"""Builders of tiny models, tokenizers, datasets and trainers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trl_trustkl.run.rng import mixed_seed

WORDS = 40
VOCAB = WORDS + 3
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant{% endif %}"
)


def tokenizer(*, pad: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 … w39 (with a few given names), <bos>, <eos> and, by default, <pad>."""
    names = ["user", "assistant", "good", "bad", *(f"w{i}" for i in range(WORDS - 4))]
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *names])}
    inner = Tokenizer(WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>" if pad else None, unk_token="w0"
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tokenizer_with_added_pad() -> PreTrainedTokenizerFast:
    """A tokenizer with the pad token [PAD], the token VOCAB, as TRL's examples add one: a model has no embedding for it."""
    fast = tokenizer(pad=False)
    fast.add_special_tokens({"pad_token": "[PAD]"})
    return fast


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def saved_llama(folder: Path) -> LlamaForCausalLM:
    """A Llama loaded from a folder, from which TRL can load it again as the reference."""
    llama().save_pretrained(folder / "policy")
    return LlamaForCausalLM.from_pretrained(folder / "policy")


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def short_gpt2(kind: Any) -> Any:
    """A GPT-2 of class `kind` with 8 learned positions; a ninth token is an index error in its embedding."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    config.num_labels = 1
    return kind(config)


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """A Gemma-2 whose logits are soft-capped, at a level that changes them."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, final_logit_softcapping=2.0, sliding_window=64,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


FAMILIES = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2}

QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""A run in float32 on a CPU that saves nothing, for the configuration of any trainer."""
GROUPS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 6,
    **QUIET,
}
"""Such a run of TRL's GRPO or RLOO trainer."""

LIMIT = 0.02
FAST = {
    "learning_rate": 5e-2,
    "lr_scheduler_type": "constant",
    "kl_coef": 0.0,
    "max_steps": 2,
    "trust_max_kl": LIMIT,
    "temperature": 0.8,
}
"""Changes for a run whose updates propose a KL far beyond the limit."""
ANCHORED = {
    "kl_estimator": "exact",
    "kl_placement": "both",
    "kl_coef": 0.3,
    "trust_coef": 0.5,
    "clip_rule": "none",
    "temperature": 0.7,
    "num_mini_batches": 1,
    "max_grad_norm": None,
    "learning_rate": 1e-2,
}
"""Changes for a loss with both exact penalties and nothing that clips."""


def four_bit(folder: Any, *, double: bool = False, storage: torch.dtype = torch.uint8) -> LlamaForCausalLM:
    """A Llama with NF4 weights in tensors of dtype `storage`, with double quantization if requested, that computes in float32.

    Its full weights are saved under `folder`.
    """
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "full")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    return LlamaForCausalLM.from_pretrained(folder / "full", quantization_config=quantization)


def tuned(model: nn.Module | None = None, seed: int = 5, **changes: Any) -> PeftModel:
    """A model with a LoRA adapter that changes its outputs; with PEFT's initial weights it would not."""
    peft = get_peft_model(llama() if model is None else model, lora(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return peft


def scalar_model(model: Any, seed: int = 1) -> Any:
    """A sequence classifier with one label, of the same configuration as `model`."""
    torch.manual_seed(seed)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in ("id2label", "label2id")}
    config = type(model.config).from_dict(settings | {"num_labels": 1})
    return AutoModelForSequenceClassification.from_config(config)


def prompts(count: int = 16, *, chat: bool = False) -> Dataset:
    """Prompts of different lengths, with an extra column."""
    texts = [" ".join(f"w{(i * 7 + j) % 30}" for j in range(1 + i % 4)) for i in range(count)]
    rows = [[{"role": "user", "content": text}] if chat else text for text in texts]
    return Dataset.from_dict({"prompt": rows, "wanted": [f"w{i % 30}" for i in range(count)]})


def without_special(text: str) -> str:
    """A prompt as TRL 1.12 logs it: without special tokens, of which the unknown word w0 is one."""
    return " ".join(word for word in text.split() if word != "w0")


def id_prompts() -> Dataset:
    """16 prompts of token ids, of 1 to 3 tokens."""
    return Dataset.from_dict({"input_ids": [[5 + i % 20, *range(8, 8 + i % 3)] for i in range(16)]})


def seeds(prompts: Sequence[Any], seed: int = 0) -> list[int]:
    """A seed for each response, as a rollout engine gets them."""
    return [mixed_seed(seed, row) for row in range(len(prompts))]


def good_words(prompts: list, completions: list, **_: Any) -> list[float]:
    """A reward that can be learnt: the share of even-numbered words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    words = [text.split() for text in texts]
    return [sum(w[-1] in "02468" for w in some) / max(len(some), 1) for some in words]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def adapted() -> PeftModel:
    """A tiny Llama with a LoRA adapter."""
    return get_peft_model(llama(), lora())


def config(output_dir: Any, **changes: Any):
    """A short run in float32 that writes only its records."""
    from trl_trustkl import TrustKLPPOConfig

    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "max_steps": 3,
        "response_length": 6,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        **QUIET,
        "num_sample_generations": 0,
    }
    return TrustKLPPOConfig(**settings | changes)


def trainer(
    output_dir: Any, model: Any = None, *, kind: Any = None, changes: dict[str, Any] | None = None, **arguments: Any
):
    """A trainer on a tiny Llama of one layer with LoRA; `kind` is its class, and `changes` go to the configuration."""
    from trl_trustkl import BoundReportCallback, TrustKLPPOTrainer
    from trl_trustkl.callbacks.bound_report import is_report

    # Rendering a report takes longer than a tiny run; a test of reports passes its own callback.
    given = arguments.pop("callbacks", [])
    arguments["callbacks"] = given if any(map(is_report, given)) else [BoundReportCallback(report=False), *given]
    model = llama(num_hidden_layers=1) if model is None else model
    settings = {
        "processing_class": tokenizer(),
        "reward_funcs": good_words,
        "train_dataset": prompts(),
        "peft_config": lora(),
    }
    kind = TrustKLPPOTrainer if kind is None else kind
    return kind(args=config(output_dir, **(changes or {})), model=model, **settings | arguments)
