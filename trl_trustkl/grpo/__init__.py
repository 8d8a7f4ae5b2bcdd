"""GRPO and RLOO: TRL's trainers with the callbacks of this package, configured by further fields."""
