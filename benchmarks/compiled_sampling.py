"""Tokens per second of sampling on SmolLM2 with LoRA: a dynamic cache, a static one, and a compiled pass over a static one.

The first round includes the compilation. Takes minutes on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/compiled_sampling.py --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from trl_trustkl.demo.smollm2 import load_smollm2
from trl_trustkl.rollout.transformers_engine import TransformersEngine

STATIC = {"cache_implementation": "static"}
OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": STATIC | {"disable_compile": True},
    "compiled": STATIC | {"compile_config": {}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="weights, and autocast in bf16"
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    base, _ = load_smollm2(quantize=False, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    device = base.device.type
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 40, (args.prompts,), generator=generator).tolist()
    prompts = [torch.randint(5, 40_000, (length,), generator=generator).to(base.device) for length in lengths]
    engines = {
        name: TransformersEngine(
            model, response_length=args.tokens, temperature=1.0, stop_ids=[], pad_token_id=0, batch_size=args.prompts,
            autocast=partial(torch.autocast, device, dtype) if args.dtype == "bfloat16" else nullcontext,
            generation_kwargs=options,
        )
        for name, options in OPTIONS.items()
    }  # fmt: skip
    for seed in range(args.rounds):
        rates = {}
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.generate(prompts, [args.prompts * seed + row for row in range(args.prompts)])
            rates[name] = args.prompts * args.tokens / (time.perf_counter() - start)
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(f"round {seed}: {shown} tokens/s; {counters['stats']['unique_graphs']} compiled", flush=True)


if __name__ == "__main__":
    main()
