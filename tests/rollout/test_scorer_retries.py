"""Retries of reward functions in a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import tiny
from trl_trustkl import load_records
from trl_trustkl.errors import RewardError
from trl_trustkl.run.signals import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore")


def failing(times: int) -> Callable:
    calls: list[int] = []

    def flaky(prompts: list, completions: list, **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) <= times:
            raise ConnectionError("the service is down")
        return tiny.good_words(prompts, completions)

    return flaky


def test_a_reward_function_is_retried_as_often_as_configured(tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(StopRequest, "wait", lambda self, seconds: waited.append(seconds))
    tiny.trainer(tmp_path / "a", changes={"reward_retries": 3}, reward_funcs=failing(3)).train()
    assert waited == [1.0, 2.0, 4.0] and len(load_records(tmp_path / "a")) == 3
    with pytest.raises(RewardError, match="the service is down"):
        tiny.trainer(tmp_path / "b", changes={"reward_retries": 1}, reward_funcs=failing(2)).train()
