"""Every method of transformers' trainer, and TRL's helpers, on the trainer: it works, or a package error names what does.

docs/migrating.md has tables of them, which each test compares with what happens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl.models import utils

from tests import tiny
from tests.pages import table_rows
from trl_trustkl import TrustKLPPOTrainer, load_records
from trl_trustkl.errors import ConfigError, NotAvailableYetError

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
METHODS, HELPERS = table_rows(PAGE, "method of the trainer"), table_rows(PAGE, "helper")
IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def trainer(tmp_path):
    changes = {"max_steps": 1, "per_device_eval_batch_size": 3}
    return tiny.trainer(tmp_path / "run", changes=changes, eval_dataset=tiny.prompts(4))


class Own(TrainerCallback):
    pass


def with_callbacks(trainer: Any) -> bool:
    trainer.add_callback(Own)
    trainer.remove_callback(Own)
    trainer.add_callback(own := Own())
    return trainer.pop_callback(Own) is own and trainer.pop_callback(Own) is None


def shape(loader: Any) -> tuple[list[list[int]], Tensor]:
    """The shapes of the batches of prompts, and the first batch."""
    batches = list(loader)
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in batches)
    return [list(batch["input_ids"].shape) for batch in batches], batches[0]["input_ids"]


def of_training(trainer: Any) -> bool:
    shapes, ids = shape(trainer.get_train_dataloader())
    return shapes == [[8, 4]] * 2 and ids[0].tolist() == [0, 0, 0, *trainer.train_dataset[0]["input_ids"]]


def of_four_prompts(loader: Any) -> bool:
    return shape(loader)[0] == [[3, 3], [1, 4]]


def files(trainer: Any) -> set[str]:
    return {path.name for path in Path(trainer.args.output_dir).iterdir()}


def saved(trainer: Any) -> bool:
    trainer.save_model()
    return {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files(trainer)


def saved_state(trainer: Any) -> bool:
    trainer.train()
    trainer.save_state()
    return json.loads((Path(trainer.args.output_dir) / "trainer_state.json").read_text())["global_step"] == 1


def with_card(trainer: Any) -> bool:
    trainer.create_model_card("name", dataset_name="data", tags=["mine"])
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    return "mine" in text and "ppo" in text


class Hub:
    """What of the hub's interface is used; `pushed` are the files that were uploaded."""

    def __init__(self) -> None:
        self.pushed: set[str] = set()

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
        assert repo_id == "me/run"
        self.pushed = {path.name for path in Path(folder_path).iterdir()}
        return "pushed"


def pushed(trainer: Any) -> bool:
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.hf_api", lambda: hub)
        found = trainer.push_to_hub(dataset_name="data")
    return found == "pushed" and {"README.md", "adapter_model.safetensors"} <= hub.pushed


def in_a_repository(trainer: Any) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.hf_api", Hub)
        trainer.init_hf_repo()
    return trainer.hub_model_id == "me/run"


def logged(trainer: Any) -> bool:
    trainer.log({"a": 1.0, "b": "text"})
    return {"a": 1.0, "b": "text"}.items() <= trainer.state.log_history[-1].items()


def saved_metrics(trainer: Any) -> bool:
    trainer.save_metrics("eval", metrics := trainer.evaluate())
    found = json.loads((Path(trainer.args.output_dir) / "eval_results.json").read_text())
    return found["eval_score"] == metrics["eval_score"]


def trained(trainer: Any) -> Any:
    trainer.train()
    assert len(load_records(trainer.args.output_dir)) == 1
    return trainer


def with_optimizer(trainer: Any) -> bool:
    trainer.create_optimizer_and_scheduler(3)
    optimizer = trainer.optimizer
    return getattr(trained(trainer).optimizer, "optimizer", None) is optimizer


def with_scheduler(trainer: Any) -> bool:
    trainer.create_optimizer()
    return trainer.create_scheduler(3).get_last_lr()[0] == trainer.args.learning_rate


def as_the_reference(trainer: Any) -> bool:
    policy = trained(trainer).policy_model
    after = policy(IDS).logits
    with trainer.null_ref_context():
        return not torch.equal(policy(IDS).logits, after)


def printed(trainer: Any) -> bool:
    trainer.generate_completions(sampling=True)
    return True


