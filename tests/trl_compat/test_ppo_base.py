"""The base of the configuration has the fields of TRL's PPOConfig."""

from __future__ import annotations

import typing

import pytest

from tests.trl_fields import TRL_FIELDS, default, fields
from trl_trustkl.trl_compat import ppo_base as _base

pytestmark = pytest.mark.filterwarnings("ignore")


def test_our_base_has_the_fields_and_defaults_of_trls():
    mine = fields(_base.PPOConfig)
    assert {name: mine[name].default for name in TRL_FIELDS} == TRL_FIELDS
    inherited = fields(_base._BaseConfig)
    assert set(mine) - set(inherited) == set(TRL_FIELDS) - set(inherited)


def test_our_base_equals_trls_own_configuration_field_by_field():
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 removed its PPO trainer")
    theirs, mine = fields(ppo.PPOConfig), fields(_base.PPOConfig)
    assert theirs.keys() == mine.keys()
    their_types, my_types = typing.get_type_hints(ppo.PPOConfig), typing.get_type_hints(_base.PPOConfig)
    for name in theirs:
        assert default(theirs[name]) == default(mine[name]), name
        assert their_types[name] == my_types[name], name
