"""Time linear layers on the GPU: ours in every format, cuBLAS in bfloat16, torch's int4 and fp8 products, gemlite.

    python benchmarks/gpu_linear.py [--shapes 8192x8192 4096x4096] [--tokens 1 4 16 64 128 512 2048] [--dry-run]

The script writes results/gpu_linear.json, .md and .png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from gpu_peers import peers_of
from gpu_roofline import BUDGET_S, Table, device_for, parser
from torch import Tensor

from pymllm.kernels.canonical import Fp8Weight, IntWeight
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.kernels.triton.linear_cases import random_like


def formats() -> Iterator[tuple[str, object]]:
    """Make weights on meta, in the formats of the table."""
    codes = torch.empty((256, 256), dtype=torch.uint8, device="meta")
    scales = torch.empty((256, 2), dtype=torch.float16, device="meta")
    yield "int4 g128", IntWeight(codes, scales, scales.to(torch.uint8), 4, 128)
    fp8 = codes.to(torch.float8_e4m3fn)
    yield "fp8 block 128", Fp8Weight(fp8, torch.empty((2, 2), device="meta"), (128, 128), "group")
    yield "fp8 channel", Fp8Weight(fp8, torch.empty((256, 1), device="meta"), (1, 0), "token")
    yield "int8 channel", IntWeight(codes, scales[:, :1].float(), None, 8, 256, activations="token")


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, BUDGET_S)
    options.add_argument("--shapes", nargs="+", default=["8192x8192", "4096x4096"], help="OUTPUTSxINPUTS")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 128, 512, 2048])
    args = options.parse_args(arguments)
    if args.dry_run:
        args.shapes, args.tokens = ["256x512"], [1, 3, 70]
    device, where = device_for(args.dry_run)
    table = Table("gpu_linear", "Linear layers on the GPU", args)
    for shape in args.shapes:
        sizes = tuple(map(int, shape.split("x")))
        _measure_dense(table, sizes, where)
        for name, example in formats():
            _measure_format(table, name, example, sizes, device, where)
    return table.finish()


def _sets(table: Table, nbytes: int) -> int:
    """Make so many copies of a weight that no cache holds them all."""
    from pymllm.kernels.triton.timing import sets_beyond_caches

    return 2 if table.options.dry_run else min(64, sets_beyond_caches(nbytes))


def _tokens(table: Table, sizes: tuple[int, int], where: torch.device) -> Iterator[tuple[str, int, Tensor]]:
    """Return for each number of tokens the name of the work, its operations, and x."""
    out_features, in_features = sizes
    for tokens in table.options.tokens:
        x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=where)
        operations = 2 * tokens * out_features * in_features
        yield f"{tokens} x {out_features} x {in_features}", operations, x


def _measure_dense(table: Table, sizes: tuple[int, int], where: torch.device) -> None:
    """Measure the layer that a model has without quantisation."""
    nbytes = 2 * sizes[0] * sizes[1]
    weights = [torch.randn(*sizes, dtype=torch.bfloat16, device=where) for _ in range(_sets(table, nbytes))]
    for work, operations, x in _tokens(table, sizes, where):
        table.measure(
            work,
            "cuBLAS bfloat16",
            lambda x=x: [lambda w=w: F.linear(x, w) for w in weights],  # type: ignore[misc]
            nbytes=nbytes,
            operations=operations,
        )


def _measure_format(
    table: Table, name: str, example: object, sizes: tuple[int, int], device: Device, where: torch.device
) -> None:
    """Measure our chosen kernel for a format, then its peers.

    All are checked against float64 over the weights that all packed.
    """
    first = random_like(example, *sizes, 0, where)
    problem = LinearProblem(first.type, sizes[1], sizes[0], torch.bfloat16, device)
    kernel = select("linear", problem).kernel
    nbytes = sum(t.nbytes for t in kernel.pack(first, problem).values())
    sets = _sets(table, nbytes)
    packed = [{key: t.clone() for key, t in kernel.pack(first, problem).items()} for _ in range(sets)]
    exact = first.dequantize(torch.float64).t()

    def ours(x: Tensor) -> list[Callable[[], Tensor]]:
        return [lambda p=p: kernel.run(p, problem, x, None) for p in packed]  # type: ignore[misc]

    makers = [(kernel.name, ours, getattr(kernel, "error", 0.0))]
    makers += [(peer.name, partial(peer.calls, [first] * sets), peer.error) for peer in peers_of(first)]
    for kernel_name, calls, rounding in makers:
        for work, operations, x in _tokens(table, sizes, where):
            table.measure(
                f"{name}, {work}",
                kernel_name,
                partial(calls, x),
                nbytes=nbytes + x.nbytes + 2 * x.shape[0] * sizes[0],
                operations=operations,
                expected=(x.double() @ exact).float(),
                tolerance=2e-2 + rounding,
            )


if __name__ == "__main__":
    sys.exit(main())
