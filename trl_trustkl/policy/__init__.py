"""What is asked of a language model: hidden states, exact divergences, values, the reference, loading.

Imports `parallel` and what is below it; knows nothing of rollouts, of PPO and of TRL's trainers.
"""
