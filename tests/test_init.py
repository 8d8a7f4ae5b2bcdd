"""The names that the package exports, and those that are loaded on first use."""

from __future__ import annotations

import pytest

import trl_trustkl


@pytest.mark.parametrize("name", trl_trustkl.__all__)
def test_every_exported_name_can_be_imported_and_is_listed(name):
    assert getattr(trl_trustkl, name) is not None
    assert name in dir(trl_trustkl)


def test_names_loaded_on_first_use_are_those_of_their_modules():
    from trl_trustkl.callbacks import adaptive_kl, bound_report
    from trl_trustkl.ppo import config, trainer

    assert trl_trustkl.TrustKLPPOTrainer is trainer.TrustKLPPOTrainer
    assert trl_trustkl.TrustKLPPOConfig is config.TrustKLPPOConfig
    assert trl_trustkl.AdaptiveKLCallback is adaptive_kl.AdaptiveKLCallback
    assert trl_trustkl.BoundReportCallback is bound_report.BoundReportCallback


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_trustkl' has no attribute 'TrustKLTrainer'"):
        _ = trl_trustkl.TrustKLTrainer
