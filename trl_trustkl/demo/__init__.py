"""The demo's task: SmolLM2, prompts, a sentiment reward, and the run that shows them.

Imports everything but `cli`, which starts it.
"""
