"""Our layers inside any torch module."""
