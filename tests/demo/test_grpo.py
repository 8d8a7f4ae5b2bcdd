"""The demo with GRPO: its closing text, its exit status and its files."""

from __future__ import annotations

import io
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.example_runs import record
from trl_trustkl.demo import grpo, table, task
from trl_trustkl.demo.grpo import Options, closing, conclude


def limited(kl: float, proposed: float, scale: float) -> Any:
    return record(trust=record().trust._replace(kl=kl, kl_proposed=proposed, scale=scale, gated=0.0, guaranteed=0.02))


def test_the_closing_paragraph_says_what_the_records_say():
    text = " ".join(closing(Options(), [limited(0.019, 0.5, 0.2), limited(0.004, 0.004, 1.0)]).split())
    assert "clip removed 0% of the gradient" in text and "by up to 0.500 nats per token" in text
    assert "The hard limit of 0.02 shortened 1 of 2 updates: the largest one moved the policy by 0.0190." in text
    assert "The limit is guaranteed in 2 of 2 updates" in text
    rejected = limited(math.nan, math.nan, 0.0)
    rejected = rejected._replace(refused="why", trust=rejected.trust._replace(guaranteed=None))
    text = " ".join(closing(Options(), [limited(0.019, 0.5, 0.2), rejected]).split())
    assert "guaranteed in 1 of 2 updates" in text and "by 0.0190" in text and "nan" not in text
    assert "has grown to 5.6 nats per response" in text
    assert all(len(line) <= 80 for line in closing(Options(), [limited(0.019, 0.5, 0.2)]).splitlines())


def test_the_conclusion_shows_scores_completions_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short name, on one line
    rows = [{"completion": text} for text in ("grey", "middle", "[red]bright\x1b[2J")]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bounds.jsonl").touch()
    console = Console(file=io.StringIO(), width=80, highlight=False)
    conclude(console, Options(output_dir="."), 0.25, 0.75, [limited(0.01, 0.1, 0.5)], Path("report.html"))
    text = console.file.getvalue()
    assert "before: score +0.25" in text and "after: score +0.75" in text and "middle" not in text
    assert "Sampled first: grey" in text and "Sampled last:  [red]bright\\x1b[2J" in text and "\x1b" not in text
    assert "Records:      bounds.jsonl" in text and "Adapter:" not in text, "the files that exist, and no others"


@pytest.mark.parametrize(("ending", "status"), [(None, 0), (KeyboardInterrupt(), 130)])
def test_the_status_says_how_the_run_ended(ending, status, monkeypatch, tmp_path, capsys):
    asked = {}

    class Trainer:
        saved = None

        def evaluate(self) -> dict[str, float]:
            return {"eval_reward": 0.5}

        def train(self) -> None:
            if ending is not None:
                raise ending

        def save_model(self, folder: str) -> None:
            self.saved = folder

    trainer = Trainer()
    live = SimpleNamespace(progress=nullcontext(), records=[], rendered=None)
    monkeypatch.setattr(table, "LiveReport", lambda console, total: live)
    monkeypatch.setattr(task, "sentiment_grpo_trainer", lambda folder, **given: asked.update(given) or trainer)
    (tmp_path / "completions.jsonl").write_text('{"completion": "said"}\n')
    assert grpo.run(Options(output_dir=str(tmp_path), updates=3, max_kl=0.1)) == status
    assert trainer.saved == str(tmp_path / "adapter")
    assert (asked["max_steps"], asked["trust_max_kl"], asked["learning_rate"], asked["seed"]) == (3, 0.1, 4e-3, 42)
    assert ("Held-out prompts after" in capsys.readouterr().out) == (status == 0)
