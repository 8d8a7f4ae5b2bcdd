"""What `trustkl train` prints while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_train_grpo import options
from tests.cli.training import flags, run_main, settings
from trl_trustkl.callbacks.table import HEADER


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bar", "plain"])
@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_each_update_has_a_line_and_no_dict_is_printed(
    place: Path, tmp_path: Path, capfd, trainer, disable_tqdm
) -> None:
    rows = (place / "prompts.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(json.dumps(json.loads(row)) for row in rows))
    given = options(place, tmp_path / "run") if trainer == "grpo" else settings(place, tmp_path / "run")
    given |= {"disable_tqdm": disable_tqdm, "logging_steps": 1, "dataset_name": str(tmp_path / "data")}
    given |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    assert run_main(*flags(given)) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert "{'" not in out + err
    start = lines.index(HEADER)
    assert [
        line.split()[0] for line in lines[start + 1 :] if line[:4].strip() in ("1", "2") and "evaluation" not in line
    ] == ["1", "2"]
    said = [line for line in lines if "evaluation: " in line]
    assert ("2/2" in err) != disable_tqdm
    assert [line.split()[0] for line in said] == ["1", "2"] and all(
        "score" in line or "reward" in line for line in said
    )
