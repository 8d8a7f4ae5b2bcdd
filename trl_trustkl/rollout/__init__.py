"""From prompts to scored responses: prompts, rollout engines, reward functions."""
