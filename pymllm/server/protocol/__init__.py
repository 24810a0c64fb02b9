"""The requests that clients may send: bodies are read strictly, and what is not supported is refused by its name."""
