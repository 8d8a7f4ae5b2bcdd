"""The command line: its lines fit a terminal, its text obeys nothing, and the demo runs and stops as it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_trustkl import load_records
from trl_trustkl.callbacks.table import HEADER, line
from trl_trustkl.cli import main
from trl_trustkl.demo.run import Options, closing
from trl_trustkl.records import AnchorRecord, BoundRecord, GradientRecord, SamplerRecord, TrustRecord, ValueRecord
from trl_trustkl.report.text import one_line


def record(update: int = 1, **changes) -> BoundRecord:
    trust = {
        "rule": "ppo", "low": 0.2, "high": 0.2, "gated": 0.25, "gated_low": 0.1, "gated_high": 0.15, "coef": 0.0,
        "epochs": 2.0, "stopped": False, "kl": 0.03, "kl_max": 1.0, "kl_proposed": 0.03, "tv": 0.1, "max_ratio": 9.5,
        "ratio_quantiles": {"0.5": 1.0}, "scale": None, "tries": 0, "limit": None, "guaranteed": None,
    }  # fmt: skip
    anchor = AnchorRecord("k1", "reward", "exact", 0.05, 6.0, 5.5, 5.6, 0.3, 0.2)
    settings = {
        "update": update, "episode": 16 * update, "score": 0.4, "length": 20.0, "eos_rate": 0.1, "entropy": 2.5,
        "lr": 1e-3, "refused": None, "seconds": {"total": 1.0}, "anchor": anchor, "trust": TrustRecord(**trust),
        "value": ValueRecord(0.2, 0.0, 0.1), "gradient": GradientRecord(0.5, 1.0, 1.0), "sampler": SamplerRecord(0.0),
        "binding": "clip",
    }  # fmt: skip
    return BoundRecord(**settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": 9999, "score": -0.999, "binding": "grad_norm"},
        {"score": None, "binding": "backtrack"},
        {"refused": "the KL(π_old‖π) measured after it is not finite"},
        {"trust": record().trust._replace(max_ratio=7.5e12, kl=12.3456, gated=1.0)},
        {"anchor": record().anchor._replace(kl_exact=1234.5, target=1e6)},
        {"anchor": record().anchor._replace(kl_exact=99.99, coef=99.999, share=None, target=None)},
    ],
)
def test_a_line_of_the_table_fits_a_terminal_of_80_columns(changes):
    text = line(record(**changes))
    assert len(HEADER) <= 80 and len(text) <= 80, text


def test_the_closing_paragraph_says_what_the_records_say():
    options = Options(kl_target=6.0, cliprange=0.2)
    done = [record(i, binding="anchor" if i > 2 else "clip") for i in range(1, 10)]
    text = " ".join(closing(options, done).split())
    assert "averaged 5.6 nats per response (target 6)" in text
    assert "removed 25% of the gradient's weight" in text and "0.030 nats per token on average" in text
    assert "ratio was 9.5, outside [0.8, 1.2]" in text and "the anchor (7 of 9 updates)" in text
    calm = [record(trust=record().trust._replace(max_ratio=1.1), binding="none")]
    assert "within [0.8, 1.2]" in closing(options, calm).replace("\n", " ")
    assert "none of them" in closing(options, calm).replace("\n", " ")


def test_text_of_unknown_origin_is_one_line_without_control_characters():
    assert one_line("a\x1b[31mred\x1b[0m\r\nb\t c\x07") == r"a\x1b[31mred\x1b[0m b c\x07"


def test_usage_errors_and_errors_of_a_run_have_their_own_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["dmeo"])
    assert usage.value.code == 2
    assert main(["report", str(tmp_path)]) == 1
    assert "no records at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["demo", "--help"])
    assert asked.value.code == 0


def start_demo(folder: Path, updates: int) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from trl_trustkl.cli import main; sys.exit(main())"]
    arguments = ["demo", "--updates", str(updates), "--output-dir", str(folder)]
    return subprocess.Popen(
        command + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
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
    assert "Finishing the update in hand" in err and "Traceback" not in out + err
    assert 1 <= len(load_records(tmp_path)) <= 3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
