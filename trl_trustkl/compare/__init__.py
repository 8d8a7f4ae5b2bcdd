"""The same task under several settings and seeds, side by side.

settings (what is compared) → task (what is trained) → runner (every setting with every seed, in processes of their own) →
metrics (a run in numbers, from its records and completions alone) → conclusions (sentences the numbers support) →
figures, tables and page.

Imports everything but `demo` and `cli`.
"""
