"""What is PPO's own: its configuration, the trainer that TRL sees, and the phases of an update.

Imports everything but `compare`, `demo` and `cli`; the parts that it is built of know nothing of it.
"""
