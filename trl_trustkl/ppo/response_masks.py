"""Response masks: responses on which the policy has moved too far are left out of the loss (arXiv 2512.23075)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import k3
from ..policy.exact_kl import TokenOutputs
from ..types import MicroBatch, Scored


@torch.no_grad()
def within(out: TokenOutputs, micro: MicroBatch, scored: Scored, limit: float) -> Tensor:
    """Whether the KL of every token of a response is at most `limit`, in nats: [b, 1], True for a response in the loss.

    The KL is the exact KL(π_old‖π) of the token's distribution, for the current π. Where another engine sampled the response,
    from a distribution μ, it is the estimate of KL(μ‖π) by k3 at the sampled token. A KL that is not finite is above the limit.
    """
    columns = out.logp.shape[1]
    if scored.sampler_logp is None:
        assert out.old_kl is not None  # the forward pass computed it
        kl = out.old_kl
    else:
        kl = k3(scored.sampler_logp[micro.rows, :columns], out.logp)
    mask = scored.rollout.response_mask[micro.rows, :columns]
    return (torch.where(mask, kl, 0.0) <= limit).all(1, keepdim=True)
