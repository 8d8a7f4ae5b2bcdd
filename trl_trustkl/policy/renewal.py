"""Renewing the reference: mixing the policy's weights into those of π_ref."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .reference import Reference

_OUTSIDE = "outside."


class ReferenceRenewal:
    """Renews a reference in place, and saves and loads the weights of a reference that was renewed.

    Raises ConfigError for a reference whose weights are not those of the policy's kind, and which cannot be mixed with them.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        policy, model, adapter = reference.policy, reference.model, reference.adapter
        if model is not None and isinstance(policy, PeftModel):
            raise ConfigError(
                "`sync_ref_model` got True with a `ref_model` and a policy with an adapter, whose weights do not match; leave "
                "`ref_model` None; the reference is then a copy of the policy's adapter."
            )
        mine, others = _shapes(self._weights()), _shapes(self._of_policy())
        if mine != others:
            what = "`ref_model`" if model is not None else f"`ref_adapter_name` {adapter!r}"
            name = next(name for name in (*others, *mine) if mine.get(name) != others.get(name))
            raise ConfigError(
                f"`sync_ref_model` got True, but {what} and the policy have different weights, such as {name!r}; use a "
                "reference of the policy's architecture, or leave it None."
            )

    @torch.no_grad()
    def renew(self, alpha: float) -> None:
        """θ_ref ← alpha·θ + (1 − alpha)·θ_ref, for a policy with an adapter in the weights of the adapter.

        Source: TR-DPO (arXiv 2404.09656), soft update, as in TRL's GRPO. With alpha = 1, π_ref is the policy bit for bit.
        """
        policy = self._of_policy()
        self._set({name: _mixed(weight, policy[name], alpha) for name, weight in self._weights().items()})
        for weight, value in self._reference.outside.values():
            value.copy_(_mixed(value, weight, alpha))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the reference."""
        outside = {f"{_OUTSIDE}{name}": value for name, (_, value) in self._reference.outside.items()}
        return {name: weight.contiguous() for name, weight in (self._weights() | outside).items()}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights bit for bit. CheckpointError if they are not those of this reference."""
        loaded = dict(weights)
        if _shapes(loaded) != _shapes(self.state_dict()):
            raise CheckpointError("its weights have other names or shapes than those of this reference.")
        self._set({name: weight for name, weight in loaded.items() if not name.startswith(_OUTSIDE)})
        for name, (_, value) in self._reference.outside.items():
            value.copy_(loaded[f"{_OUTSIDE}{name}"])

    def _weights(self) -> dict[str, Tensor]:
        """The reference's weights, by names that the policy's have too."""
        if (model := self._reference.model) is not None:
            return {name: weight.detach() for name, weight in model.named_parameters()}
        return self._of_adapter(self._adapter)

    def _of_policy(self) -> dict[str, Tensor]:
        policy = self._reference.policy
        if isinstance(policy, PeftModel):
            return self._of_adapter(policy.active_adapter)
        return {name: weight.detach() for name, weight in policy.named_parameters()}

    def _of_adapter(self, adapter: str) -> dict[str, Tensor]:
        # PEFT finds the weights of every adapter method; not all of their names contain the adapter's.
        weights = get_peft_model_state_dict(self._reference.policy, adapter_name=adapter, save_embedding_layers=False)
        return {name: weight for name, weight in weights.items() if name not in self._reference.outside}

    def _set(self, weights: dict[str, Tensor]) -> None:
        if (model := self._reference.model) is not None:
            for name, weight in model.named_parameters():
                weight.copy_(weights[name])
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(self._reference.policy, weights, adapter_name=self._adapter)

    @property
    def _adapter(self) -> str:
        assert self._reference.adapter is not None  # `build_reference` has added one
        return self._reference.adapter


def _mixed(weight: Tensor, target: Tensor, alpha: float) -> Tensor:
    target = target.detach().to(weight.device, weight.dtype)
    return target if alpha == 1.0 or not weight.is_floating_point() else torch.lerp(weight, target, alpha)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
