"""From prompts to scored responses: prompts, rollout engines, reward functions.

Imports `policy`, `run.rng` and the layers below them, not PPO.
"""
