"""Time routed experts on the GPU: ours over int4, fp8, mxfp4 and bfloat16 weights, beside torch's grouped matmul.

    python benchmarks/gpu_moe.py [--tokens 1 16 256] [--dry-run]

There are 128 experts of 768, eight a token, and the hidden size is 2048. Shares count only the experts that the routing
uses. The script writes results/gpu_moe.json, .md and .png.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from gpu_peers import grouped_mm_experts
from gpu_roofline import BUDGET_S, Table, device_for, parser
from torch import Tensor

from pymllm.kernels.canonical import DenseType
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight, LazyWeights
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.linear_experts import run_by_expert
from pymllm.kernels.triton.experts import WEIGHTS, TritonExperts
from pymllm.kernels.triton.linear_cases import random_like

DISTINCT = 8  # experts of the same content lie in places of their own, so reading them costs the same


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, BUDGET_S)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    args = options.parse_args(arguments)
    experts, top_k, hidden, inner = (8, 2, 128, 128) if args.dry_run else (128, 8, 2048, 768)
    if args.dry_run:
        args.tokens = [1, 12]
    device, where = device_for(args.dry_run)
    table = Table("gpu_moe", "Routed experts on the GPU", args)
    for kind in WEIGHTS:
        example = kind.examples()[0]
        gate_up, down = (
            [random_like(example, *shape, e, torch.device("cpu")) for e in range(DISTINCT)]
            * (experts // DISTINCT)
            for shape in ((2 * inner, hidden), (hidden, inner))
        )
        first, second = (
            LinearProblem(w[0].type, w[0].shape[1], w[0].shape[0], torch.bfloat16, device)
            for w in (gate_up, down)
        )
        problem = ExpertsProblem((first,), second, experts, GatedActivation())
        packed = TritonExperts().pack(ExpertsWeight((gate_up,), down), problem)
        expert_bytes = sum(tensor.nbytes for tensor in packed.values()) // experts
        for key, tensor in packed.items():
            packed[key] = tensor.to(where)
        dense = isinstance(first.weight, DenseType)
        floats = (
            [torch.stack([w.weight for w in part]).to(where) for part in (gate_up, down)] if dense else []
        )
        for tokens in args.tokens:
            x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=where)
            ids, weights = routing(tokens, experts, top_k, where)
            used = int(ids[0].unique().numel())
            run = TritonExperts().run
            makers = {
                "triton_experts": [partial(run, packed, problem, x, i, weights, ExpertsBias()) for i in ids]
            }
            if dense:
                makers["torch _grouped_mm"] = [
                    partial(grouped_mm_experts, *floats, x, i, weights) for i in ids
                ]
            for kernel, calls in makers.items():
                table.measure(
                    f"{first.weight}, {tokens} tokens, {used} experts",
                    kernel,
                    lambda calls=calls: calls,  # type: ignore[misc]
                    nbytes=used * expert_bytes + 2 * x.nbytes,
                    operations=6 * tokens * top_k * hidden * inner,
                    expected=reference(gate_up, down, x, ids[0], weights) if tokens <= 16 else None,
                )
    return table.finish()


def routing(tokens: int, experts: int, top_k: int, where: torch.device) -> tuple[list[Tensor], Tensor]:
    """Make several routings, so that every call reads other experts, and the weights of each token's experts."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(tokens, experts, generator=generator) for _ in range(16)]
    return [s.topk(top_k, dim=-1).indices.to(where) for s in scores], torch.full(
        (tokens, top_k), 1 / top_k
    ).to(where)


def reference(gate_up, down, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    activation = GatedActivation()
    floats = [
        LazyWeights(lambda e, w=w: w[e].dequantize(torch.float32).to(x.device), len(w))
        for w in (gate_up, down)
    ]  # type: ignore[misc]
    return run_by_expert(
        lambda e, rows: activation(rows @ floats[0][e].t()) @ floats[1][e].t(), x.float(), ids, weights
    )


if __name__ == "__main__":
    sys.exit(main())
