"""`pymllm verify`: every layer's kernel against float64 over the checkpoint's own tensors, the worst first."""

from __future__ import annotations

import argparse

from pymllm.cli.options import add_model_options, model_arguments, model_or_shipped
from pymllm.cli.output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="how many of the worst layers; default: 10"
    )
    parser.add_argument("--json", action="store_true", help="every layer as JSON")


def execute(args: argparse.Namespace) -> int:
    if args.top < 1:
        args.parser.error("--top must be at least 1")
    from pymllm.api import choose_parallel
    from pymllm.verification import verify

    with choose_parallel(args.tensor_parallel_size, args.expert_parallel):
        verification = verify(model_or_shipped(args.model), **model_arguments(args))
    if args.json:
        print_json(verification.to_dict())
    else:
        print(verification.table(args.top))
        failed = sum(not layer.ok for layer in verification.layers)
        verdict = f"{failed} FAIL" if failed else "all within what rounding explains"
        print(f"{verification.model}: {len(verification.layers)} layers against float64, {verdict}")
    return 0 if verification.ok else 1
