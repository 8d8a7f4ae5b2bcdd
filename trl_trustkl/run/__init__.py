"""State, checkpoints, records, signals, failures and random numbers of a run.

Does not depend on PPO: imports only `parallel`, `policy` and the layers below them.
"""
