"""Findings about responses that another engine sampled, where the policy's loss is corrected for it: whether the engine samples
from the policy, and whether the bounds of the importance weights change many of them."""

from __future__ import annotations

from ..records import BoundRecord
from .advice import FEW, Finding, of_updates
from .schema import Run
from .series import column, largest, mean
from .text import number, percent

MISMATCH = 0.05  # nats per token between sampler and training pass; other kernels and bf16 stay far below
FAR_SHARE = 0.1  # of the updates; a single token with an unlikely ratio can make the estimate of one update large
TRUNCATED = 0.05  # of the importance weights


def _corrected(run: Run) -> list[BoundRecord]:
    return [record for record in run.records if record.sampler.truncated is not None]


def sampler_differs(run: Run) -> Finding | None:
    kl = column(_corrected(run), "sampler.kl")
    far = kl > MISMATCH
    if far.sum() < FEW or far.mean() < FAR_SHARE:
        return None
    return Finding(
        "sampler_differs",
        "The responses are not sampled from the policy",
        f"In {of_updates(far)}, the distribution that the responses were sampled from differed from the policy's by more than "
        f"{MISMATCH:g} nats per token, and by {number(largest(kl))} at most (sampler/kl); rounding in bf16 causes about 0.002. "
        "The engine has other weights than the policy, or computes something else than the training pass.",
        "Set use_vllm=False and compare sampler/kl: if it is then near 0, check that the engine gets the weights of every "
        "update, of the model and in the dtype that are trained.",
    )


def weights_truncated(run: Run) -> Finding | None:
    corrected = _corrected(run)
    share = column(corrected, "sampler.truncated")
    if not mean(share) > TRUNCATED:
        return None
    lowest, highest = -largest(-column(corrected, "sampler.ratio_min")), largest(column(corrected, "sampler.ratio_max"))
    return Finding(
        "weights_truncated",
        "The bounds change many of the importance weights",
        f"The bounds changed {percent(mean(share))} of the importance weights, and {percent(largest(share))} in one update. "
        "The gradient of these tokens is not corrected completely, or left out. The ratios of single tokens were from "
        f"{number(lowest)} to {number(highest)}.",
        'Set vllm_importance_sampling_mode="token_truncate" with vllm_importance_sampling_clip_max=3: a ratio is then that of '
        "one token, not of a response, and few are above 3. If it is set already, the sampler is too far from the policy: see "
        "sampler/kl.",
    )
