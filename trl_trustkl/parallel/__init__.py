"""Communication between the processes of a run. Imports accelerate and `masking`."""
