"""Linear layers on the GPU: ours in every format beside cuBLAS in bfloat16, torch's int4 matmul.

    python benchmarks/gpu_linear.py [--shapes 8192x8192 4096x4096] [--tokens 1 4 16 64 128 512 2048] [--dry-run]

Writes results/gpu_linear.json, .md and .png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from gpu_roofline import Table, device_for, parser
from torch import Tensor

from pymllm.kernels.canonical import Fp8Weight, IntWeight
from pymllm.kernels.registry import LinearProblem, select
from pymllm.kernels.triton.linear_cases import random_like


def formats() -> Iterator[tuple[str, object]]:
    """Weights on meta, in the formats of the table."""
    codes = torch.empty((256, 256), dtype=torch.uint8, device="meta")
    scales = torch.empty((256, 2), dtype=torch.float16, device="meta")
    yield "int4 g128", IntWeight(codes, scales, scales.to(torch.uint8), 4, 128)
    fp8 = codes.to(torch.float8_e4m3fn)
    yield "fp8 block 128", Fp8Weight(fp8, torch.empty((2, 2), device="meta"), (128, 128), "group")
    yield "fp8 channel", Fp8Weight(fp8, torch.empty((256, 1), device="meta"), (1, 0), "token")
    yield "int8 channel", IntWeight(codes, scales[:, :1].float(), None, 8, 256, activations="token")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=["8192x8192", "4096x4096"], help="OUTPUTSxINPUTS")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 128, 512, 2048])
    args = options.parse_args()
    if args.dry_run:
        args.shapes, args.tokens = ["256x512"], [1, 3, 70]
    device, where = device_for(args.dry_run)
    table = Table("gpu_linear", "Linear layers on the GPU", args)
    for shape in args.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for tokens in args.tokens:
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=where)
            work = f"{tokens} x {out_features} x {in_features}"
            operations = 2 * tokens * out_features * in_features
            dense_bytes = 2 * out_features * in_features
            sets = 2 if args.dry_run else min(64, sets_for(dense_bytes))
            dense = [
                torch.randn(out_features, in_features, dtype=torch.bfloat16, device=where)
                for _ in range(sets)
            ]
            calls: list[Callable[[], Tensor]] = [
                lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense
            ]  # type: ignore[misc]
            table.measure(work, "cuBLAS bfloat16", calls, nbytes=dense_bytes, operations=operations)
            del dense, calls
            for name, example in formats():
                _measure_format(table, name, example, (out_features, in_features), x, device, where, work)
            if not args.dry_run:
                _measure_torch_int4(table, (out_features, in_features), x, work)
    return table.finish()


def sets_for(nbytes: int) -> int:
    from pymllm.kernels.triton.timing import sets_beyond_caches

    return sets_beyond_caches(nbytes)


def _measure_format(table, name, example, shape, x, device, where, work) -> None:  # type: ignore[no-untyped-def]
    """Our chosen kernel for a format, checked against float64 over the weights that it packed."""
    out_features, in_features = shape
    first = random_like(example, out_features, in_features, 0, where)
    problem = LinearProblem(first.type, in_features, out_features, torch.bfloat16, device)
    kernel = select("linear", problem).kernel
    nbytes = sum(t.nbytes for t in kernel.pack(first, problem).values())
    sets = 2 if table.options.dry_run else min(64, sets_for(nbytes))
    packed = [dict(kernel.pack(first, problem)) for _ in range(sets)]
    packed = [
        {key: t.clone() for key, t in one.items()} for one in packed
    ]  # other addresses: caches do not help
    expected = (x.double() @ first.dequantize(torch.float64).t()).float()
    quantises = getattr(kernel, "error", 0.0)
    table.measure(
        f"{name}, {work}",
        kernel.name,
        [lambda p=p: kernel.run(p, problem, x, None) for p in packed],
        nbytes=nbytes + x.nbytes + 2 * x.shape[0] * out_features,
        operations=2 * x.shape[0] * out_features * in_features,
        expected=expected,
        tolerance=2e-2 + quantises,
    )


def _measure_torch_int4(table, shape, x, work) -> None:  # type: ignore[no-untyped-def]
    """torch's own int4 matmul."""
    out_features, in_features = shape
    nbytes = out_features * in_features // 2 + out_features * in_features // 128 * 4
    sets = min(64, sets_for(nbytes))

    def pack() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 255, (out_features, in_features // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(in_features // 128, out_features, 2, dtype=torch.bfloat16, device="cuda") / 64
        return torch._convert_weight_to_int4pack(codes, 8), scales

    try:
        weights = [pack() for _ in range(sets)]
    except RuntimeError as problem:
        print(f"torch's int4 matmul is left out: {problem}", file=sys.stderr)
        return
    calls = [lambda w=w: torch._weight_int4pack_mm(x, w[0], 128, w[1]) for w in weights]  # type: ignore[misc]
    operations = 2 * x.shape[0] * out_features * in_features
    table.measure(f"int4 g128, {work}", "torch int4pack", calls, nbytes=nbytes, operations=operations)


if __name__ == "__main__":
    sys.exit(main())
