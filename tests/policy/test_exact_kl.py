"""Exact divergences in chunks, for every kind of output head, against a dense computation; values and gradients."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_trustkl.policy import exact_kl
from trl_trustkl.policy.exact_kl import spread, token_statistics
from trl_trustkl.policy.split_lm import OutputHead
from trl_trustkl.types import MicroBatch, PolicySnapshot

pytestmark = pytest.mark.filterwarnings("ignore")
EOS, V, H, N = 2, 37, 16, 29


class WithLora(nn.Module):
    """The sum of a frozen projection and a low-rank one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(H, 3, bias=False), nn.Linear(3, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: nn.Linear(H, V).requires_grad_(False),
    "trained": lambda: nn.Linear(H, V, bias=False),
    "trained, bias": lambda: nn.Linear(H, V),
    "LoRA": lambda: WithLora(nn.Linear(H, V)),
}
CAP = SimpleNamespace(final_logit_softcapping=1.5, logits_scaling=1.3, logit_scale=0.9)
COLUMNS = ("logp", "entropy", "ref_kl", "old_kl")
PRECISIONS = {  # dtype, autocast, relative tolerance
    "float32": (torch.float32, False, 1e-5),
    "float64": (torch.float64, False, 1e-12),
    "bf16 autocast": (torch.float32, True, 0.02),
    "bf16 weights": (torch.bfloat16, False, 0.02),
}

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
import torch
from trl_trustkl.policy import exact_kl
from trl_trustkl.types import PolicySnapshot

ELEMENTS, V = 2**22, 2**14
exact_kl.CHUNK_ELEMENTS = exact_kl.CACHE_ELEMENTS = ELEMENTS  # one block a chunk, as on a GPU
tokens = 3 * ELEMENTS // V

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

head, frozen = (torch.nn.Linear(8, V, bias=False).bfloat16() for _ in range(2))
frozen.requires_grad_(False)
hidden, targets = torch.randn(tokens, 8).bfloat16(), torch.randint(V, (tokens,))

def peak(count, backward):
    snapshot = PolicySnapshot(hidden[:count] + 0.1, frozen)
    with torch.set_grad_enabled(backward):
        found = exact_kl.token_statistics(
            hidden[:count].clone().requires_grad_(backward), targets[:count], head, vocab_size=V, temperature=0.7,
            entropy=True, ref=snapshot, old=snapshot,
        )
        before = memory("VmRSS")
        if backward:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is from now on
            (found.logp + found.entropy + found.ref_kl + found.old_kl).sum().backward()
    return memory("VmHWM") - before

peaks = []
for backward in (False, True):
    peak(2, backward)
    peaks.append(peak(tokens, backward) / (4 * ELEMENTS))
