"""The only folder that depends on the installed versions of TRL and transformers.

Imports the mathematics, `bounds`, `types` and `errors`.
"""
