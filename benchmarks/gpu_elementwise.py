"""Time norms, gates, rotary positions and quantising on the GPU, as shares of the read bandwidth, beside torch's own.

    python benchmarks/gpu_elementwise.py [--tokens 1 16 4096] [--dry-run]

Hidden sizes are 4096 and 8192. A row "to e4m3" leaves codes for an fp8 product, with a scale for each row, in the same
pass or in one of its own. The script writes results/gpu_elementwise.json, .md and .png.
"""

# T tokens, H hidden size

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_peers import quantise_tokens
from gpu_roofline import Table, device_for, parser
from torch import Tensor

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.quantised_rows import QuantisedRows, RowCodes
from pymllm.kernels.triton.eight_bit import WHOLE, Groups, quantise
from pymllm.kernels.triton.elementwise import TritonElementwise

OURS, TORCH = TritonElementwise(), TorchElementwise()
E4M3 = RowCodes(False)
ROWS = Groups(False, WHOLE, WHOLE, 1)
HEAD = 128
BUDGET_S = 25  # there is little to compile, and no row takes long


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, BUDGET_S)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4096])
    options.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    args = options.parse_args(arguments)
    if args.dry_run:
        args.tokens, args.hidden = [3], [256]
    _, where = device_for(args.dry_run)
    table = Table("gpu_elementwise", "Norms, gates, rotary positions and quantising on the GPU", args)
    for hidden in args.hidden:
        for tokens in args.tokens:
            _measure(table, tokens, hidden, where)
    return table.finish()


def _measure(table: Table, tokens: int, hidden: int, where: torch.device) -> None:
    """Measure every operation over rows of one size.  Its bytes are what it must read and write, once."""
    wide = 2 * tokens * hidden  # bytes of one [T, H] in bfloat16
    sets = 2 if table.options.dry_run else _sets(wide)
    x, residual, pair = (
        [torch.randn(tokens, size, dtype=torch.bfloat16, device=where) for _ in range(sets)]
        for size in (hidden, hidden, 2 * hidden)
    )
    weight = torch.randn(hidden, dtype=torch.bfloat16, device=where)
    angles = torch.rand(tokens, HEAD // 2, device=where)
    cos, sin = angles.cos(), angles.sin()
    heads = [t.view(tokens, -1, HEAD) for t in x]
    sums = list(zip(x, residual, strict=True))
    codes = wide // 2 + 4 * tokens

    def norm(kernels: Any, *more: Any) -> list[Callable[[], Tensor]]:
        return [partial(_first, kernels.rms_norm, a, weight, 1e-6, b, *more) for a, b in sums]

    def quantised(x: Tensor) -> Tensor:
        return quantise_tokens(x)[0]

    works: dict[str, tuple[int, dict[str, list[Callable[[], Tensor]]]]] = {
        "norm of a sum": (4 * wide, {"triton": norm(OURS), "torch": norm(TORCH)}),
        "norm of a sum to e4m3": (
            3 * wide + codes,
            {
                "triton": norm(OURS, E4M3),
                "torch": [lambda a=a, b=b: quantised(TORCH.rms_norm(a, weight, 1e-6, b)[0]) for a, b in sums],
            },
        ),
        "silu·mul": (
            3 * wide,
            {
                "triton": [partial(_first, OURS.silu_and_mul, t) for t in pair],
                "torch": [partial(TORCH.silu_and_mul, t) for t in pair],
            },
        ),
        "silu·mul to e4m3": (
            2 * wide + codes,
            {
                "triton": [partial(_first, OURS.silu_and_mul, t, E4M3) for t in pair],
                "torch": [lambda t=t: quantised(TORCH.silu_and_mul(t)) for t in pair],
            },
        ),
        "to e4m3": (
            wide + codes,
            {
                "triton": [partial(_first, quantise, t, ROWS, "token", None) for t in x],
                "torch": [partial(quantised, t) for t in x],
            },
        ),
        "rotary": (
            2 * wide + cos.nbytes + sin.nbytes,
            {
                "triton": [partial(OURS.rotate, t, cos, sin) for t in heads],
                "torch": [partial(TORCH.rotate, t, cos, sin) for t in heads],
            },
        ),
    }
    for name, (nbytes, makers) in works.items():
        expected = makers["torch"][0]().float()
        for kernel, calls in makers.items():
            table.measure(
                f"{name}, {tokens} x {hidden}",
                kernel,
                lambda calls=calls: calls,  # type: ignore[misc]
                nbytes=nbytes,
                operations=0,
                expected=expected,
            )


def _first(run: Callable[..., Any], *arguments: Any) -> Tensor:
    """Return the first of a kernel's results: normed rows beside their sum, or codes beside their scales."""
    result = run(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    return result.codes if isinstance(result, QuantisedRows) else result


def _sets(nbytes: int) -> int:
    from pymllm.kernels.triton.timing import sets_beyond_caches

    return min(64, sets_beyond_caches(nbytes))


if __name__ == "__main__":
    sys.exit(main())
