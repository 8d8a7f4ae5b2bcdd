"""The trust region of one update: snapshot, measurement, limits, backtracking."""
