"""Requests in, tokens out: sampling, the paged KV cache, the scheduler and the runner."""
