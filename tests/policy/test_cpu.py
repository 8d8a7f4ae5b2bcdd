"""What a CPU computes well: the choice of bf16, and 4-bit weights that are dequantized once for sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from trl_trustkl.policy import cpu


@pytest.mark.parametrize(
    ("flags", "capability", "wanted"),
    [
        ("fma avx512_bf16 amx_tile", "AVX512", True),
        ("fma avx512_bf16 amx_tile", "AVX2", False),
        ("fma avx512f amx_tile", "AVX512", False),
        ("fma not_avx512_bf16 amx_tile", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_bf16_instructions_are_read_from_the_flags_of_the_cpu(flags, capability, wanted, monkeypatch):
    def read_text(self: Path) -> str:
        if flags is None:
            raise FileNotFoundError(self)
        return f"flags\t\t: fpu {flags} sse\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu.has_bf16_instructions() is wanted


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_gpu_decides_on_bf16_where_there_is_one(on_cpu, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_instructions", lambda: on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu.computes_bf16() is on_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not on_cpu)
    assert cpu.computes_bf16() is not on_cpu


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def test_weights_dequantized_once_give_the_same_logits_and_are_given_up_again(tmp_path):
    model = tiny.four_bit(tmp_path).train()
    ids = torch.arange(1, 7).unsqueeze(0)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with cpu.dequantised_on_cpu(model):
            assert linear_layers(model) and all("forward" in vars(layer) for layer in linear_layers(model))
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in linear_layers(model))
    with pytest.raises(RuntimeError, match="out of memory"), cpu.dequantised_on_cpu(model):
        raise RuntimeError("out of memory")
    assert not any("forward" in vars(layer) for layer in linear_layers(model))


def test_a_model_that_is_not_quantized_is_left_unchanged():
    model = tiny.tuned()
    with cpu.dequantised_on_cpu(model):
        assert not any("forward" in vars(module) for module in model.modules())
