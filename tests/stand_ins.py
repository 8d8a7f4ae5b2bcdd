"""Stand-ins for packages that the tests do not need: vLLM as TRL's trainers use it, and Liger."""

from __future__ import annotations

import sys
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests import tiny
from tests.weights import trained_weights


class VLLM:
    """In the place of TRL's `VLLMGeneration`, for the tiny Llama with an adapter: samples with the weights that it got last.

    synced: the weights that it got, each time.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        self.options = options
        self.engine = get_peft_model(tiny.llama(), tiny.lora()).eval()
        self.synced: list[dict[str, Tensor]] = []
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    def sync_weights(self) -> None:
        self.synced.append(trained_weights(self.model))
        self.engine.load_state_dict(self.model.state_dict())

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        ids = pad_sequence([torch.tensor(each) for each in prompts], batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones(len(each)) for each in prompts], batch_first=True, padding_side="left")
        found = self.engine.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=self.options["max_completion_length"],
            do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        texts = found.sequences[:, ids.shape[1] :]
        logps = torch.stack(found.logits, 1).log_softmax(-1).gather(-1, texts.unsqueeze(-1))
        lengths = [row.tolist().index(tiny.EOS) + 1 if tiny.EOS in row else len(row) for row in texts]
        completions = [row[:n].tolist() for row, n in zip(texts, lengths, strict=True)]
        return prompts, completions, [row[:n].tolist() for row, n in zip(logps, lengths, strict=True)], None


def use_vllm(monkeypatch: Any) -> None:
    for name in ("grpo_trainer", "rloo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{name}.VLLMGeneration", VLLM)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """The forward pass of a Llama's norm."""
    return module.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon))


def _apply_to_instance(model: nn.Module, **options: Any) -> None:
    """Replace the forward passes of the norms of a model, as Liger does."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(_norm, module)
            module.replaced = True


class LigerLoss(nn.Module):
    """In the place of `LigerFusedLinearGRPOLoss`, which TRL 1.12 gives the states of the backbone: without clipping and β."""

    def __init__(self, temperature: float, **_: Any) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor, advantages: Tensor,
        old_per_token_logps: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        logps = (_input @ lin_weight.T / self.temperature).log_softmax(-1)
        logps = logps.gather(-1, selected_token_ids.unsqueeze(-1)).squeeze(-1)
        old = logps.detach() if old_per_token_logps is None else old_per_token_logps
        loss = -((logps - old).exp() * advantages.unsqueeze(1) * attention_mask).sum() / attention_mask.sum()
        return loss, [torch.zeros(())]


def use_liger(monkeypatch: Any) -> None:
    package, kernels = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    kernels._apply_liger_kernel_to_instance = _apply_to_instance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_liger_kernel_available", lambda: True, raising=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.LigerFusedLinearGRPOLoss", LigerLoss, raising=False)
