"""Routed experts in every kind of weight against float32 products, and routing against torch's."""

# T tokens, E experts, K experts a token

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_moe import DISTINCT, reference, routing
from torch import Tensor

from pymllm.kernels.aten.routing import TorchRouting
from pymllm.kernels.canonical import DenseWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.kernels.routing import Routing
from pymllm.kernels.triton.experts import WEIGHTS
from pymllm.kernels.triton.linear_cases import random_like
from pymllm.kernels.triton.routing import TritonRouting

from .place import Check, Place, Unit

TOLERANCE = 2e-2  # the gated product between the two is rounded to bfloat16
ROUTINGS = {
    "128 experts": (128, Routing(top_k=8)),
    "256 in groups": (
        256,
        Routing(top_k=8, scoring="sigmoid", scale=2.5, groups=8, kept_groups=4, group_best=2),
    ),
    "32, softmax over the chosen": (32, Routing(top_k=4, scoring="topk_softmax")),
}


def units(place: Place) -> Iterator[Unit]:
    kinds = WEIGHTS[:1] if place.rehearse else WEIGHTS
    for index, kind in enumerate(kinds):
        yield 0.5 + index / 10, "experts", partial(_experts, place, kind.examples()[0])
    yield 0.6, "routing", partial(_routing, place)


def _experts(place: Place, example: Any) -> Iterator[Check]:
    experts, top_k, hidden, inner = (8, 2, 128, 128) if place.rehearse else (64, 8, 2048, 768)
    where = place.torch_device

    @functools.cache
    def made() -> tuple[Any, ExpertsProblem, dict[str, Tensor], list[Any], list[Any]]:
        distinct = [
            [random_like(example, *shape, e, torch.device("cpu")) for e in range(DISTINCT)]
            for shape in ((2 * inner, hidden), (hidden, inner))
        ]
        gate_up, down = (weights * (experts // DISTINCT) for weights in distinct)
        first, second = (
            LinearProblem(w[0].type, w[0].shape[1], w[0].shape[0], torch.bfloat16, place.device)
            for w in (gate_up, down)
        )
        problem = ExpertsProblem((first,), second, experts, GatedActivation())
        kernel = select("experts", problem).kernel
        packed = kernel.pack(ExpertsWeight((gate_up,), down), problem)
        for name, tensor in packed.items():
            packed[name] = tensor.to(where)
        floats = [
            [DenseWeight(w.dequantize(torch.float32).to(where)) for w in weights] * (experts // DISTINCT)
            for weights in distinct
        ]
        return kernel, problem, packed, floats[0], floats[1]

    def check(tokens: int) -> dict[str, Any]:
        kernel, problem, packed, gate_up, down = made()
        x = place.randn(tokens, hidden, seed=tokens, dtype=torch.bfloat16)
        ids, weights = routing(tokens, experts, top_k, where)
        found = kernel.run(packed, problem, x, ids[0], weights, ExpertsBias())
        return {
            "kernel": kernel.name,
            **place.compare(found, reference(gate_up, down, x, ids[0], weights), TOLERANCE),
        }

    for tokens in (12,) if place.rehearse else (1, 2, 16, 17, 100, 700):
        yield f"{example.type}, {tokens} tokens, {experts} experts", partial(check, tokens)


def _routing(place: Place) -> Iterator[Check]:
    def check(experts: int, rule: Routing, tokens: int) -> dict[str, Any]:
        logits = place.randn(tokens, experts, seed=tokens, dtype=torch.float32)
        spread = []
        for kernel in (TritonRouting(), TorchRouting()):
            weights, ids = kernel.run(rule, logits, None)
            spread.append(torch.zeros_like(logits).scatter_(1, ids, weights))
        return place.compare(spread[0], spread[1], 1e-5)

    for name, (experts, rule) in ROUTINGS.items():
        for tokens in (3,) if place.rehearse else (1, 33, 1024):
            yield f"{name}, {tokens} tokens", partial(check, experts, rule, tokens)
