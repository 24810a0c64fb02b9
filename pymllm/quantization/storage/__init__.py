"""How codes and scales lie in a checkpoint, for families of formats."""
