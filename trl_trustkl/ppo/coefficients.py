"""The coefficients that controllers adapt: β of the anchor, λ of the trust region, the factor on the learning rate."""

from __future__ import annotations

import math
from typing import Any

from ..records import BoundRecord
from .config import TrustKLPPOConfig


class Coefficients:
    """The coefficients of the next update, and the controllers that adapt them after each update.

    With the controller "fixed", a coefficient is read from the configuration, so that changes to it take effect.
    """

    def __init__(self, args: TrustKLPPOConfig) -> None:
        self._args = args
        self.kl_controller = args.build_kl_controller()
        self.trust_controller = args.build_trust_controller()
        self.lr_controller = args.build_lr_controller()
        self.kl_state = self.kl_controller.init()
        self.trust_state = self.trust_controller.init()
        self.lr_state = None if self.lr_controller is None else self.lr_controller.init()

    @property
    def kl(self) -> float:
        """The anchor's coefficient β."""
        return self._args.kl_coef if self._args.kl_controller == "fixed" else self.kl_state.coef

    @property
    def trust(self) -> float:
        """The coefficient λ of the penalty on KL(π_old‖π)."""
        return self._args.trust_coef if self._args.trust_controller == "fixed" else self.trust_state.coef

    @property
    def lr_factor(self) -> float:
        """The factor on the policy's scheduled learning rate."""
        return 1.0 if self.lr_state is None else self.lr_state.coef

    def update(self, record: BoundRecord, episodes: int) -> None:
        """Feed the exact KLs to the controllers, clamped at 0 because rounding may make them negative.

        The controllers of the trust region get the proposed KL, measured before enforcement; of an update that was rejected,
        that of the learning rate gets it if it lowers the rate.
        """
        anchor, trust = record.anchor.kl_exact, record.trust.kl_proposed
        if math.isfinite(anchor):
            self.kl_state = self.kl_controller.update(self.kl_state, kl=max(0.0, anchor), episodes=episodes)
        if math.isfinite(trust) and record.refused is None:
            self.trust_state = self.trust_controller.update(self.trust_state, kl=max(0.0, trust), episodes=episodes)
        rate = self.lr_controller
        if rate is not None and math.isfinite(trust) and (record.refused is None or trust > rate.target):
            self.lr_state = rate.update(self.lr_state, kl=max(0.0, trust), episodes=episodes)

    def state_dict(self) -> dict[str, dict[str, float] | None]:
        states = {"kl_controller": self.kl_state, "trust_controller": self.trust_state, "lr_controller": self.lr_state}
        return {name: None if state is None else state._asdict() for name, state in states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_state = type(self.kl_state)(**state["kl_controller"])
        self.trust_state = type(self.trust_state)(**state["trust_controller"])
        if self.lr_state is not None and state["lr_controller"] is not None:
            self.lr_state = type(self.lr_state)(**state["lr_controller"])