TRIALS: dict[str, Callable[[Any], Any]] = {
    "train": lambda t: t.train().global_step == 1,
    "evaluate": lambda t: {"eval_score", "eval_kl", "eval_length", "eval_eos_rate"} <= set(t.evaluate()),
    "add_callback": with_callbacks,
    "remove_callback": with_callbacks,
    "pop_callback": with_callbacks,
    "get_train_dataloader": of_training,
    "get_eval_dataloader": lambda t: all(map(of_four_prompts, (t.get_eval_dataloader(), t.eval_dataloader))),
    "get_test_dataloader": lambda t: of_four_prompts(t.get_test_dataloader(tiny.prompts(4))),
    "num_examples": lambda t: t.num_examples(t.get_train_dataloader()) == 16,
    "save_model": saved,
    "save_state": saved_state,
    "create_model_card": with_card,
    "push_to_hub": pushed,
    "init_hf_repo": in_a_repository,
    "log": logged,
    "log_metrics": lambda t: t.log_metrics("eval", t.evaluate()) is None,
    "save_metrics": saved_metrics,
    "metrics_format": lambda t: Trainer.metrics_format({"train_runtime": 1.0}) == {"train_runtime": "0:00:01.00"},
    "is_world_process_zero": lambda t: t.is_world_process_zero(),
    "is_local_process_zero": lambda t: t.is_local_process_zero(),
    "create_optimizer": lambda t: len(t.create_optimizer().param_groups) == 4,
    "create_scheduler": with_scheduler,
    "create_optimizer_and_scheduler": with_optimizer,
    "get_optimizer_cls_and_kwargs": lambda t: t.get_optimizer_cls_and_kwargs(t.args)[1]["lr"] == t.args.learning_rate,
    "get_optimizer_group": lambda t: len(trained(t).get_optimizer_group()) == 4,
    "get_learning_rates": lambda t: len(trained(t).get_learning_rates()) == 4,
    "get_decay_parameter_names": lambda t: any("lora_A" in name for name in t.get_decay_parameter_names(t.model)),
    "get_num_trainable_parameters": lambda t: (
        t.get_num_trainable_parameters() == sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    ),
    "generate_completions": printed,
    "null_ref_context": as_the_reference,
    "floating_point_ops": lambda t: t.floating_point_ops({"input_ids": IDS}) == 0,
    "store_flos": lambda t: t.store_flos() is None and trained(t).state.total_flos == 0,
    "create_accelerator_and_postprocess": lambda t: t.create_accelerator_and_postprocess() is None,
    "get_batch_samples": lambda t: len(t.get_batch_samples(iter(t.dataloader), 1, torch.device("cpu"))[0]) == 1,
    "set_initial_training_values": lambda t: t.set_initial_training_values(t.args, t.dataloader)[0] == 1,
    "get_total_train_batch_size": lambda t: t.get_total_train_batch_size(t.args) == 8,
    "get_sp_size": lambda t: t.get_sp_size() == 1,
    "get_cp_size": lambda t: t.get_cp_size() == 1,
    "get_tp_size": lambda t: t.get_tp_size() == 1,
    "compute_loss_context_manager": lambda t: t.compute_loss_context_manager() is not None,
    "autocast_smart_context_manager": lambda t: t.autocast_smart_context_manager() is not None,
    "end": lambda t: trained(t).end() is None,
    "predict": lambda t: t.predict(tiny.prompts(4)),
    "evaluation_loop": lambda t: t.evaluation_loop(t.eval_dataloader, "evaluation"),
    "prediction_step": lambda t: t.prediction_step(t.model, {"input_ids": IDS}, False),
    "compute_loss": lambda t: t.compute_loss(t.model, {"input_ids": IDS}),
    "training_step": lambda t: t.training_step(t.model, {"input_ids": IDS}),
    "hyperparameter_search": lambda t: t.hyperparameter_search(n_trials=1),
    "call_model_init": lambda t: t.call_model_init(),
}
"""Calls of each method; a true value says that it did what it is for."""


