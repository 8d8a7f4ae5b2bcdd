"""The counterfactual of a PPO update: which mechanisms are on, and what the update would have done without each of them."""

from __future__ import annotations

from collections.abc import Callable

from transformers.utils import logging

from ..parallel.processes import Processes
from ..trust.attribution import kl_without
from ..types import Batch, Measurement, UpdateStats
from .coefficients import Coefficients
from .config import TrustKLPPOConfig
from .optimise import Optimisation

logger = logging.get_logger(__name__)

NOTHING = "nothing"
"""In the place of a mechanism: the update is rerun as it was."""


class Attribution:
    """Reruns updates without each mechanism in turn.

    On a GPU, where sums may depend on timing, the first attributed update is also rerun as it was, and a difference is
    logged.
    """

    def __init__(
        self, args: TrustKLPPOConfig, optimisation: Optimisation, coefficients: Coefficients, processes: Processes
    ) -> None:
        self._args = args
        self._optimisation = optimisation
        self._coefficients = coefficients
        self.exact = processes.device.type == "cpu"
        """Whether a rerun of an update as it was is known to be the same; otherwise it is tried once."""

    def counterfactual(
        self, batch: Batch, stats: UpdateStats, measured: Measurement, rerun: Callable[[Batch, str], float]
    ) -> dict[str, float | None]:
        """See `TrustKLPPOTrainer.attribute`. rerun: makes the update from its start without a mechanism; returns its KL."""
        context = batch.context
        on = self.mechanisms(batch)
        idle = self._idle(stats)
        found: dict[str, float | None] = {name: measured.kl if name in idle and on[name] else None for name in on}
        if on["backtrack"] and context.enforcement is not None:
            found["backtrack"] = context.enforcement.kl_proposed
        names = [name for name, is_on in on.items() if is_on and name not in (*idle, "backtrack")]
        if not self.exact:
            names.append(NOTHING)
        if not names:
            return found
        assert context.start is not None  # `optimise` has stored it
        end = self._optimisation.replay_point()
        found |= kl_without(names, lambda name: rerun(batch, name), start=context.start, end=end)
        if NOTHING in found:
            self._report(context.update + 1, measured.kl, found.pop(NOTHING))
        return found

    def mechanisms(self, batch: Batch) -> dict[str, bool]:
        """Every mechanism, and whether it is on in this update. Clipping the value can limit the policy only through the
        backbone that they share."""
        args = self._args
        return {
            "anchor": batch.anchor.coef > 0,
            "clip": args.clip_rule != "none",
            "response_mask": args.response_mask_kl is not None,
            "penalty": batch.trust_coef > 0,
            "stop": args.trust_stop is not None,
            "backtrack": args.limits.hard,
            "grad_norm": args.norm_limit is not None,
            "lr": args.trust_lr_target is not None,
            "value_clip": args.value_range is not None and args.vf_coef > 0 and self._shares_backbone,
        }

    @property
    def _shares_backbone(self) -> bool:
        return self._optimisation.policy_and_value.value_trains_policy

    def _idle(self, stats: UpdateStats) -> set[str]:
        """The mechanisms that did nothing in this update, so that the update without them is the same."""
        idle = {
            "response_mask": stats.total.masked_responses == 0,
            "stop": not stats.stopped,
            "grad_norm": stats.grad_scale == 1.0 and not self._shares_backbone,
            "lr": self._coefficients.lr_factor == 1.0,
        }
        return {name for name, did_nothing in idle.items() if did_nothing}

    def _report(self, update: int, kl: float, again: float | None) -> None:
        self.exact = True
        if again != kl:
            logger.warning(
                f"update {update} has a KL(π_old‖π) of {kl:.6g} nats per token, and {again} when it is rerun as it was: this "
                "device computes the same steps differently each time. `counterfactual` is exact to about that difference."
            )
