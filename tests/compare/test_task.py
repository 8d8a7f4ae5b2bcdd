"""The task of a comparison, loaded by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.jobs import TASK
from trl_trustkl.compare import task
from trl_trustkl.errors import ConfigError


def test_a_task_by_module_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task.load(TASK).__name__ == "tiny_task"
    assert callable(task.load(task.SENTIMENT))
    (tmp_path / "mine.py").write_text("def train(output_dir, **changes): return output_dir\n")
    monkeypatch.chdir(tmp_path)
    found = task.resolve("mine.py:train")
    assert found == f"{tmp_path / 'mine.py'}:train"
    assert task.load(found)("x", callbacks=(), seed=1) == "x"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "it must be module:function or path/to/file.py:function"),
        ("tests.tiny:", "it must be module:function"),
        (
            "tests.nowhere:f",
            "there is no module 'tests.nowhere' to import; it must be module:function or path/to/file.py",
        ),
        ("/nowhere/x.py:f", "`task` got the file '/nowhere/x.py'; there is no such file"),
        ("tests.compare.jobs:tiny_tsk", "'tiny_tsk' does not exist. Did you mean 'tiny_task'?"),
        ("tests.tiny:good_words", "which cannot be called as (output_dir, *, callbacks=(), **config_changes)"),
        ("tests.tiny:VOCAB", "'VOCAB' is not callable"),
    ],
)
def test_a_task_that_cannot_be_run(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        task.load(name)
    assert said in str(error.value)
