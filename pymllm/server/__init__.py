"""A thin OpenAI-style HTTP server: requests share steps, and no parameter is ignored.  docs/serving.md describes it."""
