"""The only folder that knows which TRL and transformers are installed.

Imports the mathematics, `bounds`, `types` and `errors`.
"""
