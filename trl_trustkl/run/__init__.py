"""State, checkpoints, records, signals, failures and random numbers of a run."""