def public_methods() -> set[str]:
    """Of transformers' trainer, and of TRL's trainers that are installed."""
    parents = [kind for kind in TrustKLPPOTrainer.__mro__ if kind.__module__.startswith(("transformers.", "trl."))]
    names = {name for kind in parents for name in dir(kind)}
    return {name for name in names if not name.startswith("_") and callable(getattr(TrustKLPPOTrainer, name))}


def test_the_page_has_a_row_for_every_method():
    assert set(METHODS) == set(TRIALS) == public_methods() | {"generate_completions", "null_ref_context"}  # of TRL 1.12


@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_or_its_error_names_what_does(name, trainer):
    said = METHODS[name]
    if said.startswith("works"):
        assert TRIALS[name](trainer)
        return
    assert said.startswith("error")
    with pytest.raises(NotAvailableYetError, match=f"`{name}` is not supported"):
        TRIALS[name](trainer)


def test_a_trial_is_not_ignored(trainer):
    with pytest.raises(NotAvailableYetError, match="`trial` got {'learning_rate': 1.0}"):
        trainer.train(trial={"learning_rate": 1.0})
    assert not (Path(trainer.args.output_dir) / "bounds.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["model_init", "compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"]
)
def test_arguments_that_the_constructor_does_not_have(name, tmp_path):
    assert f"`{name}`" in PAGE
    with pytest.raises(TypeError, match=name):
        tiny.trainer(tmp_path, **{name: lambda: None})


def test_a_dict_of_evaluation_sets_has_a_dataloader_for_each_name(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_dataset={"a": tiny.prompts(4), "b": tiny.prompts(2)})
    assert len(trainer.get_eval_dataloader("b").dataset) == 2
    with pytest.raises(ConfigError, match="name one of 'a', 'b'"):
        trainer.get_eval_dataloader()


# -- helpers of TRL and accelerate -------------------------------------------------------------------------------------


def unwrapped(trainer: Any, folder: Path) -> bool:
    with utils.unwrap_model_for_generation(trained(trainer).model, trainer.accelerator) as model:
        return model.generate(IDS, max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (1, 5)


def of_accelerator(trainer: Any, folder: Path) -> bool:
    return Accelerator().unwrap_model(trained(trainer).model_wrapped) is trainer.model


def with_peft_config(trainer: Any, folder: Path) -> bool:
    config = trl.get_peft_config(trl.ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"]))
    assert isinstance(config, LoraConfig)
    return trained(tiny.trainer(folder, peft_config=config, changes={"max_steps": 1})).is_peft_model


def with_quantization(trainer: Any, folder: Path) -> bool:
    config = trl.get_quantization_config(trl.ModelConfig(load_in_4bit=True, dtype="float32"))
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "full")
    settings = {"max_steps": 1, "model_init_kwargs": {"quantization_config": config}}
    run = trained(tiny.trainer(folder / "run", str(folder / "full"), changes=settings))
    return run.policy_model.get_base_model().is_loaded_in_4bit


def with_reference(trainer: Any, folder: Path) -> bool:
    policy = tiny.llama()
    run = tiny.trainer(folder, policy, ref_model=trl.create_reference_model(policy), changes={"max_steps": 1})
    return trained(run).ref_model is not None and load_records(folder)[0]["anchor"]["kl_exact"] == 0


def sharded(name: str, value: Any) -> Callable[[Any, Path], Any]:
    def configured(trainer: Any, folder: Path) -> Any:
        assert callable(getattr(utils, f"prepare_{name}"))
        return tiny.config(folder, **{name: value})

    return configured


HELPED: dict[str, Callable[[Any, Path], Any]] = {
    "unwrap_model_for_generation": unwrapped,
    "accelerator.unwrap_model": of_accelerator,
    "get_peft_config": with_peft_config,
    "get_quantization_config": with_quantization,
    "create_reference_model": with_reference,
    "prepare_deepspeed": sharded("deepspeed", "zero3.json"),
    "prepare_fsdp": sharded("fsdp", "full_shard"),
}


def test_the_page_has_a_row_for_every_helper():
    assert set(HELPERS) == set(HELPED)


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_works_or_the_configuration_rejects_what_it_is_for(name, trainer, tmp_path):
    if HELPERS[name].startswith("works"):
        assert HELPED[name](trainer, tmp_path / "other")
        return
    with pytest.raises(NotAvailableYetError):
        HELPED[name](trainer, tmp_path / "other")
