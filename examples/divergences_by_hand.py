"""Compare every estimator of the KL anchor with its closed form, on six words, where a mean is a sum of six terms.

A trainer observes sampled words, and estimates how far the policy p is from the reference q by a function of u = q/p at
each word. The table answers three questions about such an estimator. *What does it estimate?* Some
estimators measure another divergence than KL(p‖q), and k2 measures no divergence exactly. *How noisy is it?* k1 and k3 have
the same mean, but for policies that are close the noise of k1 is many times its value. *What is its gradient*, as a penalty
in the reward, in the loss, or in both? An estimator with the correct value may have the gradient of another quantity, or
none. Two examples are k1 in the loss, and k3 in the reward, which was TRL's kl_estimator="k3".

    python examples/divergences_by_hand.py                  # seconds, without a model
    python examples/divergences_by_hand.py --distance 0.05  # a policy closer to the reference: k1 is still noisy
"""

from __future__ import annotations

import argparse
import math

import torch

from trl_trustkl.divergences import ESTIMATORS, gradient_kind

REFERENCE = (0.30, 0.25, 0.15, 0.14, 0.15, 0.01)
TILT = (0.0, 1.0, -1.0, 2.0, 0.5, 3.0)


def policy(distance: float) -> list[float]:
    """p ∝ q·exp(distance·tilt), the shape that a policy trained on the reward `tilt` has."""
    weights = [q * math.exp(distance * t) for q, t in zip(REFERENCE, TILT, strict=True)]
    return [weight / sum(weights) for weight in weights]


def closed_forms(p: list[float], q: tuple[float, ...]) -> dict[str, tuple[str, float]]:
    """For each estimator the divergence that it estimates, and its value in nats, from the definition only."""
    pairs = list(zip(p, q, strict=True))
    kl = sum(a * math.log(a / b) for a, b in pairs)
    middle = [(a + b) / 2 for a, b in pairs]
    jensen_shannon = sum(a * math.log(a / m) + b * math.log(b / m) for (a, b), m in zip(pairs, middle, strict=True)) / 2
    hellinger = 1 - sum(math.sqrt(a * b) for a, b in pairs)
    return {
        **dict.fromkeys(("k1", "k2", "k3"), ("KL(p‖q)", kl)),
        "abs": ("E|log p/q|", sum(a * abs(math.log(a / b)) for a, b in pairs)),
        "forward_kl": ("KL(q‖p)", sum(b * math.log(b / a) for a, b in pairs)),
        "js": ("Jensen-Shannon", jensen_shannon),
        "tv": ("½Σ|p − q|", sum(abs(a - b) for a, b in pairs) / 2),
        "hellinger": ("1 − Σ√(pq)", hellinger),
        "chi2": ("Σ(q − p)²/p", sum((b - a) ** 2 / a for a, b in pairs)),
        "alpha": ("4(1 − Σ√(pq))", 4 * hellinger),  # at its default order, ½
    }


def moments(name: str, p: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of one sample of the estimator, by enumeration of the six words."""
    weights = torch.tensor(p, dtype=torch.float64)
    sample = ESTIMATORS[name](weights.log(), torch.tensor(REFERENCE, dtype=torch.float64).log())
    mean = (weights * sample).sum()
    return mean.item(), (weights * (sample - mean) ** 2).sum().sqrt().item()


def table(distance: float) -> str:
    p = policy(distance)
    lines = [
        "p: " + " ".join(f"{each:.3f}" for each in p),
        "q: " + " ".join(f"{each:.3f}" for each in REFERENCE),
        "",
        "estimator   estimates        value     bias    std  gradient as a penalty in the",
        "                                                     reward  loss    both",
    ]
    for name, (meaning, value) in closed_forms(p, REFERENCE).items():
        mean, deviation = moments(name, p)
        kinds = " ".join(f"{gradient_kind(name, place):7}" for place in ("reward", "loss", "both")).rstrip()
        bias = 0.0 if abs(mean - value) < 1e-12 else mean - value
        lines.append(f"{name:11} {meaning:14} {value:8.4f} {bias:+8.4f} {deviation / value:6.1f}  {kinds}")
    lines += [
        "",
        "value: in nats; bias: mean of the estimator − value; std: standard deviation of",
        "one sample / value. exact: the gradient of that divergence; partial: one of its",
        "two terms; biased: the gradient of another quantity; zero: only noise.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The estimators of the KL divergence, on six words.")
    parser.add_argument("--distance", type=float, default=0.5, help="how far p is from q (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(table(options.distance))


if __name__ == "__main__":
    main()
