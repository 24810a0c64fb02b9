"""FlashInfer's kernels behind the interface of ours."""
