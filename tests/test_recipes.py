"""The pages of recipes: their snippets run as they are written, and what they quote is what the code says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config

from tests import tiny
from tests.test_docs import load
from trl_trustkl.callbacks.bound_report import BoundReportCallback
from trl_trustkl.errors import TrustKLError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("rewards", "data", "tuning", "engines", "merging")
POLICY, REWARD = "HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/Qwen2-0.5B-Reward"
NEEDS = "# needs "
"""The beginning of a snippet that does not run here; tests/test_docs.py checks its names."""


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text("utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.S | re.M)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, which replace the names on the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    policy = tiny.llama(hidden_size=64, intermediate_size=128)
    models = {POLICY: policy, REWARD: tiny.scalar_model(policy)}
    found = {name: str(folder / name.split("/")[1]) for name in models}
    for name, model in models.items():
        model.save_pretrained(found[name])
        tiny.tokenizer().save_pretrained(found[name])
    return found


def run(page: str, hub: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the snippets of a page in their order; returns what they define."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(BoundReportCallback, "render", lambda self, args: None)  # takes longer than a tiny run
    namespace: dict[str, Any] = {}
    for code in blocks(page, "python"):
        if not code.startswith(NEEDS):
            for name, place in hub.items():
                code = code.replace(name, place)
            exec(compile(code, f"docs/{page}.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in RECIPES if page != "merging"])
def test_the_snippets_of_a_page_run_in_their_order(page: str, hub, tmp_path: Path, monkeypatch) -> None:
    assert run(page, hub, tmp_path, monkeypatch)


def test_merging_into_dequantised_weights_keeps_the_policy_and_the_original_ones_do_not(
    hub, tmp_path: Path, monkeypatch
) -> None:
    """What docs/merging.md advises, by its own snippets."""
    namespace = run("merging", hub, tmp_path, monkeypatch)
    policy, text = namespace["policy"], "w1 w2 w3 w4 w5 w6"
    merged, other = (namespace["kl"](policy, namespace[name], text) for name in ("merged", "other"))
    assert merged < 1e-8 < 1e-4 < other
    loaded = AutoModelForCausalLM.from_pretrained("merged")
    assert not hasattr(loaded, "hf_quantizer")
    assert namespace["kl"](policy, loaded, text) < 1e-8


FAILURES = [
    lambda prompts, completions: {}["x"],
    lambda prompts, completions: [0.0] * 3,
    lambda prompts, completions: 0.5,
    lambda prompts, completions: [math.nan] * len(completions),
]
"""Reward functions that fail as the rows of the table in docs/rewards.md."""


def test_the_errors_of_reward_functions_are_raised(tmp_path: Path) -> None:
    quotes = re.findall(r"^\| [^|]+ \| (reward function `brief` [^|]+) \|", text_of("rewards"), re.M)
    for quote, func in zip(quotes, FAILURES, strict=True):
        func.__name__ = "brief"
        trainer = tiny.trainer(tmp_path, reward_funcs=func, changes={"max_refused": 1})
        with pytest.raises(TrustKLError) as error:
            trainer.train()
        assert quote.rstrip("…").strip() in str(error.value)


def test_the_mixture_of_the_page_loads(tmp_path: Path, monkeypatch) -> None:
    from trl_trustkl.cli.train_inputs import load_datasets
    from trl_trustkl.cli.train_options import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2", "level": 1}\n' * 10)
    (tmp_path / "greetings.jsonl").write_text('{"prompt": "Say hello."}\n' * 10)
    (mixture,) = blocks("data", "yaml")
    (tmp_path / "run.yaml").write_text(mixture)
    given = ["--model_name_or_path", "m", "--reward_funcs", "a.b", "--output_dir", "run", "--use_cpu"]
    train, held_out = load_datasets(parse([*given, "--config", "run.yaml", "--eval_strategy", "steps"]))
    assert len(train) == 18 and len(held_out) == 2 and set(train.column_names) == {"prompt", "answer"}


def test_the_means_about_learning_rates_are_those_of_the_study() -> None:
    measured = {}
    for line in (ROOT / "benchmarks/data/study/study.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9:
            measured[cells[0]] = [cell.partition(" ± ")[0] for cell in (cells[2], *cells[6:8])]
    rows = re.findall(r"^\| ((?:plain|max_kl)[^|]*) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text_of("tuning"), re.M)
    assert len(rows) == 9 and {name: list(numbers) for name, *numbers in rows} == {
        name: measured[name] for name, *_ in rows
    }


def test_the_figures_about_merging_are_those_of_the_benchmark() -> None:
    rows = (line.strip("| ").split(" | ") for line in (ROOT / "benchmarks/data/merged_adapter.md").open())
    kl = {(row[0], row[1]): row[4] for row in rows if len(row) == 7}
    (said,) = re.findall(r"^- Dequantised.*?^$", text_of("merging"), re.S | re.M)
    assert re.findall(r"0\.\d+", said) == [
        kl["dequantised, merged", "bf16"], kl["4-bit + adapter", "bf16"], kl["original, merged", "float32"],
        kl["4-bit, no adapter", "float32"], kl["merged in 4 bits", "float32"],
    ]  # fmt: skip


QWEN = {
    "0.5B": (151_936, 896, 4_864, 24, 14, 2), "1.5B": (151_936, 1_536, 8_960, 28, 12, 2),
    "3B": (151_936, 2_048, 11_008, 36, 16, 2), "7B": (152_064, 3_584, 18_944, 28, 28, 4),
    "14B": (152_064, 5_120, 13_824, 48, 40, 8), "32B": (152_064, 5_120, 27_648, 64, 40, 8),
}  # fmt: skip
"""Vocabulary, hidden and inner size, layers, heads, heads of keys and values of Qwen2.5."""


@pytest.mark.parametrize("size", QWEN)
def test_the_estimates_are_those_of_the_example(size: str, tmp_path: Path, capsys) -> None:
    vocabulary, hidden, inner, layers, heads, keys = QWEN[size]
    Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=vocabulary == 151_936,
    ).save_pretrained(tmp_path)  # fmt: skip
    example = load("examples/qlora_ppo.py")
    found = []
    for reward_model in ([], ["--reward-model", str(tmp_path)]):
        example.main(["--model", str(tmp_path), "--estimate-only", "--response-length", "128", *reward_model])
        (peak,) = re.findall(r"estimated peak .*?([\d.]+) GB", capsys.readouterr().out)
        found.append(f"{float(peak):.1f} GB")
    assert f"| Qwen2.5-{size} | {' | '.join(found)} |" in text_of("engines")
