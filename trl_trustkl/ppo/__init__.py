"""The PPO trainer, its configuration, and the models of a run."""
