"""A certificate by its definition, from complete distributions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tests.dense import dense_kl
from trl_trustkl.types import Rollout


def by_definition(scores: Tensor, old: Tensor, new: Tensor, rollout: Rollout, *, horizon: int) -> dict[str, Any]:
    """From the rewards [B], NaN for none, and log π_old and log π over the vocabulary at every response token, [N, V]."""
    lengths = rollout.response_mask.sum(1).tolist()
    ids = rollout.response_ids[rollout.response_mask].unsqueeze(1)
    kl, tv = dense_kl(old, new), (old.exp() - new.exp()).abs().sum(1) / 2
    ratios = (new - old).gather(1, ids).squeeze(1).exp()
    moved = [sum(w - 1 for w in row.tolist()) for row in ratios.split(lengths)]
    known = {i: reward for i, reward in enumerate(scores.tolist()) if not math.isnan(reward)}
    terms = []
    for i, reward in known.items():
        others = [each for j, each in known.items() if j != i]
        terms.append((reward - sum(others) / len(others)) * moved[i])
    gain = sum(terms) / len(terms)
    stderr = math.sqrt(sum((term - gain) ** 2 for term in terms) / (len(terms) - 1) / len(terms))
    kl_max, tv_max = kl.max().item(), tv.max().item()
    kl_sequence = kl.sum().item() / len(lengths)
    rows = [row.tolist() for row in tv.split(lengths)]
    positions = [sum(row[t] for row in rows if t < len(row)) / len(rows) for t in range(max(lengths))]
    width = max(known.values()) - min(known.values())

    def bounds(a: float) -> dict[str, float]:
        """Of a times the step."""
        sequence = min(1, a * sum(positions), a * math.sqrt(kl_sequence / 2))
        future = [min(1, left * a * tv_max, a * math.sqrt(left * kl_max / 2)) for left in range(horizon - 1, -1, -1)]
        return {
            "mixed_tv": width * 2 * (horizon - 1) * a * tv_max * sequence,
            "adaptive": width * 2 * sum(a * tv * most for tv, most in zip(positions, future, strict=False)),
        }

    smallest = min(bounds(1.0), key=bounds(1.0).__getitem__)
    bound = bounds(1.0)[smallest]
    scale, least = 0.0, gain - 2 * stderr
    for digits in range(1, 9):  # one more digit each time
        while scale < 1 and min(bounds(scale + 10**-digits).values()) < (scale + 10**-digits) * least:
            scale += 10**-digits
    return {
        "gain": gain, "stderr": stderr, "bound": bound, "difference": gain - bound, "smallest": smallest,
        "kl_needed": min(1.0, scale) ** 2 * kl_max if least > 0 else None,
    }  # fmt: skip
