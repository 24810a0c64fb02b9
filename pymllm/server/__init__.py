"""A thin OpenAI-style HTTP server: requests share steps, nothing is ignored.  docs/serving.md has the whole of it."""
