"""vLLM's layers behind the interface of our kernels."""
