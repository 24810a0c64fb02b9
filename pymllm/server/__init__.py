"""A thin OpenAI-style HTTP server: one request at a time, nothing ignored.  docs/serving.md has the whole of it."""
