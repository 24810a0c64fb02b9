"""Time paged decode attention on the GPU: ours over bfloat16, fp8 and int8 caches, beside SDPA and FlashInfer.

    python benchmarks/gpu_attention.py [--dry-run]

Pages of 16 tokens are shuffled; 32 heads share 8 key heads of 128. The script writes results/gpu_attention.json, .md
and .png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from gpu_peers import flashinfer_decode
from gpu_roofline import BUDGET_S, Table, device_for, parser
from torch import Tensor

from pymllm.kernels.aten.attention import TorchAttention
from pymllm.kernels.attention import AttentionKernel, AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.reference.attention import ReferenceAttention
from pymllm.kernels.triton.attention import TritonGroupedAttention
from pymllm.kernels.triton.kv_store import TritonKVStore

Case = tuple[Tensor, Tensor, Tensor, AttentionStep, PagedKV]
KINDS = (KVType(torch.bfloat16), KVType(torch.float8_e4m3fn, "static"), KVType(torch.int8, "token"))


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, BUDGET_S)
    args = options.parse_args(arguments)
    works = [(2, 20)] if args.dry_run else [(1, 8192), (1, 65536), (32, 4096), (128, 1024)]
    device, where = device_for(args.dry_run)
    table = Table("gpu_attention", "Paged decode attention on the GPU", args)
    for requests, length in works:
        for kind in KINDS:
            problem = AttentionProblem(
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                value_head_dim=128,
                scale=128**-0.5,
                dtype=torch.bfloat16,
                device=device,
                kv=kind,
            )
            sets = 2 if args.dry_run else 4
            cases = [_case(problem, requests, length, seed, where) for seed in range(sets)]
            q, k, v, step, cache = cases[0]
            nbytes = requests * length * kind.bytes_per_token(8, 128, 128)
            work = f"{requests} requests of {length}, {kind}"
            expected = ReferenceAttention().run(problem, q, k, v, step, cache).float()
            makers = {
                kernel.name: partial(_calls, kernel, problem, cases)
                for kernel in (TritonGroupedAttention(), TorchAttention())
            }
            if kind.keeps(problem.dtype):
                makers["flashinfer"] = partial(_flashinfer_calls, problem, cases)
            for name, make in makers.items():
                table.measure(
                    work,
                    name,
                    make,
                    nbytes=nbytes,
                    operations=4 * requests * length * 32 * 128,
                    expected=expected,
                )
    return table.finish()


def _calls(
    kernel: AttentionKernel, problem: AttentionProblem, cases: list[Case]
) -> list[Callable[[], Tensor]]:
    return [partial(kernel.run, problem, *case) for case in cases]


def _flashinfer_calls(problem: AttentionProblem, cases: list[Case]) -> list[Callable[[], Tensor]]:
    return [flashinfer_decode(problem, q, step, cache) for q, _, _, step, cache in cases]


def _case(problem: AttentionProblem, requests: int, length: int, seed: int, where: torch.device) -> Case:
    """Make one new token for each request, and pages in random order that hold everything."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-length // 16)
    order = torch.randperm(requests * pages, generator=generator).view(requests, pages).to(where)
    shape, kind = (requests * pages, 16, 8, 128), problem.kv
    per_token = None if kind.scaling == "none" else shape[:3] if kind.scaling == "token" else (8,)
    stored = [torch.empty(shape, dtype=kind.dtype, device=where) for _ in range(2)]
    scales = [None if per_token is None else torch.full(per_token, 0.02, device=where) for _ in range(2)]
    cache = PagedKV(kind, stored[0], stored[1], scales[0], scales[1])
    slots = (order[..., None] * 16 + torch.arange(16, device=where)).flatten(1)[:, :length].flatten()
    for start in range(0, slots.numel(), 65536):
        part = slots[start : start + 65536]
        k, v = torch.randn(2, part.numel(), 8, 128, generator=generator).to(where, torch.bfloat16)
        TritonKVStore().run(problem, k, v, cache, AttentionStep(slot_mapping=part))
    bounds = torch.arange(requests + 1, dtype=torch.int32, device=where)
    step = AttentionStep(
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds * length,
        max_seqlen_q=1,
        max_seqlen_k=length,
        context_lens=torch.full((requests,), length, dtype=torch.int32, device=where),
        page_tables=order.int(),
        query_starts=list(range(requests + 1)),
        lengths=[length] * requests,
    )
    q = torch.randn(requests, 32, 128, generator=generator).to(where, torch.bfloat16)
    k, v = torch.randn(2, requests, 8, 128, generator=generator).to(where, torch.bfloat16)
    return q, k, v, step, cache


if __name__ == "__main__":
    sys.exit(main())
