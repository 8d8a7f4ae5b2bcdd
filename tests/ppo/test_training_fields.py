"""Fields of transformers with a range, and what transformers rejects."""

from __future__ import annotations

import dataclasses

import pytest

from tests import tiny
from tests.messages import assert_says
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.errors import ConfigError
from trl_trustkl.ppo.training_fields import only_transformers_checks, rejected_by_transformers

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps"])
@pytest.mark.parametrize(("good", "bad"), [((1, 0.5, 3, 7.0), (-1, -0.5, 1.5))])
def test_steps_are_counted_or_a_share_of_the_run(tmp_path, name, good, bad):
    for value in good:
        assert getattr(tiny.config(tmp_path, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError) as error:
            tiny.config(tmp_path, **{name: value})
        assert_says(error, f"`{name}`", value, "an integer >= 0, or a share")


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"ddp_backend": "gloo"}, ("`ddp_backend`", "process group")),
        ({"accelerator_config": "{"}, ("`accelerator_config`", "JSONDecodeError")),
        ({"accelerator_config": {"batches": 1}}, ("`accelerator_config`", "'batches'")),
        ({"torch_empty_cache_steps": -1}, ("`torch_empty_cache_steps`", "bigger than 0")),
        ({"warmup_steps": -1}, ("`warmup_steps`", "ValueError")),
    ],
    ids=lambda each: next(iter(each), "") if isinstance(each, dict) else "",
)
def test_what_transformers_rejects_is_an_error_that_names_the_field(tmp_path, changes, pieces):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **changes)
    assert_says(error, "transformers rejects this configuration", *pieces)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"optim_args": "momentum"}, ("`optim_args`", "not enough values")),
        ({"optim": "galore_adamw"}, ("`optim`", "galore_torch")),
        ({"lr_scheduler_kwargs": {"cycles": 3}}, ("`lr_scheduler_kwargs`", "'cycles'")),
        ({"lr_scheduler_kwargs": '{"cycles": 3}'}, ("`lr_scheduler_kwargs`", "'cycles'")),
    ],
    ids=lambda each: next(iter(each), "") if isinstance(each, dict) else "",
)
def test_an_optimizer_or_a_schedule_that_cannot_be_built_is_named_before_the_first_rollout(tmp_path, changes, pieces):
    trainer = tiny.trainer(tmp_path, changes=changes)
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert_says(error, *pieces)
    assert not (tmp_path / "bounds.jsonl").exists()


def test_only_fields_that_were_set_and_are_not_checked_here_are_named(tmp_path):
    plain = TrustKLPPOConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    given = dataclasses.replace(plain, adam_beta1=0.5, do_train=True, ddp_timeout=7, kl_coef=1.0)
    assert set(only_transformers_checks(given)) - set(only_transformers_checks(plain)) == {"ddp_timeout"}


def test_without_such_a_field_the_error_names_none():
    said = r"ValueError\('bad'\); see its TrainingArguments\.$"
    with pytest.raises(ConfigError, match=said), rejected_by_transformers([]):
        raise ValueError("bad")
    with pytest.raises(KeyboardInterrupt), rejected_by_transformers(["optim"]):
        raise KeyboardInterrupt
