"""The run of the demo: its exit status, its evaluation and its closing text."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.example_runs import record
from trl_trustkl.demo import grpo
from trl_trustkl.demo import run as demo
from trl_trustkl.demo.run import Options, closing, conclude, evaluate
from trl_trustkl.errors import Interrupted, MissingPackageError


def test_the_closing_paragraph_says_what_the_records_say():
    options = Options(kl_target=6.0, cliprange=0.2)
    done = [record(i, binding="anchor" if i > 2 else "clip") for i in range(1, 10)]
    text = " ".join(closing(options, done).split())
    assert "averaged 5.6 nats per response (target 6)" in text
    assert "removed 25% of the gradient's weight" in text and "0.030 nats per token on average" in text
    assert "ratio was 9.5, outside [0.8, 1.2]" in text and "was the anchor in 7 of 9 updates. The anchor" in text
    calm = [record(trust=record().trust._replace(max_ratio=1.1), binding="none")]
    assert "within [0.8, 1.2]" in closing(options, calm).replace("\n", " ")
    assert "none of them" in closing(options, calm).replace("\n", " ")
    rerun = [
        *done,
        record(10, counterfactual={"clip": 0.06, "grad_norm": None}, trust=record().trust._replace(kl=0.03)),
    ]
    text = " ".join(closing(options, rerun).split())
    assert (
        "In 1 attributed update, the KL(π_old‖π) would have been 2 times as large without the clip. The anchor" in text
    )


class Trainer:
    """A trainer whose run raises `ending`, and whose evaluation returns `rows`."""

    def __init__(self, ending: BaseException | None = None, rows: list[dict] | None = None) -> None:
        self.ending, self.rows, self.saved = ending, rows, None

    def train(self) -> None:
        if self.ending is not None:
            raise self.ending

    def evaluate_completions(self) -> list[dict]:
        return self.rows

    def save_model(self, folder: str) -> None:
        self.saved = folder


def ended(ending: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Trainer]:
    """The exit status of a demo whose training raises `ending`, and its trainer."""
    trainer = Trainer(ending, rows("a reply"))
    table = SimpleNamespace(progress=nullcontext(), records=[], rendered=None)
    monkeypatch.setattr(demo, "build", lambda options, console: (trainer, table))
    return demo.run(Options(output_dir="runs/demo")), trainer


@pytest.mark.parametrize(
    ("ending", "status"), [(None, 0), (KeyboardInterrupt(), 130), (Interrupted(2), 130), (Interrupted(15), 143)]
)
def test_the_status_says_how_the_run_ended(ending, status, monkeypatch, capsys):
    """The adapter is saved in each case; only a complete run is evaluated after training."""
    found, trainer = ended(ending, monkeypatch)
    assert (found, trainer.saved) == (status, "runs/demo/adapter")
    assert ("Held-out prompts after" in capsys.readouterr().out) == (status == 0)


def test_an_error_of_the_run_is_not_swallowed(monkeypatch):
    with pytest.raises(ValueError, match="wrong"):
        ended(ValueError("wrong"), monkeypatch)


def console() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


def rows(text: str) -> list[dict]:
    return [
        {"score": score, "kl": 2 * score, "length": 10, "prompt": [{"content": "asked"}], "completion": text}
        for score in (0.25, 0.75)
    ]


def evaluated(text: str) -> dict:
    return evaluate(Trainer(rows=rows(text)))


def test_an_evaluation_is_the_mean_over_the_held_out_prompts():
    assert evaluated("said") == {"score": 0.5, "kl": 1.0, "prompt": "asked", "completion": "said"}


def write_files(folder: Path) -> None:
    """What a run leaves."""
    (folder / "adapter").mkdir(parents=True)
    for name in ("bounds.jsonl", "completions.jsonl", "report.html"):
        (folder / name).touch()


def test_the_closing_text_says_what_changed_and_where_the_files_are(tmp_path, monkeypatch):
    out = console()
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "folder")
    after = evaluated("[red]bright\x1b[2J")
    conclude(out, Options(output_dir="folder"), evaluated("grey"), after, [record()], Path("folder/report.html"))
    text = out.file.getvalue()
    assert "Held-out prompts before: score +0.50, KL to the reference 1.00 nats/response" in text
    assert "Before:  grey" in text and "After:   [red]bright\\x1b[2J" in text and "\x1b" not in text
    assert "(a line for each of 1 update)" in text and "The anchor penalised the KL" in text
    for line in (
        "Report:       folder/report.html",
        "Completions:  folder/completions.jsonl",
        "Adapter:      folder/adapter ",
    ):
        assert f"\n{line}" in text


def test_a_run_that_was_ended_prints_no_evaluation_and_only_files_that_exist(tmp_path):
    out = console()
    (tmp_path / "adapter").mkdir()
    conclude(out, Options(output_dir=str(tmp_path)), evaluated("grey"), None, [], None)
    assert out.file.getvalue().split()[:1] == ["Adapter:"]
    assert not any(word in out.file.getvalue() for word in ("Held-out", "Records:", "Report:", "The anchor"))


@pytest.mark.parametrize(
    ("module", "packages"), [(demo, ("bitsandbytes", "rich")), (grpo, ("jinja2", "vaderSentiment"))]
)
def test_what_the_demo_needs_is_named_before_it_loads_anything(module, packages, monkeypatch):
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingPackageError, match=f"The demo needs {' and '.join(packages)}, which are not installed. Fix: "
    ):
        module.run(module.Options())


def test_the_demo_says_how_long_it_takes_on_one_line():
    out = console()
    for seconds in (demo.SECONDS, grpo.SECONDS):
        demo.announce(out, 100, seconds)
    assert len(out.file.getvalue().splitlines()) == 2
