"""Language models: loading, hidden states, exact divergences, values and the reference.

Imports `parallel` and the layers below it, neither rollouts, PPO nor TRL's trainers.
"""
