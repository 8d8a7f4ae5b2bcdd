"""Settings that a resumed run may change, and those that it may not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import survival, tiny
from tests.pinned import on_pinned_transformers
from tests.survival import build
from trl_trustkl import TrustKLPPOConfig, load_records
from trl_trustkl.errors import ConfigError
from trl_trustkl.policy.loading import trainable
from trl_trustkl.run import resume_compatibility as settings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"kl_coef": 0.1}, ["`kl_coef`: 0.05 in the checkpoint, 0.1 now"]),
        (
            {"seed": 7, "cliprange": 0.3},
            ["`seed`: 42 in the checkpoint, 7 now", "`cliprange`: 0.2 in the checkpoint, 0.3 now"],
        ),
        ({"generation_kwargs": {"top_k": 5}}, ["`generation_kwargs`: None in the checkpoint, {'top_k': 5} now"]),
        ({"max_steps": 8}, ["`max_steps`: 6 in the checkpoint, 8 now", "schedule"]),
    ],
)
def test_settings_that_would_make_it_another_run_are_named(run_copy, changes, pieces):
    with pytest.raises(ConfigError) as error:
        build(run_copy, **changes).train(resume_from_checkpoint=True)
    assert all(piece in str(error.value) for piece in pieces), error.value


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ({"train_dataset": tiny.prompts(24)}, "rows of train_dataset: 16 in the checkpoint, 24 now"),
        ({"train_dataset": tiny.prompts(8)}, "rows of train_dataset: 16 in the checkpoint, 8 now"),
        ({"model": tiny.llama(num_hidden_layers=2)}, "trained numbers of the policy: "),
        ({"model": tiny.llama(num_hidden_layers=3)}, "trained numbers of the policy: "),
        ({"model": tiny.llama(hidden_size=64)}, "trained numbers of the value: 33 in the checkpoint, 65 now"),
        ({"value_model": tiny.scalar_model(tiny.llama())}, "trained numbers of the value: 33 in the checkpoint, "),
        ({"peft_config": None}, "adapter: "),
        ({"peft_config": tiny.lora(r=2)}, "adapter `r`: 4 in the checkpoint, 2 now"),
        ({"model": tiny.llama(vocab_size=50)}, "vocabulary size: 43 in the checkpoint, 50 now"),
    ],
)
def test_models_and_data_that_would_make_it_another_run_are_named(run_copy, arguments, piece):
    changes = {"max_steps": survival.UPDATES, **survival.KINDS["adapter and value head"][0]}
    changes |= {"lr_scheduler_type": "linear", "learning_rate": 1e-2, "optim": "adamw_torch"}
    with pytest.raises(ConfigError) as error:
        tiny.trainer(run_copy, changes=changes, **arguments).train(resume_from_checkpoint=True)
    assert piece in str(error.value)


@pytest.mark.parametrize("layers", [2, 3])
def test_another_shape_of_a_fully_tuned_model_is_named(tmp_path, layers):
    kind = "all weights and a value model"
    build(tmp_path, kind, max_steps=2).train()
    settings, arguments = survival.KINDS[kind]
    changes = {"max_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-2, "optim": "adamw_torch"} | settings
    other = tiny.trainer(tmp_path, tiny.llama(num_hidden_layers=layers), changes=changes, **arguments())
    with pytest.raises(ConfigError, match="trained numbers of the policy"):
        other.train(resume_from_checkpoint=True)


def test_harmless_settings_may_change(uninterrupted_run, run_copy):
    harmless = {"logging_steps": 1, "save_steps": 3, "save_total_limit": 5, "grace_seconds": 3.0, "run_name": "again"}
    build(run_copy, **harmless).train(resume_from_checkpoint=run_copy / "checkpoint-4")
    expected, found = survival.tensors(uninterrupted_run), survival.tensors(run_copy)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@on_pinned_transformers("Each release has other settings.")
def test_every_setting_is_either_harmless_or_compared(tmp_path):
    fields = {field.name for field in dataclasses.fields(TrustKLPPOConfig) if field.init}
    assert set(settings.HARMLESS) - {"logging_dir"} <= fields  # transformers 5.0 has it
    assert len(set(settings.HARMLESS)) == len(settings.HARMLESS)
    args = tiny.config(tmp_path, lr_scheduler_type="linear")
    now = settings.compared(args)
    assert set(now) == fields - set(settings.HARMLESS)
    for name in now:
        changed = now | {name: "something else"}
        (difference,) = settings.differences(changed, now, args)
        assert ("`max_steps`" if name == "num_total_batches" else f"`{name}`") in difference
    assert not list(settings.differences(now, now, args))


def test_a_field_missing_from_a_checkpoint_counts_as_its_default(tmp_path):
    args = tiny.config(tmp_path, panic_kl=2.0)
    now = settings.compared(args)
    old = {name: value for name, value in now.items() if name != "panic_kl"}
    assert list(settings.differences(old, now, args)) == ["`panic_kl`: None in the checkpoint, 2.0 now"]
    assert not list(settings.differences(old, now | {"panic_kl": None}, args))


def test_a_checkpoint_from_before_the_critic_free_estimators_fits(tmp_path):
    """Whitening was a plain switch, on by default."""
    args = tiny.config(tmp_path)
    now = settings.compared(args)
    added = ("advantage_estimator", "num_generations", "scale_rewards")
    old = {name: value for name, value in now.items() if name not in added} | {"whiten_advantages": True}
    assert not list(settings.differences(old, now, args))
    for changes in ({"whiten_advantages": False}, {"advantage_estimator": "rloo", "num_generations": 2}):
        other = tiny.config(tmp_path, **changes)
        found = list(settings.differences(old, settings.compared(other), other))
        assert "`whiten_advantages`: True in the checkpoint, False now" in found and len(found) == 1 + 2 * (
            "num_generations" in changes
        )


def divided(folder, rows: int, steps: int, **changes):
    settings = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        "max_steps": 4,
        "save_steps": 2,
    }
    return tiny.trainer(folder, changes={"num_mini_batches": 1, "save_strategy": "steps", **settings, **changes})


def test_the_same_batch_may_be_divided_otherwise(tmp_path):
    first, second = divided(tmp_path / "first", 4, 2), divided(tmp_path / "second", 2, 4)
    first.train()
    second.train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-2")
    assert [record["update"] for record in load_records(tmp_path / "second")] == [1, 2, 3, 4]
    for one, other in zip(trainable(first.model), trainable(second.model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [({"num_mini_batches": 2}, 2, 4), ({"measure_fraction": 0.5}, 2, 4), ({}, 4, 1)],
    ids=["mini-batches", "measured in part", "another batch"],
)
def test_a_batch_that_would_not_be_the_same_is_named(tmp_path, changes, rows, steps):
    divided(tmp_path, 4, 2, **changes).train()
    with pytest.raises(ConfigError, match="`(per_device_train_batch_size|gradient_accumulation_steps)`: "):
        divided(tmp_path, rows, steps, **changes).train(resume_from_checkpoint=True)


def test_what_a_model_is_loaded_with_from_the_hub_is_not_saved_and_may_change(tmp_path):
    before, now, other = (
        settings.compared(tiny.config(tmp_path, model_init_kwargs=given))
        for given in ({"token": "hf_secret", "revision": "a"}, {"cache_dir": "x", "revision": "a"}, {"revision": "b"})
    )
    assert before["model_init_kwargs"] == {"revision": "a"}
    older = before | {"model_init_kwargs": {"token": "hf_secret", "revision": "a"}}  # as earlier versions saved it
    assert not list(settings.differences(older, now, tiny.config(tmp_path)))
    (found,) = settings.differences(older, other, tiny.config(tmp_path))
    assert found == "`model_init_kwargs`: {'revision': 'a'} in the checkpoint, {'revision': 'b'} now"
    assert (
        settings.compared(tiny.config(tmp_path, model_init_kwargs={"token": "hf_secret"}))["model_init_kwargs"] is None
    )
