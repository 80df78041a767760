"""The toy world, the ladder of all stages on it, and the judge: `python -m demo`."""
