"""Functions of the user by their import paths."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from trl_trustkl.errors import ConfigError
from trl_trustkl.import_paths import load_function


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere_at_all:f", "`task` got 'nowhere_at_all:f', but there is no module 'nowhere_at_all' to import; it must be x."),
        ("json.nowhere.f", "no module 'json.nowhere' to import"),
        ("FOLDER/absent.py:f", "absent.py'; there is no such file"),
        ("FOLDER/needy.py:f", "importing it raised ModuleNotFoundError: No module named 'needy'"),
        ("json:lods", "'lods' does not exist. Did you mean 'loads'?"),
        ("FOLDER/mine.py:number", "'number' is not callable; there are: doubled."),
    ],
)  # fmt: skip
def test_a_function_that_is_not_there(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "needy.py").write_text("import needy")
    (tmp_path / "mine.py").write_text("from json import loads\nnumber = 1\ndef doubled(x): return 2 * x\n")
    with pytest.raises(ConfigError) as error:
        load_function("task", path.replace("FOLDER", str(tmp_path)), "x")
    assert said in str(error.value)


def test_a_function_by_module_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def doubled(x): return 2 * x\n")
    assert load_function("task", "json:loads", "x") is load_function("task", "json.loads", "x")
    doubled = load_function("task", f"{tmp_path / 'mine.py'}:doubled", "x")
    assert doubled(3) == 6 and pickle.loads(pickle.dumps(doubled)) is doubled
