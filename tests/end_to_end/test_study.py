"""The study of the README's figures, end to end with a tiny model: it is resumed, and its tables follow from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.study_task import cheerful_and_on_the_subject, subject_words

ROOT = Path(__file__).parents[2]


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "benchmarks/study.py", "--tasks", "tests/study_tasks.py", "--updates", "2", "--processes", "2",
        "--output-dir", str(folder / "runs"), "--data", str(folder / "data"), "--figures", str(folder / "figures"),
    ]  # fmt: skip
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_reward_names_the_subject_and_does_not_repeat_itself():
    prompt = "Write one sentence about a train that leaves early in the morning."
    assert subject_words(prompt) == ["train", "leave", "early", "morni"]
    good, off, empty = "A wonderful train, happy people", "A wonderful day, happy people", ""
    repeated = " ".join([good] * 3)
    scores = cheerful_and_on_the_subject([prompt] * 4, [good, off, empty, repeated])
    assert 0.5 < scores[0] <= 1 and scores[1] == scores[2] == 0 and scores[3] < scores[0] / 2
    chats = cheerful_and_on_the_subject(
        [[{"role": "user", "content": prompt}]], [[{"role": "assistant", "content": good}]]
    )
    assert chats == scores[:1]


@pytest.mark.processes
def test_a_run_of_the_study_is_kept_with_its_curves_and_held_out_scores(tmp_path):
    done = study(tmp_path, "--seeds", "1", "--only", "mechanisms")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "data/mechanisms/every-mechanism-seed-1.json").read_text("utf-8"))
    assert len(run["curves"]["trust.kl"]) == 2 and run["curves"]["counterfactual"][1]["clip"] is not None
    assert 0 <= run["held_out"]["before"]["score"] <= 1 and abs(run["held_out"]["before"]["kl"]) < 1e-4
    assert run["held_out"]["after"]["kl"] != 0 and run["made_with"]["task"] == "study_tasks.py:ppo"
    assert "1 run." in done.stdout and "without it, times as large" in done.stdout


@pytest.mark.slow
def test_the_study_is_resumed_and_makes_its_tables_and_figures(tmp_path):
    first = study(tmp_path, "--seeds", "1", "--only", "four_corners", "mechanisms")
    assert first.returncode == 0, first.stderr
    files = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").glob("*/*.json"))
    assert len(files) == 5 and files[-1] == "mechanisms/every-mechanism-seed-1.json"
    (tmp_path / "data" / files[0]).unlink()  # as if it had been stopped before it was saved
    again = study(tmp_path, "--seeds", "1", "2", "--only", "four_corners")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished after") == 5, (
        "the run that was finished is saved, and those of the new seed are made"
    )
    assert again.stdout.count("begins") == 4
    text = (tmp_path / "data" / "study.md").read_text("utf-8")
    assert "9 runs." in text and "| anchor + clip | 2 |" in text and "without it, times as large" in text
    assert (tmp_path / "figures" / "study_four_corners_dark.png").stat().st_size > 5000

    grpo = study(tmp_path, "--seeds", "1", "--only", "learning_rate")
    assert grpo.returncode == 0, grpo.stderr
    assert "| max_kl, lr_target, 0.02 | 1 |" in grpo.stdout and "score at a KL of 5" in grpo.stdout
    assert (tmp_path / "figures" / "study_learning_rate_light.png").exists()
    unchanged = study(tmp_path, "--seeds", "1", "--only", "learning_rate")
    assert "begins" not in unchanged.stdout
