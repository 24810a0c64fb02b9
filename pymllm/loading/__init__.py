"""From a checkpoint to a model that runs: prepare, match, load."""
