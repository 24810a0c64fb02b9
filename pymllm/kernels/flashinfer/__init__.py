"""FlashInfer's kernels behind ours."""
