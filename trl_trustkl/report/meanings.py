"""What every logged number means, and its unit: docs/metrics.md is made from this.

Keys are those of a record as trackers see it, flattened with `/`; two of them hold a dict, and stand for its keys too.
"""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    unit: str
    text: str


RECORD: dict[str, Meaning] = {
    "update": Meaning("", "The update's number, from 1."),
    "episode": Meaning("responses", "Responses sampled so far, over all processes."),
    "score": Meaning("the reward's", "Mean score of the responses that have one; `null` where none has."),
    "length": Meaning("tokens", "Mean length of a response, its stop token included."),
    "eos_rate": Meaning("share", "Responses that ended by themselves, and not at `response_length`."),
    "entropy": Meaning("nats/token", "Mean entropy of π_old at the contexts of the batch."),
    "lr": Meaning("", "Learning rate of this update, `trust_lr_target`'s factor included."),
    "refused": Meaning("", "Why the update was undone, as text; `null` for an update that stands."),
    "seconds": Meaning("s", "Time in `generate`, `score`, `optimise` and `measure`, and in all: `total`."),
    "anchor/estimator": Meaning("", "`kl_estimator`: the formula of the anchor."),
    "anchor/placement": Meaning("", "`kl_placement`: where the anchor acts."),
    "anchor/gradient": Meaning(
        "", "What the anchor's gradient is: `exact`, `partial`, `biased` or `zero` ([table](mathematics.md#gradients))."
    ),
    "anchor/coef": Meaning("", "The coefficient β that this update used."),
    "anchor/target": Meaning("nats/response", "`kl_target`, or `null`."),
    "anchor/kl": Meaning(
        "nats/response", "KL(π_old‖π_ref) at rollout by the estimator; from samples it may be negative."
    ),
    "anchor/kl_exact": Meaning(
        "nats/response", "The same over the whole vocabulary, summed over a response: what controllers see."
    ),
    "anchor/kl_stderr": Meaning(
        "nats/response", "Standard error of `anchor/kl_exact` over the responses of the batch."
    ),
    "anchor/share": Meaning(
        "share", 'The anchor\'s part of the absolute advantage, before whitening; `null` with `kl_placement="loss"`.'
    ),
    "trust/rule": Meaning("", "`clip_rule`."),
    "trust/low": Meaning("", "The clip range begins at 1 − `low`."),
    "trust/high": Meaning("", "The clip range ends at 1 + `high`."),
    "trust/gated": Meaning(
        "share", "**Gated**: what the clip rule removed of Σ\\|w·A\\| over all steps of the update."
    ),
    "trust/gated_low": Meaning("share", "The part of `trust/gated` removed where π/π_old is below 1."),
    "trust/gated_high": Meaning("share", "The part of `trust/gated` removed where π/π_old is above 1."),
    "trust/coef": Meaning("", "The coefficient λ of the penalty on KL(π_old‖π) that this update used."),
    "trust/epochs": Meaning("epochs", "Passes made over the batch: the optimizer's steps, as epochs."),
    "trust/stopped": Meaning("", "Whether `trust_stop` ended the update."),
    "trust/kl": Meaning(
        "nats/token",
        "**Measured** after the update and its enforcement: mean exact KL(π_old‖π) over the batch's contexts.",
    ),
    "trust/kl_max": Meaning("nats/token", "The largest KL(π_old‖π) of any context of the batch."),
    "trust/kl_proposed": Meaning("nats/token", "`trust/kl` as the optimizer left it, before enforcement."),
    "trust/tv": Meaning("", "Mean total variation between π_old and π, from 0 to 1."),
    "trust/max_ratio": Meaning("", "Largest π/π_old of a sampled token, after the update."),
    "trust/ratio_quantiles": Meaning("", "Quantiles of that ratio, by their level."),
    "trust/scale": Meaning(
        "share",
        "What was kept of the step: 1 where the limit held anyway, 0 of a refused update, `null` without `trust_max_kl`.",
    ),
    "trust/tries": Meaning("", "Scales that backtracking tried."),
    "trust/limit": Meaning("nats/token", "`trust_max_kl`, or `null`."),
    "trust/guaranteed": Meaning(
        "nats/token",
        "**Guaranteed**: a number only where `trust_max_kl` was enforced on the whole batch; then `trust/kl` is within it.",
    ),
    "value/clip": Meaning("the return's", "`cliprange_value`, or `null` with `clip_value=False`."),
    "value/gated": Meaning("share", "Positions at which the clip took the value's gradient away."),
    "value/explained_variance": Meaning(
        "share", "Of the returns' variance, by the value: 1 is all, 0 what a constant does."
    ),
    "gradient/norm": Meaning("", "Mean norm of the policy's gradient before it is limited."),
    "gradient/max_norm": Meaning("", "`max_grad_norm`, or `null`."),
    "gradient/scale": Meaning("share", "Mean factor that the limit put on the gradient."),
    "sampler/kl": Meaning(
        "nats/token",
        "How far the sampler was from the training pass before any step (k3); near 0 unless sampling is filtered or the "
        "two disagree. `null` where the sampler does not tell.",
    ),
    "binding": Meaning(
        "",
        "The mechanism that took the largest share of the update: `anchor`, `clip`, `penalty`, `stop`, `backtrack`, "
        "`grad_norm`, `lr`, or `none` where all are below 1 %, or the update was refused: what moved nothing was bound by "
        "none of them.",
    ),
}
"""Every key of a line of `bounds.jsonl`."""

