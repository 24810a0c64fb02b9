"""The front door: `LLM`, a model that is loaded and ready to answer, and `load_model`, which makes the model alone."""

from __future__ import annotations

from pymllm.api.llm import LLM
from pymllm.api.loading import load_model
from pymllm.weights.shipped import shipped_model

__all__ = ["LLM", "load_model", "shipped_model"]
