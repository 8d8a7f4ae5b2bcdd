"""The separate effects of the KL penalty to a frozen reference (the anchor) and of a penalty on the size of an update.

Both penalties keep a policy near another policy, so they look alike. This example separates them on a vocabulary of six
words, where every update can be computed exactly. Let q be the reference, r the reward, and μ the policy of the last update.
An update takes the p that maximises

    E_p[r] − β·KL(p‖q) − λ·KL(p‖μ),        which is        p ∝ exp((r + β·log q + λ·log μ) / (β + λ)),

and this p is the next μ. With an anchor (β > 0) the policy converges to q·exp(r/β)/Z, which does not depend on λ; λ only
sets the share of the remaining error that an update keeps, λ/(β + λ). Without an anchor (β = 0) there is no such fixed
point: the policy converges to the word with the highest reward, and a larger λ only delays this.

    python examples/kl_or_trust_region.py                              # a table, and the figure in runs/kl_or_trust_region
    python examples/kl_or_trust_region.py --output-dir docs/figures    # the figure of docs/kl_or_trust_region.md

It takes seconds, and needs matplotlib: pip install '.[report]'.

The updates are exact and the trust region is a penalty. A real run uses samples, and PPO's clip is weaker than this
penalty, because it does not pull the policy back to μ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from trl_trustkl.divergences import exact_from_logps

WORDS = ("fine", "good", "great", "thanks", "the", "wow")
REFERENCE = (0.30, 0.25, 0.15, 0.14, 0.15, 0.01)
REWARD = (0.3, 0.5, 0.7, 0.4, 0.0, 1.0)
"""A reward that can be exploited: it is highest for a word that is very improbable under the reference."""

BETAS = (0.5, 0.15, 0.0)
LAMBDAS = (0.0, 1.0, 3.0, 10.0)
SHOWN = 0.15  # the β of the figure
STEPS = 1000


# -- The mathematics ----------------------------------------------------------------------------------------------------


def greedy(q: Tensor, r: Tensor) -> Tensor:
    """The policy with all probability on the words of the highest reward, in proportion to q."""
    return torch.log_softmax(torch.where(r == r.max(), q, -torch.inf), -1)


def destination(q: Tensor, r: Tensor, beta: float) -> Tensor:
    """The fixed point of the iteration: q·exp(r/β)/Z, or its limit for β → 0. It does not depend on λ."""
    return torch.log_softmax(q + r / beta, -1) if beta > 0 else greedy(q, r)


def update(mu: Tensor, q: Tensor, r: Tensor, beta: float, lam: float) -> Tensor:
    """Log-probabilities of the p that maximises E_p[r] − β·KL(p‖q) − λ·KL(p‖μ), from those of q and μ; all are [V]."""
    if beta + lam == 0:
        return greedy(q, r)
    return torch.log_softmax((r + beta * q + lam * mu) / (beta + lam), -1)


def iterate(q: Tensor, r: Tensor, beta: float, lam: float, steps: int) -> Tensor:
    """Log-probabilities [steps + 1, V] of the policy after each update, starting at the reference q."""
    policies = [q]
    for _ in range(steps):
        policies.append(update(policies[-1], q, r, beta, lam))
    return torch.stack(policies)


def log_error(policies: Tensor, end: Tensor) -> Tensor:
    """The largest difference of the log-odds of any two words from those of `end`, in nats: [..., V] to [...]."""
    difference = policies - end
    return difference.amax(-1) - difference.amin(-1)


class Summary(NamedTuple):
    """The last policy of an iteration. kl: to the reference, in nats; reward: expected; loophole: probability of the
    word with the highest reward; distance: total variation from q·exp(r/β)/Z; rate: measured share of the log-error that an
    update keeps, or None at β = 0, where convergence has no constant rate."""

    kl: float
    reward: float
    loophole: float
    distance: float
    rate: float | None


def summarise(policies: Tensor, q: Tensor, r: Tensor, beta: float) -> Summary:
    end, last = destination(q, r, beta), policies[-1]
    return Summary(
        kl=exact_from_logps("kl", last, q).item(),
        reward=(last.exp() * r).sum().item(),
        loophole=last[r.argmax()].exp().item(),
        distance=exact_from_logps("tv", last, end).item(),
        rate=measured_rate(policies, end) if beta > 0 else None,
    )


def measured_rate(policies: Tensor, end: Tensor) -> float:
    """The factor on the log-error per update, while the error is far above rounding; 0 if the first update removes it."""
    error = log_error(policies, end)
    updates = int((error > 1e-6).sum()) - 1
    return ((error[updates] / error[0]) ** (1 / updates)).item() if updates else 0.0


# -- Table and figure --------------------------------------------------------------------------------------------------


def table(q: Tensor, r: Tensor, steps: int) -> str:
    """One line for each (β, λ), at most 80 columns wide."""
    lines = [
        f"After {steps} exact updates. KL to the reference in nats; off: total variation from",
        "q·exp(r/β)/Z (β = 0: its limit); kept: share of the log-error an update keeps.",
        "",
        f"   β      λ    KL to ref   reward   P({WORDS[REWARD.index(max(REWARD))]})       off    kept   λ/(β+λ)",
    ]
    for beta in BETAS:
        for lam in LAMBDAS:
            s = summarise(iterate(q, r, beta, lam, steps), q, r, beta)
            kept = "     –         –" if s.rate is None else f"{s.rate:6.4f}    {lam / (beta + lam):6.4f}"
            lines.append(
                f"{beta:5.2f}  {lam:5.1f}  {s.kl:9.4f} {s.reward:9.4f} {s.loophole:8.4f}  {s.distance:8.1e}  {kept}"
            )
        lines.append("")
    lines += [
        "β determines where training ends (the lines of one β agree), and λ how fast.",
        f"β = 0: every λ ends at one word, with KL −log q = {-q[r.argmax()].item():.4f} nats.",
    ]
    return "\n".join(lines)


# Colours of Okabe and Ito, and a dash pattern for each λ, so that the figure is readable without colour.
STYLES = {
    0.0: ("#000000", "-"),
    1.0: ("#0072B2", (0, (5, 1.5))),
    3.0: ("#D55E00", (0, (3, 1.2, 1, 1.2))),
    10.0: ("#009E73", (0, (1, 1))),
}
FONTS = {
    "font.size": 13,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 12.5,
    "svg.hashsalt": "kl_or_trust_region",
}


def draw(q: Tensor, r: Tensor, steps: int) -> Figure:
    """Four panels: the paths with an anchor, the paths without one, the final policies, and the rate."""
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.04)
    figure.suptitle("The anchor decides where training ends, the trust region how fast", fontsize=18, fontweight="bold")
    (with_anchor, without), (ends, rate) = figure.subplots(2, 2)
    draw_paths(with_anchor, q, r, SHOWN, steps, "q·exp(r/β)/Z, at {:.2f} nats")
    with_anchor.set_title(f"With an anchor (β = {SHOWN:g}):\nevery λ arrives at the same place, and stays")
    draw_paths(without, q, r, 0.0, steps, f"nothing but “{WORDS[r.argmax()]}”, at {{:.2f}} nats")
    without.set_title("Without one (β = 0):\nevery λ collapses, only later")
    draw_ends(ends, q, r, steps)
    draw_rate(rate, q, r)
    return figure


def draw_paths(axes: Axes, q: Tensor, r: Tensor, beta: float, steps: int, end_label: str) -> None:
    for lam in LAMBDAS:
        colour, dash = STYLES[lam]
        kl = exact_from_logps("kl", iterate(q, r, beta, lam, steps), q)
        axes.plot(range(1, steps + 1), kl[1:], color=colour, linestyle=dash, linewidth=2.6, label=f"λ = {lam:g}")
    end = exact_from_logps("kl", destination(q, r, beta), q).item()
    axes.annotate(end_label.format(end), (1, end), (3, 6), textcoords="offset points")
    axes.set(xscale="log", xlim=(1, steps), ylim=(0, 5.2), xlabel="update", ylabel="KL to the reference (nats)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if beta > 0:
        axes.legend(loc="upper left", ncols=2)


def draw_ends(axes: Axes, q: Tensor, r: Tensor, steps: int) -> None:
    width, order = 0.28, r.argsort()
    slowest = max(LAMBDAS)
    bars = [
        ("the reference q", q, "#c4c4c4"),
        (f"β = {SHOWN:g}, any λ", iterate(q, r, SHOWN, slowest, steps)[-1], "#E69F00"),
        ("β = 0, any λ", iterate(q, r, 0.0, slowest, steps)[-1], "#5D3A9B"),
    ]
    for i, (label, policy, colour) in enumerate(bars):
        places = [place + (i - 1) * width for place in range(len(WORDS))]
        axes.bar(places, policy[order].exp(), width, color=colour, label=label)
    axes.set_xticks(range(len(WORDS)), [f"{WORDS[i]}\n{r[i]:.1f}" for i in order])
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1.04), xlabel="word, and its reward", ylabel="probability")
    axes.set_title(f"Where they are after {steps:,} updates")
    axes.legend(loc="upper left")


def draw_rate(axes: Axes, q: Tensor, r: Tensor, updates: int = 40) -> None:
    end, every = destination(q, r, SHOWN), torch.arange(updates + 1)
    for lam in LAMBDAS[1:]:
        colour, dash = STYLES[lam]
        error, kept = log_error(iterate(q, r, SHOWN, lam, updates), end), lam / (SHOWN + lam)
        axes.plot(every, error[0] * kept**every, color=colour, linestyle=dash, linewidth=2)
        axes.plot(every[::4], error[::4], "o", color=colour, markersize=6, clip_on=False)
        above = lam == max(LAMBDAS)
        axes.annotate(
            f"λ = {lam:g}: {kept:.3f}", (updates, error[-1]), (0, 9 if above else -9), textcoords="offset points",
            color=colour, ha="right", va="bottom" if above else "top",
        )  # fmt: skip
    axes.annotate("dots: iterated\nlines: λ/(β + λ)", (0.04, 0.05), xycoords="axes fraction")
    axes.set(yscale="log", ylim=(0.008, 14), xlim=(0, updates), xlabel="update")
    axes.set_ylabel("error of the log-odds (nats)")
    axes.set_title(f"An update keeps λ/(β + λ) of the error (β = {SHOWN:g})")


def save(figure: Figure, folder: Path) -> list[Path]:
    """Write PNG and SVG, with the same bytes on every call."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"kl_or_trust_region.{suffix}" for suffix in ("png", "svg")]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        figure.savefig(path, dpi=160, metadata=metadata)
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The separate effects of KL anchor and trust region, on six words.")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/kl_or_trust_region"), help="for the figure (%(default)s)"
    )
    options = parser.parse_args(arguments)

    q, r = torch.tensor(REFERENCE, dtype=torch.float64).log(), torch.tensor(REWARD, dtype=torch.float64)
    print(table(q, r, STEPS))

    with matplotlib.rc_context(FONTS):
        for path in save(draw(q, r, STEPS), options.output_dir):
            print(path)


if __name__ == "__main__":
    main()
