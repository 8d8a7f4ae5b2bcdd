"""Loading of models, and preparation for training: adapter, quantised weights, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import ConfigError, ModelError, shown
from ..parallel.engines import load_everywhere
from ..parallel.sharding import Replicated
from ..trl_compat import activation_checkpointing
from .dropout import disable_dropout
from .precision import avoid_bf16, dtype_to_load
from .quantization import is_quantized, unpack_4bit_weights

ACCESS = ("token", "cache_dir", "local_files_only")
_OF_ADAPTER = ("revision", "subfolder", *ACCESS)
_OF_TOKENIZER = ("revision", "code_revision", "trust_remote_code", *ACCESS)
_OF_REPOSITORY = ("revision", "code_revision", "subfolder")


def without_adapter(model: Any) -> Any:
    """The model itself: of a PeftModel, the one that its adapters are in."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def init_kwargs_of(args: Any) -> dict[str, Any]:
    """`model_init_kwargs`, with the dtype to load in if they name none."""
    given = args.arguments("model_init_kwargs")
    return given if given.keys() & {"dtype", "torch_dtype"} else dtype_to_load(args) | given


def of_other_repository(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The policy's arguments for a model of another repository, which has other revisions and folders."""
    return {key: value for key, value in (init_kwargs or {}).items() if key not in _OF_REPOSITORY}


def of_tokenizer(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Those of a model's arguments that say where its files are and whether to run their code, for its tokenizer."""
    return _only(_OF_TOKENIZER, init_kwargs)


def _only(names: tuple[str, ...], init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (init_kwargs or {}).items() if key in names}


@contextmanager
def _with_arguments(name: str, init_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Raise an error of `from_pretrained` as a ModelError that names the arguments it may be about."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        if not init_kwargs:
            raise
        raise ModelError(
            f"{name!r} cannot be loaded with `model_init_kwargs` {shown(init_kwargs)}: {type(error).__name__}: {error}"
        ) from error


def load_causal_lm(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel | PeftModel:
    """The model of that name. The name of an adapter gives its base model with the adapter, ready to train."""
    with _with_arguments(name, init_kwargs):
        return _load_causal_lm(name, init_kwargs or {})


def _load_causal_lm(name: str, kwargs: dict[str, Any]) -> PreTrainedModel | PeftModel:
    base = base_of_adapter(name, kwargs)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(base.name, **of_other_repository(kwargs) | base.revision)
    return PeftModel.from_pretrained(model, name, is_trainable=True, **_only(_OF_ADAPTER, kwargs))


class Base(NamedTuple):
    """The base model of an adapter: its name, and the argument `revision` where the adapter names one."""

    name: str
    revision: dict[str, str]


def base_of_adapter(name: str, init_kwargs: dict[str, Any] | None) -> Base | None:
    """The base model that the adapter of that name was trained on; None if `name` is not that of an adapter."""
    options = _only(_OF_ADAPTER, init_kwargs)
    if find_adapter_config_file(name, **options) is None:
        return None
    config = PeftConfig.from_pretrained(name, **options)
    return Base(str(config.base_model_name_or_path), {} if config.revision is None else {"revision": config.revision})


def load_tokenizer(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    """The tokenizer of that name; the base model's for an adapter that was saved without one."""
    try:
        return AutoTokenizer.from_pretrained(name, **of_tokenizer(init_kwargs))
    except (OSError, ValueError):
        if (base := base_of_adapter(name, init_kwargs)) is None:
            raise
        return AutoTokenizer.from_pretrained(
            base.name, **of_tokenizer(of_other_repository(init_kwargs)) | base.revision
        )


def load_scalar_model(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """A reward or value model: a sequence classifier with one label. ModelError for one that was saved with several."""
    try:
        with _with_arguments(name, init_kwargs):
            return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **(init_kwargs or {}))
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ModelError(
            f"{name!r} cannot be loaded as a sequence classifier with one label: {error}. Use a model with num_labels=1; as a "
            "reward, a classifier with several labels can be called by a function that returns the logit to use."
        ) from error


def save_policy(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save the policy, its tokenizer and the configuration, ready for `from_pretrained`."""
    # PEFT saves every adapter by default, including the frozen clone that serves as the reference.
    chosen = {"selected_adapters": [policy.active_adapter]} if isinstance(policy, PeftModel) else {}
    policy.save_pretrained(str(folder), state_dict=state_dict, **chosen)
    tokenizer.save_pretrained(str(folder))
    torch.save(args, folder / "training_args.bin")


def gathered_weights(policy: PreTrainedModel | PeftModel, sharding: Replicated) -> dict[str, Tensor] | None:
    """The weights that `save_policy` saves, one gathered after the other; None if each process has all of them.

    All processes call it. Those that save get the weights, the others empty tensors.
    """
    if not sharding.sharded:
        return None
    weights = policy.state_dict(keep_vars=True)
    if isinstance(policy, PeftModel):
        saved = get_peft_model_state_dict(policy, state_dict=weights, adapter_name=policy.active_adapter)
        ids = {id(weight) for weight in saved.values()}
        weights = {name: weight for name, weight in weights.items() if id(weight) in ids}
    # By identity, so that tied weights are still recognised as one.
    complete = {id(weight): sharding.complete(weight, weight) for weight in weights.values()}
    return {name: complete[id(weight)] for name, weight in weights.items()}


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The policy, without dropout and with unpacked weights, and its tokenizer, with a padding token; both are loaded if
    `model` is a name."""
    if processing_class is None:
        if not isinstance(model, str):
            raise ModelError("`processing_class` got None; it is optional only when `model` is a name.")
        processing_class = load_tokenizer(model, args.model_init_kwargs)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ModelError(f"`processing_class` got {type(processing_class).__name__}; it must be a tokenizer.")
    if isinstance(model, str):
        model = load_causal_lm(model, init_kwargs_of(args))
    elif args.model_init_kwargs:
        raise ConfigError(
            "`model_init_kwargs` was given with a model that is already loaded; it applies to models given by name."
        )
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise ModelError(f"`model` got {type(model).__name__}; it must be a causal language model or the name of one.")
    load_everywhere(model)
    causal = without_adapter(model)
    if not causal.can_generate() or getattr(causal.config, "is_encoder_decoder", False):
        raise ModelError(
            f"`model` got {type(causal).__name__}, which does not continue a prompt; it must be a causal language model, such "
            "as AutoModelForCausalLM.from_pretrained(name)."
        )
    if processing_class.pad_token_id is None:
        if processing_class.eos_token is None:
            raise ModelError(
                "`processing_class` has neither a pad token nor an eos token; set one, for example "
                "tokenizer.add_special_tokens({'pad_token': '<pad>'})."
            )
        processing_class.pad_token = processing_class.eos_token  # safe, because padding is always masked
    if processing_class.pad_token_id < model.get_input_embeddings().weight.shape[0]:
        # Any other would be saved with the model, which could not be loaded then.
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    unpack_4bit_weights(model)
    avoid_bf16(model, args)
    disable_dropout(model)
    return model, processing_class


def padding_only(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The pad token, if it is nothing else, such as the end of a sequence, in this tokenizer."""
    pad, others = tokenizer.pad_token_id, (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    return None if pad in others else pad


def prepare_policy(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: Any
) -> PreTrainedModel | PeftModel:
    """The policy ready to train: adapter added, dropout off, gradient checkpointing on."""
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise ModelError(
                f"`peft_config` got {type(peft_config).__name__}; it must be a peft.PeftConfig such as LoraConfig(...)."
            )
        if isinstance(model, PeftModel):
            raise ModelError(
                "`peft_config` was given with a model that already has an adapter; leave `peft_config` out to continue "
                "training that adapter, or merge it first with model.merge_and_unload()."
            )
        if adapter_layers(model):
            raise ModelError(
                "`model` already contains the layers of an adapter, as that of an earlier trainer: load the model again, or "
                "pass the model of that trainer without `peft_config` to continue training its adapter."
            )
        try:
            with activation_checkpointing.without_warning():
                model = get_peft_model(model, peft_config)
        except ValueError as error:  # such as one without a module of these names
            raise ModelError(f"`peft_config` does not fit the model: {error}") from error
    elif is_quantized(model) and not isinstance(model, PeftModel):
        raise ModelError(
            "`model` is quantised and has no adapter: its weights cannot be trained; pass `peft_config=LoraConfig(...)`."
        )
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"`peft_config` is {type(model.active_peft_config).__name__}: prompt-learning adapters change the input "
                "instead of the weights and are not supported; use LoRA or another adapter of the weights."
            )
        # The only active and trainable adapter: the given one, else "default" as in TRL, else the active one.
        name = args.model_adapter_name or ("default" if "default" in model.peft_config else model.active_adapter)
        if name not in model.peft_config:
            raise ModelError(
                f"`model_adapter_name` got {shown(name)}; the model's adapters are {sorted(model.peft_config)}."
            )
        if any(layer.merged for layer in adapter_layers(model)):
            raise ModelError(
                "`model` has a merged adapter, which cannot be trained; call model.unmerge_adapter() first."
            )
        model.base_model.enable_adapter_layers()  # if they were disabled, nothing would be trained
        model.set_adapter(name)
    _prepare_for_training(model, args)
    if not trainable(model):
        raise ModelError(
            "`model` has no trainable parameter; load its adapter with is_trainable=True, or pass `peft_config`."
        )
    return model


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _prepare_for_training(model: PreTrainedModel | PeftModel, args: Any) -> None:
    disable_dropout(model)
    if args.gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}
        activation_checkpointing.enable(model, kwargs)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()


def prepare_value_model(
    model: Any, args: Any, init_kwargs: dict[str, Any] | None
) -> PreTrainedModel | PeftModel | None:
    """A separate value model, ready to train; None, for a value head on the policy, stays None. `init_kwargs` are for one
    that is given by name."""
    if model is None:
        return None
    if isinstance(model, str):
        model = load_scalar_model(model, init_kwargs)
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise ModelError(
            f"`value_model` got {type(model).__name__}; it must be a sequence classifier with one label, its name, or None for "
            "a value head."
        )
    load_everywhere(model)
    unpack_4bit_weights(model)
    avoid_bf16(model, args, name="value_model")
    _prepare_for_training(model, args)
    if not trainable(model):
        raise ModelError("`value_model` has no trainable parameter; load its adapter with is_trainable=True.")
    return model


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
