"""vLLM's kernels behind ours."""
