"""Other programs that run our methods in their own models: transformers and vLLM (docs/hosts.md)."""
