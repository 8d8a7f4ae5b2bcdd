"""PPO: its configuration, the trainer for TRL, and the phases of an update.

May import everything except `compare`, `demo` and `cli`.
"""
