"""`trustkl demo`: arguments, and runs of the demo."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT
from trl_trustkl import load_records
from trl_trustkl.cli import demo as command
from trl_trustkl.demo import grpo as grpo_module
from trl_trustkl.demo import run as run_module
from trl_trustkl.demo.run import Options
from trl_trustkl.errors import ConfigError


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_every_option_of_a_run_has_an_argument_with_its_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the folder is created
    asked = []
    monkeypatch.setattr(run_module, "run", lambda options: asked.append(options) or 7)
    options = parsed()
    assert options.run(options) == 7, "the status of the run is not returned"
    changed = Options("folder", 3, 5.0, 0.5, 0.1, 1e-4, 9)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed._asdict().items()]
    options = parsed(*flags)
    assert options.run(options) == 7 and asked == [Options(), changed]
    assert list(map(type, asked[1])) == list(map(type, Options()))


def test_the_options_of_grpo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(grpo_module, "run", lambda options: asked.append(options) or 7)
    for flags, expected in [
        ([], grpo_module.Options()),
        (["--max-kl=0.1", "--updates=3", "--output-dir=f"], grpo_module.Options("f", 3, 0.1)),
    ]:
        options = parsed("--trainer=grpo", *flags)
        assert options.run(options) == 7 and asked.pop() == expected
    for flags in (["--trainer=grpo", "--kl-target=3"], ["--max-kl=0.1"]):
        options = parsed(*flags)
        with pytest.raises(ConfigError, match="has no such option"):
            options.run(options)


def start_demo(folder: Path, updates: int) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from trl_trustkl.cli import main; sys.exit(main())"]
    arguments = ["demo", "--updates", str(updates), "--output-dir", str(folder)]
    return subprocess.Popen(
        command + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_demo_leaves_records_a_report_and_an_adapter_that_peft_loads(tmp_path):
    out, err = start_demo(tmp_path, 2).communicate(timeout=600)
    assert "Held-out prompts after" in out, err
    assert all(len(row) <= 80 for row in out.splitlines() if str(tmp_path) not in row)
    records = load_records(tmp_path)
    assert [r["update"] for r in records] == [1, 2]
    assert records[0]["anchor"]["kl_exact"] == 0.0
    assert (tmp_path / "report.html").exists()
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_with_its_records_kept_and_the_adapter_saved(tmp_path):
    process = start_demo(tmp_path, 50)
    deadline = time.monotonic() + 300
    while not (tmp_path / "bounds.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Finishing the current update" in err and "Traceback" not in out + err
    assert 1 <= len(load_records(tmp_path)) <= 3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
