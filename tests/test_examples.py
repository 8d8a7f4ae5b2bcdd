"""The examples: that they run, and that what they show is so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trl_trustkl.divergences import exact_from_logps

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


leash = load("which_leash")
Q = torch.tensor(leash.REFERENCE, dtype=torch.float64).log()
R = torch.tensor(leash.REWARD, dtype=torch.float64)
ANCHORED = [(beta, lam) for beta in (2.0, 0.5, 0.15) for lam in (0.0, 0.3, 1.0, 10.0)]


def objective(logp: torch.Tensor, mu: torch.Tensor, beta: float, lam: float) -> torch.Tensor:
    leashes = beta * exact_from_logps("kl", logp, Q) + lam * exact_from_logps("kl", logp, mu)
    return (logp.exp() * R).sum(-1) - leashes


@pytest.mark.parametrize(("beta", "lam"), [*ANCHORED, (0.0, 0.5), (0.0, 10.0)])
def test_an_update_is_the_maximum(beta: float, lam: float) -> None:
    mu = torch.log_softmax(Q + torch.randn(6, dtype=torch.float64), -1)
    best = leash.update(mu, Q, R, beta, lam)
    assert best.exp().sum().item() == pytest.approx(1)
    others = torch.log_softmax(best + 0.1 * torch.randn(500, 6, dtype=torch.float64), -1)
    assert (objective(others, mu, beta, lam) < objective(best, mu, beta, lam)).all()
    logits = best.clone().requires_grad_()
    objective(torch.log_softmax(logits, -1), mu, beta, lam).backward()
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [2.0, 0.5, 0.15])
def test_the_destination_is_a_fixed_point_and_the_same_for_every_lambda(beta: float) -> None:
    end = leash.destination(Q, R, beta)
    weights = torch.tensor(leash.REFERENCE, dtype=torch.float64) * (R / beta).exp()
    assert end.exp().tolist() == pytest.approx((weights / weights.sum()).tolist(), rel=1e-12)
    gained = (end.exp() * R).sum() - (Q.exp() * R).sum()
    assert exact_from_logps("kl", end, Q) <= gained / beta
    for lam in (0.0, 0.3, 1.0, 10.0):
        assert leash.update(end, Q, R, beta, lam).tolist() == pytest.approx(end.tolist(), abs=1e-12)
        arrived = leash.iterate(Q, R, beta, lam, 3000)[-1]
        assert arrived.tolist() == pytest.approx(end.tolist(), abs=1e-9)


@pytest.mark.parametrize(("beta", "lam"), ANCHORED)
def test_the_rate(beta: float, lam: float) -> None:
    policies = leash.iterate(Q, R, beta, lam, 40)
    assert len(policies) == 41 and policies[0].tolist() == Q.tolist()
    end, rate = leash.destination(Q, R, beta), lam / (beta + lam)
    assert leash.measured_rate(policies, end) == pytest.approx(rate, abs=1e-6)
    error = leash.log_error(policies, end)
    far = error[:-1] > 1e-6
    assert (error[1:][far] / error[:-1][far]).tolist() == pytest.approx([rate] * int(far.sum()), abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 10.0])
def test_without_an_anchor_every_lambda_collapses(lam: float) -> None:
    policies = leash.iterate(Q, R, 0.0, lam, 2000)
    loophole = policies[:, R.argmax()].exp()
    assert loophole[0].item() == pytest.approx(0.01)
    assert loophole[-1] > 1 - 1e-12
    assert (loophole.diff() >= -1e-15).all()
    kl = exact_from_logps("kl", policies[-1], Q).item()
    assert kl == pytest.approx(-Q[R.argmax()].item(), abs=1e-9)
    if lam > 0:  # the trust region sets the pace: λ times as many updates to the same policy
        once = leash.iterate(Q, R, 0.0, 0.1 * lam, 1)[-1]
        assert policies[10].tolist() == pytest.approx(once.tolist(), abs=1e-12)


def test_which_leash_runs_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "which_leash.py"), "--output-dir", "out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line[:3].strip() and line.split()[0] in ("0.50", "0.15", "0.00")]
    assert len(rows) == len(leash.BETAS) * len(leash.LAMBDAS)
    for beta in ("0.50", "0.15", "0.00"):
        assert len({tuple(row[2:5]) for row in rows if row[0] == beta}) == 1  # one destination, whatever λ is
    for row in rows:
        assert row[6] == row[7]  # the share kept, as measured and as predicted
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["which_leash.png", "which_leash.svg"]
    assert (tmp_path / "out" / "which_leash.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "which_leash.svg").read_text("utf-8")
