"""What keeps a run alive: state, checkpoints, records, signals, failures, random numbers.

Imports `parallel` and what is below it; knows nothing of PPO.
"""
