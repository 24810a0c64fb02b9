"""pymllm: every weight of a language model through the method that fits it.

import pymllm

llm = pymllm.LLM("path/to/model", quant={"**.mlp.**": "fp8"})
print(llm.plan)
print(llm.generate("def read_lines(path):")[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The front door, loaded on first use: `import pymllm` alone imports no torch.
_HOMES = {
    "LLM": "pymllm.api",
    "AsyncLLM": "pymllm.asynchronous.async_llm",
    "load_model": "pymllm.api",
    "plan": "pymllm.planning.make_plan",
    "verify": "pymllm.checking.verify",
    "compare": "pymllm.checking.compare",
    "swap": "pymllm.swapping.swap",
    "quantize_checkpoint": "pymllm.writing.quantize_checkpoint",
    "search_rules": "pymllm.searching.search",
    "quantize_model": "pymllm.modules.quantize_model",
    "SamplingParams": "pymllm.engine.sampling",
    "Parallel": "pymllm.parallel",
    "PymllmError": "pymllm.errors",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from pymllm.api import LLM, load_model
    from pymllm.asynchronous.async_llm import AsyncLLM
    from pymllm.checking.compare import compare
    from pymllm.checking.verify import verify
    from pymllm.engine.sampling import SamplingParams
    from pymllm.errors import PymllmError
    from pymllm.modules.quantize_model import quantize_model
    from pymllm.parallel import Parallel
    from pymllm.planning.make_plan import plan
    from pymllm.searching.search import search_rules
    from pymllm.swapping.swap import swap
    from pymllm.writing.quantize_checkpoint import quantize_checkpoint


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    from pymllm.errors import nearest

    found = f"module 'pymllm' has no attribute {name!r}. {nearest(name, __all__)}".rstrip()
    raise AttributeError(found, name=name)


def __dir__() -> list[str]:
    return sorted(__all__)
