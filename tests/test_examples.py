"""Tests that the examples run, and that their results are correct."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
)

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.controllers import CONTROLLERS
from trl_trustkl.divergences import exact_from_logps
from trl_trustkl.errors import ConfigError
from trl_trustkl.policy.loading import trainable
from trl_trustkl.policy.value_head import ValueHead

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def registered_controllers() -> Iterator[None]:
    """An example registers its controller when it is loaded; no other test may see it."""
    with mock.patch.dict(CONTROLLERS):
        yield


fixed_points = load("kl_or_trust_region")
Q = torch.tensor(fixed_points.REFERENCE, dtype=torch.float64).log()
R = torch.tensor(fixed_points.REWARD, dtype=torch.float64)
ANCHORED = [(beta, lam) for beta in (2.0, 0.5, 0.15) for lam in (0.0, 0.3, 1.0, 10.0)]


def objective(logp: torch.Tensor, mu: torch.Tensor, beta: float, lam: float) -> torch.Tensor:
    penalties = beta * exact_from_logps("kl", logp, Q) + lam * exact_from_logps("kl", logp, mu)
    return (logp.exp() * R).sum(-1) - penalties


@pytest.mark.parametrize(("beta", "lam"), [*ANCHORED, (0.0, 0.5), (0.0, 10.0)])
def test_an_update_is_the_maximum(beta: float, lam: float) -> None:
    mu = torch.log_softmax(Q + torch.randn(6, dtype=torch.float64), -1)
    best = fixed_points.update(mu, Q, R, beta, lam)
    assert best.exp().sum().item() == pytest.approx(1)
    others = torch.log_softmax(best + 0.1 * torch.randn(500, 6, dtype=torch.float64), -1)
    assert (objective(others, mu, beta, lam) < objective(best, mu, beta, lam)).all()
    logits = best.clone().requires_grad_()
    objective(torch.log_softmax(logits, -1), mu, beta, lam).backward()
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [2.0, 0.5, 0.15])
def test_training_ends_at_a_fixed_point_that_is_the_same_for_every_lambda(beta: float) -> None:
    end = fixed_points.destination(Q, R, beta)
    weights = torch.tensor(fixed_points.REFERENCE, dtype=torch.float64) * (R / beta).exp()
    assert end.exp().tolist() == pytest.approx((weights / weights.sum()).tolist(), rel=1e-12)
    gained = (end.exp() * R).sum() - (Q.exp() * R).sum()
    assert exact_from_logps("kl", end, Q) <= gained / beta
    for lam in (0.0, 0.3, 1.0, 10.0):
        assert fixed_points.update(end, Q, R, beta, lam).tolist() == pytest.approx(end.tolist(), abs=1e-12)
        arrived = fixed_points.iterate(Q, R, beta, lam, 3000)[-1]
        assert arrived.tolist() == pytest.approx(end.tolist(), abs=1e-9)


@pytest.mark.parametrize(("beta", "lam"), ANCHORED)
def test_the_error_shrinks_at_the_predicted_rate(beta: float, lam: float) -> None:
    policies = fixed_points.iterate(Q, R, beta, lam, 40)
    assert len(policies) == 41 and policies[0].tolist() == Q.tolist()
    end, rate = fixed_points.destination(Q, R, beta), lam / (beta + lam)
    assert fixed_points.measured_rate(policies, end) == pytest.approx(rate, abs=1e-6)
    error = fixed_points.log_error(policies, end)
    far = error[:-1] > 1e-6
    assert (error[1:][far] / error[:-1][far]).tolist() == pytest.approx([rate] * int(far.sum()), abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 10.0])
def test_without_an_anchor_every_lambda_collapses(lam: float) -> None:
    policies = fixed_points.iterate(Q, R, 0.0, lam, 2000)
    loophole = policies[:, R.argmax()].exp()
    assert loophole[0].item() == pytest.approx(0.01)
    assert loophole[-1] > 1 - 1e-12
    assert (loophole.diff() >= -1e-15).all()
    kl = exact_from_logps("kl", policies[-1], Q).item()
    assert kl == pytest.approx(-Q[R.argmax()].item(), abs=1e-9)
    if lam > 0:  # the trust region determines the rate: λ times as many updates lead to the same policy
        once = fixed_points.iterate(Q, R, 0.0, 0.1 * lam, 1)[-1]
        assert policies[10].tolist() == pytest.approx(once.tolist(), abs=1e-12)


@pytest.mark.processes
def test_kl_or_trust_region_runs_and_prints_its_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "kl_or_trust_region.py"), "--output-dir", "out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line[:3].strip() and line.split()[0] in ("0.50", "0.15", "0.00")]
    assert len(rows) == len(fixed_points.BETAS) * len(fixed_points.LAMBDAS)
    for beta in ("0.50", "0.15", "0.00"):
        assert len({tuple(row[2:5]) for row in rows if row[0] == beta}) == 1  # the fixed point does not depend on λ
    for row in rows:
        assert row[6] == row[7]  # the share kept: measured and predicted
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["kl_or_trust_region.png", "kl_or_trust_region.svg"]
    assert (tmp_path / "out" / "kl_or_trust_region.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "kl_or_trust_region.svg").read_text("utf-8")


# -- Examples that train, on a tiny model for one update ------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def example(name: str, *arguments: str, capsys: pytest.CaptureFixture) -> list[str]:
    """Run its `main` in this process, which has already loaded torch and TRL, and return the printed lines."""
    load(name).main(list(arguments))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("distance", [0.05, 0.5, 2.0])
def test_the_divergences_are_those_of_the_estimators(distance: float) -> None:
    hand = load("divergences_by_hand")
    p = torch.tensor(hand.policy(distance), dtype=torch.float64).log()
    closed = hand.closed_forms(hand.policy(distance), hand.REFERENCE)
    assert set(closed) == set(hand.ESTIMATORS)
    for name in ("forward_kl", "js", "tv", "hellinger", "chi2"):
        assert closed[name][1] == pytest.approx(exact_from_logps(name, p, Q).item(), rel=1e-10)
    for name, (_, value) in closed.items():
        biased = name == "k2"
        assert (hand.moments(name, hand.policy(distance))[0] == pytest.approx(value, abs=1e-12)) is not biased


def test_the_table_of_divergences_fits_80_columns(capsys) -> None:
    lines = example("divergences_by_hand", capsys=capsys)
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[:1] == [name] for line in lines for name in load("divergences_by_hand").ESTIMATORS) == 10


def test_a_custom_controller_changes_the_coefficient(model, tmp_path, capsys) -> None:
    own = load("custom_controller")
    own.main(["--model", model, "--updates", "3", "--budget", "1e-6", "--output-dir", str(tmp_path)])
    coefs = [record["anchor"]["coef"] for record in load_records(tmp_path)]
    assert coefs[0] == coefs[1] == 0.02 < coefs[2]  # the first update starts at the reference, where the KL is 0
    rule = own.BudgetKL(coef=0.1, target=2.0)
    risen = rule.update(rule.init(), kl=4.0, episodes=8)
    assert (risen.coef, rule.update(risen, kl=1.0, episodes=8).coef) == pytest.approx((0.2, 0.19))
    assert rule.update(rule.init(), kl=0.0, episodes=8).coef == 0.1
    with pytest.raises(ConfigError, match=r"`kl_controller_kwargs` got 'upp'.*Did you mean 'up'"):
        tiny.config(tmp_path, kl_controller="budget", kl_target=1.0, kl_controller_kwargs={"upp": 1.0})
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_rewards_judge_their_own_rows_only(model, tmp_path, capsys) -> None:
    own = load("custom_reward")
    assert own.mentions_word([], ["so Quiet", "loud", "x"], word=["quiet", "quiet", None]) == [1.0, 0.0, None]
    replies = [[{"role": "assistant", "content": " ".join(["a"] * count)}] for count in (4, 6, 99, 1)]
    assert own.keeps_limit([], replies, limit=[4, 4, 4, None]) == [0.0, -0.5, -1.0, None]
    own.main(["--model", model, "--updates", "1", "--output-dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    requests = {row["request"]: row for row in own.ROWS}
    for row in rows:
        asked = requests[row["prompt"][0]["content"]]
        assert (row["score"] is None) == (asked["word"] is None and asked["limit"] is None)
    assert any(row["score"] is None for row in rows) and any(row["score"] is not None for row in rows)


def test_a_custom_engine_samples_from_the_policy(model, tmp_path, capsys) -> None:
    lines = example("custom_engine", "--model", model, "--updates", "2", "--output-dir", str(tmp_path), capsys=capsys)
    records = load_records(tmp_path)
    assert len(records) == 2 and all(abs(record["sampler"]["kl"]) < 1e-8 for record in records)
    assert all(0 < record["trust"]["kl"] <= 0.02 for record in records) and max(map(len, lines[-3:])) <= 80


def test_clip_rules_are_compared_from_one_seed(model, tmp_path, capsys) -> None:
    rules = ["ppo", "none", "gspo"]
    lines = example(
        "compare_clip_rules", "--rules", *rules, "--model", model, "--updates", "1", "--output-dir", str(tmp_path),
        capsys=capsys,
    )  # fmt: skip
    table = {line.split()[0]: line.split() for line in lines if line.split()[:1] and line.split()[0] in rules}
    assert list(table) == rules
    assert table["none"][1] == "0.0%"
    scores = {json.dumps(load_records(tmp_path / rule)[0]["score"]) for rule in rules}
    assert len(scores) == 1
    assert max(map(len, lines[-9:])) <= 80


def test_qlora_trains_and_adds_up_its_memory(model, tmp_path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    lines = example(
        "qlora_ppo", "--model", model, "--updates", "1", "--batch", "8", "--micro-batch", "2", "--response-length", "4",
        "--output-dir", str(tmp_path), capsys=capsys,
    )  # fmt: skip
    assert any(line.startswith("estimated peak") and line.endswith("fits 24 GB") for line in lines)
    assert len(load_records(tmp_path)) == 1


QWEN_7B = Qwen2Config(  # Qwen2.5-7B
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_8B = LlamaConfig(  # Llama 3.1 8B
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
)  # fmt: skip


def packed(weights: int) -> int:
    """Bytes of a matrix in NF4 with double quantisation, by bitsandbytes' blocks: 64 weights have a scale of a byte, and 256
    of these one of 4 bytes. The codes and the offset of a matrix have 272 numbers and one."""
    return math.ceil(weights / 2) + math.ceil(weights / 64) + 4 * math.ceil(weights / (64 * 256)) + 4 * (272 + 1)


def test_the_packing_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in ((64, 32), (320, 512)):
        data, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
        held = [data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert sum(each.numel() * each.element_size() for each in held) == packed(shape[0] * shape[1])


def in_memory(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize(
    "config", [QWEN_7B, LLAMA_8B, LlamaConfig(tie_word_embeddings=True)], ids=["qwen", "llama", "tied"]
)
def test_the_estimate_of_weights_equals_that_of_the_model_on_the_meta_device(config, tmp_path, capsys) -> None:
    config.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--estimate-only", "--response-length", "128"]
    lines = example("qlora_ppo", *arguments, "--reward-model", str(tmp_path), capsys=capsys)
    size = {line[:40].strip(): float(line[40:].split()[0]) for line in lines}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        one_label = AutoConfig.from_pretrained(tmp_path, num_labels=1)
        reward = AutoModelForSequenceClassification.from_config(one_label, dtype=torch.bfloat16)
    matrices = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    weights = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") in matrices}
    kept = [p for n, p in model.named_parameters() if n not in weights]
    with torch.device("meta"):
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        head = ValueHead(config.hidden_size)
    lora = in_memory(p.float() for p in [*trainable(model), *trainable(head)])
    wanted = {
        "4-bit weights": sum(packed(p.numel()) for p in weights.values()),
        "embeddings, head, norms in bf16": in_memory(kept),
        "reward model in bf16": in_memory(reward.parameters()),
        "trained weights, gradients, moments": 4 * lora,
        "trained weights kept of an update": 2 * lora,
        "hidden states under π_old and π_ref": 2 * 32 * 128 * config.hidden_size * 2,
    }
    assert {name: size[name] for name in wanted} == pytest.approx({n: v / 1e9 for n, v in wanted.items()}, abs=0.006)


def test_the_estimate_says_what_fits(tmp_path, capsys) -> None:
    QWEN_7B.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--estimate-only", "--response-length", "128"]
    lines = example("qlora_ppo", *arguments, capsys=capsys)
    assert lines[-1].startswith("estimated peak") and lines[-1].endswith("fits 24 GB")
    assert 8 < float(lines[-1][40:].split()[0]) < 24
    assert example("qlora_ppo", *arguments, "--gpu-memory", "8", capsys=capsys)[-1].endswith("does not fit 8 GB")


def test_a_run_allocates_what_was_estimated(model, tmp_path, monkeypatch) -> None:
    """On a CPU, where double quantisation is off and the other weights and the hidden states have 4 bytes instead of 2."""
    pytest.importorskip("bitsandbytes")
    qlora, kept, states = load("qlora_ppo"), [], []
    options = argparse.Namespace(
        gpu_memory=24.0,
        updates=2, batch=4, micro_batch=2, sample_batch=4, lora_r=16, prompt_length=24, response_length=4,
        reward_model=None, output_dir=str(tmp_path),
    )  # fmt: skip
    parts = qlora.estimate(AutoConfig.from_pretrained(model), options)
    trainer = qlora.build(model, options)
    optimise, enforce = trainer.optimise, trainer.enforce

    def watched(batch, *arguments):
        states.append(2 * sum(each.hidden.numel() for each in batch.scored.old_snapshots))  # and as many of π_ref
        return optimise(batch, *arguments)

    def enforced(batch, *arguments):
        path = batch.context.snapshot.path
        path.set_end()
        kept.append(in_memory([*path.start, *path.end]))
        return enforce(batch, *arguments)

    monkeypatch.setattr(trainer, "optimise", watched)
    monkeypatch.setattr(trainer, "enforce", enforced)
    trainer.train()
    policy, trained = trainer.model.policy, trainable(trainer.model)
    quantised = [p for p in policy.parameters() if p.dtype == torch.uint8]
    others = [p for p in policy.parameters() if p.dtype != torch.uint8 and not p.requires_grad]
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    moments = [state[p][name] for p in trained for name in ("exp_avg", "exp_avg_sq")]
    assert in_memory(quantised) == pytest.approx(parts["4-bit weights"] * 0.5 / qlora.NF4)
    assert in_memory(others) == 2 * parts["embeddings, head, norms in bf16"]
    assert in_memory(trained) * 2 + in_memory(moments) == parts["trained weights, gradients, moments"]
    head = in_memory(trainable(trainer.model.value))
    assert set(kept) == {parts["trained weights kept of an update"] - 2 * head}  # only the policy's path has an end
    assert 0 < max(states) * 2 <= parts["hidden states under π_old and π_ref"]


def run_notebook(name: str, **settings: object) -> dict[str, object]:
    """Run all cells in order, with these settings in place of those of the first cell; returns the names that they leave."""
    notebook = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    first, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec(compile(first, "settings", "exec"), names)
    assert settings.keys() <= names.keys()
    names |= settings
    for number, cell in enumerate(cells, start=2):
        exec(compile(cell, f"cell {number}", "exec"), names)
    return names


def test_the_notebook_of_ppo_runs_from_top_to_bottom(model, tmp_path, capsys) -> None:
    names = run_notebook("four_corners", MODEL=model, UPDATES=1, OUTPUT=str(tmp_path))
    said = capsys.readouterr().out
    assert all(f"\n{corner}" in said for corner in names["CORNERS"])
    assert {path.name for path in tmp_path.iterdir()} == {"anchor_and_clip", "clip_only", "anchor_only", "neither"}
    records = {path.name: load_records(path)[0] for path in tmp_path.iterdir()}
    assert [records[name]["anchor"]["coef"] for name in ("anchor_only", "clip_only")] == [0.05, 0.0]
    assert [records[name]["trust"]["rule"] for name in ("anchor_only", "clip_only")] == ["none", "ppo"]


def test_the_notebook_of_grpo_runs_from_top_to_bottom(model, tmp_path, capsys) -> None:
    names = run_notebook("grpo_trust_region", MODEL=model, UPDATES=3, LEARNING_RATE=0.3, OUTPUT=str(tmp_path))
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in names["LIMITS"])
    plain, limited, _ = ([record["trust"] for record in records] for records in names["runs"].values())
    assert max(each["kl"] for each in plain) > 0.02 >= max(each["kl"] for each in limited)
    assert [each["guaranteed"] for each in (plain[-1], limited[-1])] == [None, 0.02]


TRAINING = ("custom_controller", "custom_reward", "custom_engine", "compare_clip_rules", "qlora_ppo")


@pytest.mark.parametrize("name", ["kl_or_trust_region", "divergences_by_hand", *TRAINING])
def test_an_example_opens_with_a_paragraph_and_commands(name: str) -> None:
    paragraphs = (load(name).__doc__ or "").split("\n\n")
    assert len(paragraphs) >= 3 and f"python examples/{name}.py" in "".join(paragraphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_an_example_runs_on_smollm2_without_arguments_but_the_number_of_updates(name: str, tmp_path: Path) -> None:
    rules = ["--rules", "ppo"] if name == "compare_clip_rules" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--updates", "1", "--output-dir", "out", *rules],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(load_records(tmp_path / "out" / (rules[-1] if rules else ""))) == 1
