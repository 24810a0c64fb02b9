"""Vectors of texts: what sentence-transformers' folders say of them (settings.py), and the way there (embedder.py)."""
