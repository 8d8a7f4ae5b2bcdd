"""The demo: SmolLM2, prompts, a sentiment reward, and the run."""
