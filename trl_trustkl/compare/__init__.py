"""The same task under several settings and seeds, side by side.

settings (what is compared) → task (what is trained) → runner (every setting with every seed, each in a separate process) →
metrics (numbers from the records and completions of a run) → conclusions (sentences from the numbers) → figures, tables and
page.
"""
