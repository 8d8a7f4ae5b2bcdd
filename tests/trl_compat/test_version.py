"""The PPO classes come from TRL where the installed version has them, and otherwise from `ppo_base`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import pytest

from trl_trustkl.trl_compat import ppo_base, version


def imported_anew() -> ModuleType:
    """A second copy of the module; the imported one is unchanged."""
    spec = importlib.util.spec_from_file_location("trl_trustkl.trl_compat.version_anew", version.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_classes_are_those_of_trl_if_it_has_them():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
    assert version.PPOConfig is ppo.PPOConfig and version.PPOTrainer is ppo.PPOTrainer


def test_the_classes_are_those_of_this_package_if_trl_has_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    module = imported_anew()
    assert module.PPOConfig is ppo_base.PPOConfig and module.PPOTrainer is ppo_base.PPOTrainer


def test_the_import_warns_of_nothing_experimental(monkeypatch):
    """TRL's warning is shown on the first import of `trl.experimental`."""
    for name in [name for name in sys.modules if name.startswith("trl.experimental")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        imported_anew()
    assert [str(each.message) for each in caught if "experimental" in str(each.message)] == []
