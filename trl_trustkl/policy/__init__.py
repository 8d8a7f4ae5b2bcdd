"""Language models: loading, hidden states, exact divergences, values and the reference."""