print(json.dumps(peaks))
"""
"""The peak memory of a forward and of a backward pass, in buffers of one chunk."""


def dense_columns(
    hidden: Tensor, targets: Tensor, head: Any, temperature: float, ref: PolicySnapshot, old: PolicySnapshot
) -> list[Tensor]:
    def logps(hidden: Tensor, head: Any) -> Tensor:
        return (head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature).log_softmax(-1)

    p = logps(hidden, head)
    with torch.no_grad():
        q, o = logps(*ref), logps(*old)
    return [
        p.gather(-1, targets[:, None])[:, 0],
        -(p.exp() * p).sum(-1),
        (p.exp() * (p - q)).sum(-1),
        (o.exp() * (o - p)).sum(-1),
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_in_chunks_equal_the_dense_ones(kind, precision, small_chunks):
    """With temperature and soft-capping; gradients accumulate over two backward passes."""
    dtype, autocast, near = PRECISIONS[precision]
    results = []
    for chunked in (True, False):
        torch.manual_seed(1)
        projection = HEADS[kind]().to(dtype)
        head, other = OutputHead(projection, CAP), OutputHead(nn.Linear(H, V).to(dtype).requires_grad_(False), CAP)
        hidden = torch.randn(2, N, H, dtype=dtype).requires_grad_()
        values: list[Tensor] = []
        for part in range(2):
            targets, weights = torch.randint(V, (N,)), torch.randn(len(COLUMNS), N)
            ref, old = (PolicySnapshot(torch.randn(N, H, dtype=dtype), other) for _ in range(2))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if chunked:
                    found = token_statistics(
                        hidden[part], targets, head, vocab_size=V, temperature=0.7, entropy=True, ref=ref, old=old
                    )
                    columns = [getattr(found, name) for name in COLUMNS]
                else:
                    columns = dense_columns(hidden[part], targets, head, 0.7, ref, old)
            sum((w * column).sum() for w, column in zip(weights, columns, strict=True)).backward()
            values += [column.detach() for column in columns]
        results.append([*values, hidden.grad, *(p.grad for p in projection.parameters() if p.requires_grad)])
    for mine, dense in zip(*results, strict=True):
        assert (mine - dense).double().norm() <= near * dense.double().norm()


def test_the_gradient_is_the_finite_difference_also_where_some_or_all_of_it_is_cut_off(small_chunks):
    head = nn.Linear(3, 11).double()
    hidden, targets = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    snapshot = PolicySnapshot(torch.randn(7, 3, dtype=torch.float64), nn.Linear(3, 11).double())

    def columns(hidden: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        found = token_statistics(hidden, targets, head, vocab_size=50, entropy=True, ref=snapshot, old=snapshot)
        return tuple(getattr(found, name) for name in COLUMNS)

    assert torch.autograd.gradcheck(columns, (hidden, head.weight, head.bias), check_undefined_grad=True)


def test_a_head_in_half_precision_does_not_lose_the_chunks_it_adds_up(monkeypatch):
    """200 chunks, whose sum in bf16 would be 1.5 % off."""
    head = nn.Linear(H, V, bias=False).bfloat16()
    hidden, targets = torch.randn(2000, H).bfloat16(), torch.randint(V, (2000,))
    wide = copy.deepcopy(head).float()
    wide(hidden.float()).log_softmax(-1).gather(-1, targets[:, None]).mean().backward()
    monkeypatch.setattr(exact_kl, "CHUNK_ELEMENTS", V * 10)
    token_statistics(hidden.requires_grad_(), targets, head, vocab_size=V).logp.mean().backward()
    assert head.weight.grad.dtype == torch.bfloat16
    assert (head.weight.grad.float() - wide.weight.grad).norm() < 4e-3 * wide.weight.grad.norm()


@pytest.mark.parametrize(("gigabytes", "elements"), [(0.1, 2**22), (4, 2**22), (24, 2**24), (80, 2**26), (141, 2**27)])
def test_a_gpu_has_the_largest_chunks_whose_buffers_take_a_sixteenth_of_its_memory(gigabytes, elements, monkeypatch):
    total = int(gigabytes * 1e9)
    monkeypatch.setattr(exact_kl, "total_memory", lambda device: total)
    assert exact_kl.chunk_elements(torch.device("cuda", 0)) == elements
    taken = exact_kl.BUFFERS * 4 * elements
    assert taken <= total / 16 < 2 * taken or elements == 2**22
    assert exact_kl.chunk_elements(torch.device("cpu")) == 2**22


def test_the_memory_of_a_gpu_is_looked_up_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or SimpleNamespace(total_memory=7)
    )
    exact_kl.total_memory.cache_clear()
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    assert [exact_kl.total_memory(device) for device in devices] == [7] * 4 and asked == devices[:2]
    exact_kl.total_memory.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_the_buffers_of_a_chunk_are_no_more_than_counted():
    """In a separate process, with three chunks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    assert 10 < forward < exact_kl.BUFFERS and backward < exact_kl.BUFFERS


def test_a_trained_parameter_that_the_head_does_not_use_gets_no_gradient(small_chunks):
    head = nn.Linear(H, V)
    head.spare = nn.Parameter(torch.ones(1))
    token_statistics(torch.randn(9, H), torch.zeros(9, dtype=torch.long), head, vocab_size=V).logp.sum().backward()
    assert head.weight.grad.abs().sum() > 0 and not head.spare.grad


@pytest.mark.parametrize("indices", [None, torch.tensor([0, 2, 4])])
def test_spread_puts_values_at_the_response_tokens(indices):
    mask, ids = torch.tensor([[True, False, True], [False, True, False]]), torch.arange(6).view(2, 3)
    micro = MicroBatch(torch.arange(2), ids, ids, None, ids, mask, indices)
    assert spread(torch.tensor([1.0, 2.0, 3.0]), micro).tolist() == [[1, 0, 2], [0, 3, 0]]
