"""The answers to clients: objects of the APIs that they speak, whole or in chunks."""
