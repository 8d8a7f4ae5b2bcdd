"""The only folder that depends on the installed versions of TRL and transformers."""
