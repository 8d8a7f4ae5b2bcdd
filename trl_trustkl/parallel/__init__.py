"""Communication between the processes of a run, and the sharding of parameters."""
