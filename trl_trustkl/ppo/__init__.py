"""PPO: its configuration, the trainer for TRL, and the phases of an update."""
