"""What is asked of a model that runs: verify, compare, and how far its answers are from those of the floats."""