TRL: dict[str, Meaning] = {
    "eps": Meaning("responses/s", "Responses per second since the run began."),
    "objective/kl": Meaning("nats/response", "`anchor/kl`."),
    "objective/entropy": Meaning("nats/response", "Mean of −log π_old of the sampled tokens, summed over a response."),
    "objective/non_score_reward": Meaning("the reward's", "−`anchor/coef` · `anchor/kl`."),
    "objective/rlhf_reward": Meaning("the reward's", "The sum of the two rewards."),
    "objective/scores": Meaning("the reward's", "`score`."),
    "policy/approxkl_avg": Meaning(
        "nats/token", "½(log π/π_old)² at the sampled tokens, over all steps of the update."
    ),
    "policy/clipfrac_avg": Meaning("share", "Tokens that the rule gated, not weighted by their advantage."),
    "policy/entropy_avg": Meaning("nats/token", "`entropy`."),
    "loss/policy_avg": Meaning("", "The policy's loss, over all steps of the update."),
    "loss/value_avg": Meaning("", "The value's loss, over all steps of the update."),
    "val/clipfrac_avg": Meaning("share", "`value/gated`."),
    "val/ratio": Meaning("", "Mean π/π_old, over all steps of the update."),
    "val/ratio_var": Meaning("", "Variance of π/π_old over tokens."),
    "val/num_eos_tokens": Meaning("tokens", "Stop tokens in the batch."),
}
"""TRL's names for its PPO trainer, with the values they should have had; in the logs of every tracker, not in the file."""

ADAPTIVE: dict[str, Meaning] = {
    "kl/measured": Meaning("the trainer's", "The KL to the reference that the controller was given."),
    "kl/target": Meaning("the trainer's", "The controller's target, where it has one."),
    "kl/coef": Meaning("", "The coefficient that this KL was had with."),
}
"""What `AdaptiveKLCallback` adds to the logs of TRL's own trainers: nats per token for GRPO and RLOO, per response for PPO."""

COMPLETION: dict[str, Meaning] = {
    "update": Meaning("", "The update that sampled it."),
    "prompt": Meaning("", "Text, or a list of messages."),
    "completion": Meaning("", "Text, or a list of messages."),
    "score": Meaning("the reward's", "Its score, or `null`."),
    "ref_logp": Meaning("nats/response", "log π_ref(completion | prompt)."),
}
"""Every key of a line of `completions.jsonl`."""
