"""The terms of a report's summary and tables, and what they mean."""

GLOSSARY = {
    "gated": "The share of an update in which a mechanism intervened: for the clip, the share of the gradient's weight that it "
    "set to zero; for the anchor, its share of the absolute advantage; for backtracking, the share of the step that was taken "
    "back. It need not be the share by which the mechanism changed the outcome: under Adam, a limit on the gradient's norm may "
    "scale every gradient down and change almost nothing, because Adam divides by the gradient's own size.",
    "counterfactual": "What the same update would have done without one mechanism. The update is rerun from its start, with "
    "this mechanism off and every other one on, and KL(π_old‖π) is measured. If it is larger than it was, the mechanism "
    "limited the update; if it is smaller, the mechanism let the update go further. What builds up over several updates is not "
    "part of it. Under an optimizer that rescales gradients, such as Adam, the gradients without a limit on their norm are "
    "multiplied by one factor, which makes them comparable to those that the optimizer has averaged so far.",
    "measured": "What an update did. After the update, the batch passes through the new policy, and the divergence from the "
    "old policy is computed over the full vocabulary.",
    "guaranteed": "A bound that was enforced. Only backtracking enforces bounds, on the contexts of the batch: on the mean "
    "KL(π_old‖π), on its largest value at one token, on its largest sum over one response, and on KL(π‖π_ref). Clipping, "
    "penalties and early stopping guarantee nothing.",
    "anchor": "The penalty β · KL(π‖π_ref) for moving away from π_ref, the model the run started from, in nats per response. "
    "It determines where the run ends.",
    "trust region": "What keeps one update small: KL(π_old‖π), in nats per token, where π_old is the policy that sampled the "
    "batch. It determines how fast the run gets there.",
    "nat": "The unit of KL and log-likelihood with natural logarithms. A text that is 1 nat less likely is less likely by a "
    "factor of 2.7.",
    "reference's likelihood": "log π_ref of a completion: its log-likelihood under the reference model, in nats per response. "
    "Closer to 0 is likelier.",
    "π, π_old, π_ref": "The policy that is trained; the policy that sampled the batch; the reference.",
    "KL": "How far one distribution over the next token is from another: 0 if they are equal. KL(a‖b) is the mean of log(a/b) "
    "under a.",
    "ratio, max ratio": "π/π_old of a sampled token: by what factor an update made it more or less likely; the largest in "
    "the batch.",
    "update": "One pass of sampling, scoring, optimising and measuring, on one batch of responses.",
    "episodes": "Sampled responses. With GRPO and RLOO, episodes per generation batch are those that are sampled at once.",
    "score": "The reward of a response, a weighted sum where there are several reward functions; of an update, the mean over "
    "its responses.",
    "length": "Mean length of a response in tokens.",
    "KL to ref, KL to the reference": "KL(π_old‖π_ref) when the batch was sampled, before the update, in nats per response.",
    "β, kl_coef, beta": "The coefficient of the anchor. With 0 there is no anchor.",
    "KL/token": "KL(π_old‖π) in nats per token, measured after the update and after enforcement.",
    "proposed": "The same before enforcement.",
    "limit": "The limit on it that was enforced (trust_max_kl).",
    "scale": "The share of the step that backtracking kept: 1 if all limits were met, 0 if the update was rejected or no "
    "shorter step met the limits.",
    "grad norm": "Norm of the policy's gradient before it is limited, as a mean over the steps.",
    "sampler KL": "The KL between the probabilities that the sampler used and those of the training pass, in nats per token.",
    "truncated": "The share of tokens whose importance weight was bounded.",
    "seconds": "Duration of the update.",
    "bound by, limited most often by": "The mechanism that limited the update most. Where a counterfactual is on record, the "
    "one without which the update would have been largest; otherwise the one that intervened most.",
    "none": "No mechanism limited the update by 1 % or more.",
    "unknown": "The records do not say what limited the update.",
    "rejected": "The update was taken back because of the reason given, and the parameters were left unchanged.",
    "clip, clip_rule, cliprange, epsilon, epsilon_high": "What removes the gradient of tokens whose ratio has left a range; "
    "the rule by which it does so; the range.",
    "response_mask, response_mask_kl": "Leaves a response out of the loss of a step while KL(π_old‖π) of one of its tokens is "
    "above response_mask_kl. If another engine sampled, this KL is an estimate.",
    "penalty, trust_coef": "A penalty on KL(π_old‖π) in the loss, and its coefficient.",
    "stop": "Ends an update early, once KL(π_old‖π) is above trust_stop.",
    "backtrack": "Backtracking: shortens the step of an update until its hard limits are met.",
    "trust_max_kl, trust_max_kl_token, trust_max_kl_response, anchor_max_kl": "Hard limits: on the mean KL(π_old‖π), on that "
    "of each token, on its sum over each response, and on the KL to the reference.",
    "grad_norm, max_grad_norm": "The limit on the norm of the gradient; a larger gradient is scaled down to it.",
    "lr, learning rate": "The learning rate of the update. As a mechanism: the learning rate that is adapted to the KL "
    "(trust_lr_target).",
    "value, value_clip, cliprange_value": "The prediction of the return, and the clip that keeps it near its former "
    "prediction.",
    "kl_estimator, estimator, kl_placement": "The formula by which the anchor estimates the KL; whether it acts in the reward, "
    "in the loss or in both. Its gradient is exact, partial (a part of it is missing), biased, or zero.",
    "kl_target, KL target": "The KL to the reference that the anchor's controller aims at.",
    "kl_controller, kl_controller_kwargs, trust_controller, trust_controller_kwargs": "How the coefficient of a penalty "
    "changes in the course of a run: fixed, or towards a target.",
    "epochs made, passes made, num_iterations": "Passes over the batch that an update made.",
    "advantages, advantage_estimator, num_generations": "How much better a response was than expected; how that is estimated; "
    "the number of responses to each prompt.",
    "mechanism": "What can limit an update or change its direction.",
    "optimiser": "What turns gradients into a step.",
    "batch": "What is sampled for one update.",
    "model, versions, hardware": "What was trained, with which versions of the libraries, and on what.",
    "run, trainer, seed": "The class that made the updates, the seed of its random numbers, and its controllers.",
    "last third": "The mean over the last third of the updates.",
}
