"""Estimate the memory of a process for PPO with DDP, FSDP2, ZeRO-2 and ZeRO-3, from a model on the meta device.

The script counts the weights, their gradients and moments, what is kept of them during an update, the reference, and what is
gathered for a pass and for sampling. It does not count activations, the cache of sampling and buffers, which do not depend on
the engine (examples/qlora_ppo.py estimates these). With LoRA, the reference is the policy without its adapter; in full
fine-tuning it is a second model. The value is a head on the policy. `bf16` is on.

    python examples/sharded_memory.py                                    # a model with the shapes of Llama 3.1 8B
    python examples/sharded_memory.py --model Qwen/Qwen2.5-7B-Instruct   # reads its config.json, no weights
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

GB = 1e9
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip


class Shapes(NamedTuple):
    """Numbers of parameters: of the base model, that are trained, of embeddings and head (root), of the head, of a layer."""

    base: int
    trained: int
    root: int
    head: int
    layer: int


def shapes(config, lora_r: int | None) -> Shapes:
    """Counts of a model with LoRA on every linear layer, or, without a rank, of a model that is trained entirely."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base, head = sum(p.numel() for p in model.parameters()), model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    layer = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
    of_layer = sum(p.numel() for p in layer.parameters())
    trained = base if lora_r is None else sum(lora_r * (m.in_features + m.out_features) for m in linear)
    root = base - config.get_text_config().num_hidden_layers * of_layer
    return Shapes(base, trained, root, head.weight.numel(), of_layer)


def held(engine: str, shape: Shapes, processes: int, *, full: bool, low: int = 2) -> dict[str, float]:
    """Bytes that a process holds, by purpose. `low` is the size of a weight in bf16, in bytes.

    Trained weights are in float32 with DDP and FSDP2. With ZeRO all weights are in bf16, and trained ones have a copy in
    float32.
    """
    zero = engine.startswith("ZeRO")
    weights = 1 if engine in ("DDP", "ZeRO-2") else processes
    moments = 1 if engine == "DDP" else processes
    frozen, trained = (0 if full else shape.base), shape.trained
    of_trained = low * trained / weights + 4 * trained / moments if zero else 4 * trained / weights
    of_passes = low if zero else 4
    complete = frozen * low + trained * of_passes  # the weights of the passes
    layers = 2 * shape.layer + shape.root
    kept = shape.root if engine == "FSDP2" else 0  # embeddings and head of a separate reference stay gathered
    return {
        "weights": low * frozen / weights + of_trained,
        "gradients and moments": 12 * trained / moments,
        "weights before and after an update": 8 * trained / moments,
        "reference": of_passes * ((shape.base - kept) / weights + kept) if full else 0,
        "head of π_old": of_passes * shape.head if full else 0,
        "gathered: for a pass": 0 if weights == 1 else complete * layers / shape.base,
        "gathered: for sampling": 0 if weights == 1 else complete,
        "moments before an update, in host memory": 8 * trained / moments,
    }


def peak(parts: dict[str, float], *, gathers: bool = True) -> float:
    """The largest sum on the GPU: of training, or of sampling, in which no update is under way.

    gathers: whether all weights are gathered for sampling. They are not with ds3_gather_for_generation=False, nor with a vLLM
    server or another engine that has the weights elsewhere.
    """
    kept = sum(parts[name] for name in ("weights", "gradients and moments", "reference"))
    training = kept + sum(
        parts[name] for name in ("weights before and after an update", "head of π_old", "gathered: for a pass")
    )
    return max(training, kept + parts["gathered: for sampling"]) if gathers else training


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or a folder (default: the shapes of Llama 3.1 8B)")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args(arguments)
    config = LLAMA_8B if options.model is None else AutoConfig.from_pretrained(options.model)
    names = "".join(f"{f'{count} GPUs':>10}" for count in options.processes)
    for title, rank in (("LoRA", options.lora_r), ("full fine-tuning", None)):
        shape = shapes(config, rank)
        print(f"{title}, {shape.base / 1e9:.2f} billion parameters, {shape.trained / 1e9:.3f} trained, GB:")
        print(f"{'':44}{names}")
        for engine in ENGINES:
            columns = [held(engine, shape, count, full=rank is None) for count in options.processes]
            print(f"{engine:44}" + "".join(f"{peak(column) / GB:10.1f}" for column in columns))
            if columns[0]["gathered: for sampling"]:
                layers = [peak(column, gathers=False) for column in columns]
                print(f"{f'{engine}, sampling layer by layer':44}" + "".join(f"{each / GB:10.1f}" for each in layers))
            for name in columns[0]:
                if any(column[name] for column in columns):
                    print(f"    {name:40}" + "".join(f"{column[name] / GB:10.2f}" for column in columns))
        print()


if __name__ == "__main__":
    main()
