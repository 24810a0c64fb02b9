"""Norms, gates and rotary positions beside torch's, tables of tokens against their own rows, recurrences in float64."""

# T tokens, H hidden size

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.kernels.triton.elementwise import TritonElementwise
from pymllm.kernels.triton.linear_cases import random_like

from .linear import examples
from .place import Check, Place, Unit

HEAD = 128
REQUESTS = ((70, 0, 4), (1, 9, 0), (1, 0, 2))  # (new tokens, tokens before them, slot)


def units(place: Place) -> Iterator[Unit]:
    yield 0.05, "elementwise", partial(_elementwise, place)
    yield 0.65, "recurrence", partial(_recurrences, place)
    yield 1.1, "embedding", partial(_embeddings, place)


def _elementwise(place: Place) -> Iterator[Check]:
    ours, torchs = TritonElementwise(), TorchElementwise()

    def check(name: str, dtype: torch.dtype, tokens: int, hidden: int) -> dict[str, Any]:
        x, other = (place.randn(tokens, 2 * hidden, seed=seed, dtype=dtype) for seed in (1, 2))
        weight = place.randn(hidden, seed=3, dtype=dtype)
        angles = place.randn(tokens, HEAD // 2, seed=4, dtype=torch.float32)

        def run(kernels: Any) -> torch.Tensor:
            if name == "norm":
                return kernels.rms_norm(x[:, :hidden], weight, 1e-6)
            if name == "norm of a sum":
                return torch.cat(kernels.rms_norm(x[:, :hidden], weight, 1e-6, other[:, :hidden]), -1)
            if name == "silu":
                return kernels.silu_and_mul(x)
            heads = x[:, :hidden].unflatten(-1, (-1, HEAD))
            return kernels.rotate(heads, angles.cos(), angles.sin()).flatten(1)

        return place.compare(run(ours), run(torchs))

    sizes = ((3, 256),) if place.rehearse else ((1, 4096), (17, 4096), (2048, 8192))
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, hidden in sizes:
            for name in ("norm", "norm of a sum", "silu", "rotary"):
                title = f"{name}, {str(dtype).removeprefix('torch.')}, {tokens} x {hidden}"
                yield title, partial(check, name, dtype, tokens, hidden)


def _embeddings(place: Place) -> Iterator[Check]:
    size = 256 if place.rehearse else 4096

    def check(example: Any) -> dict[str, Any]:
        weight = random_like(example, size, size, 0, torch.device("cpu"))
        problem = LinearProblem(weight.type, size, size, torch.bfloat16, place.device)
        kernel = select("embedding", problem).kernel
        packed = {name: t.to(place.torch_device) for name, t in kernel.pack(weight, problem).items()}
        ids = torch.tensor([0, size - 1, 7, 7, size // 2], device=place.torch_device)
        expected = weight.dequantize(torch.float64).to(place.torch_device)[ids]
        return {"kernel": kernel.name, **place.compare(kernel.run(packed, problem, ids), expected)}

    for name, example in list(examples(place).items())[:: 6 if place.rehearse else 1]:
        if getattr(example.type, "activations", "float") == "float":
            yield name, partial(check, example)


def _recurrences(place: Place) -> Iterator[Check]:
    cases = _test_cases()

    def check(case: Any) -> dict[str, Any]:
        case = case.to(place.torch_device)
        state = case.state()
        exact, exact_state = case.exact(REQUESTS, state)
        kernel = select(case.operation, case.problem).kernel
        found = case.run(kernel, state, cases.step_of(REQUESTS, place.torch_device))
        place.compare(state.cpu().flatten(1), exact_state.flatten(1), 1e-3)
        return {"kernel": kernel.name, **place.compare(found.cpu().flatten(1), exact.flatten(1))}

    tokens = cases.tokens_of(REQUESTS)
    for dtype in (torch.bfloat16, torch.float32):
        for case in (
            cases.gated_delta_case(tokens, 4, 8, 128, 128, dtype),
            cases.mamba2_case(tokens, 8, 64, 2, 128, dtype),
            cases.conv_case(tokens, 2048, 4, dtype),
        ):
            yield f"{case.operation}, {str(dtype).removeprefix('torch.')}", partial(check, case)


def _test_cases() -> Any:
    """Import the cases of the tests.  Packages that are installed may bring a `tests` of their own, which is not it."""
    from .driver import ROOT

    package = ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package
    from tests.kernels import recurrence_cases

    return recurrence_cases
