"""The token dispatchers by name."""

from __future__ import annotations

import importlib.util

from pymllm.errors import ConfigError, unknown_name
from pymllm.moe.dispatcher import NaiveA2ADispatcher, TokenDispatcher
from pymllm.parallel import Parallel

BACKENDS = ("naive", "deepep")


def build_token_dispatcher(backend: str, parallel: Parallel, num_experts: int) -> TokenDispatcher:
    """Make the dispatcher of this name: naive, or deepep, which needs the package deep_ep and NVIDIA GPUs.

    ConfigError for an unknown name, or where that package is missing.
    """
    if backend == "naive":
        return NaiveA2ADispatcher(parallel, num_experts)
    if backend == "deepep":
        if importlib.util.find_spec("deep_ep") is None:
            raise ConfigError(
                "the DeepEP token dispatcher needs the package 'deep_ep', which is not installed",
                code="missing-package",
                fix="Install it from github.com/deepseek-ai/DeepEP, or use the naive dispatcher.",
            )
        from pymllm.moe.deepep import DeepEPDispatcher

        return DeepEPDispatcher(parallel, num_experts)
    raise unknown_name("token dispatcher", backend, BACKENDS, code="dispatcher")
