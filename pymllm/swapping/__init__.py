"""Other methods for the weights of a running model."""
