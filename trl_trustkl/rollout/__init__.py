"""From prompts to scored responses: prompts, rollout engines, reward functions.

Imports `policy`, `run.rng` and what is below them; knows nothing of PPO.
"""
