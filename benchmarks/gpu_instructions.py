"""Count the instructions of the kernels that decoding waits for, as compiled for GPUs that need not be here.

    python benchmarks/gpu_instructions.py [--arch sm90 sm80] [--only int4] [--before FILE] [--dry-run]

Instructions of a thread for each weight bound a product of a few rows; registers, shared memory and waves say how many
blocks run at once. Nothing is timed. The script writes results/gpu_instructions.json and .md.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pymllm.kernels.attention import KVType
from pymllm.kernels.canonical import CanonicalWeight, Fp8Weight, IntWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import ARCHITECTURES, Device, probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.kernels.triton.ahead_of_time import Case, tasks_of
from pymllm.kernels.triton.attention import TritonGroupedAttention, example_problem
from pymllm.kernels.triton.experts import TritonExperts
from pymllm.kernels.triton.fp4_weights import TritonFp4
from pymllm.kernels.triton.instructions import Count, count
from pymllm.kernels.triton.int_weights import meta_int_weight
from pymllm.kernels.triton.linear_cases import resized

RESULTS = Path(__file__).parent / "results"
SIDE = 8192
ROWS = (1, 16, 64, 128, 192, 2048)


@dataclass(frozen=True)
class Counted:
    """A use of a kernel, whose instructions are counted.  bits: of a weight as it is loaded, 0 for no weight."""

    title: str
    kernel: str
    run: Callable[[], object]
    bits: float = 0


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--arch", nargs="+", default=["sm90", "sm80"], choices=_nvidia())
    options.add_argument("--only", default="", metavar="TEXT", help="only rows with TEXT in their title")
    options.add_argument(
        "--before", type=Path, metavar="FILE", help="a gpu_instructions.json of other code, to stand beside"
    )
    options.add_argument("--dry-run", action="store_true", help="write nothing")
    args = options.parse_args(arguments)
    rows = []
    before = {} if args.before is None else _by_work(json.loads(args.before.read_text())["rows"])
    for name in args.arch:
        for found in counts(name, args.only):
            row = vars(found) | {"per_weight": found.per_weight, "waves": found.waves}
            row |= {"before": before.get((found.title, name)) if found.function not in BESIDE else None}
            rows.append(row)
            print(_line(rows[-1]), flush=True)
    if not args.dry_run:
        import triton

        versions = {"triton": triton.__version__, "torch": torch.__version__}
        (RESULTS / "gpu_instructions.json").write_text(
            json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
        )
        head = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        said = f"Compiled by Triton {triton.__version__}; nothing ran. Before: a weight, or a step of no weights."
        (RESULTS / "gpu_instructions.md").write_text("\n".join([said, "", *head, *map(_line, rows)]) + "\n")
    return 0


def _by_work(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the figures of the kernel that does most of each work, by the work and the architecture."""
    return {
        (row["title"], row["architecture"]): {key: row[key] for key in ("loop", "per_weight", "registers")}
        for row in rows
        if row["function"] not in BESIDE
    }


def counts(architecture: str, only: str = "") -> Iterator[Count]:
    """Count every launch of every case on one architecture.  only: part of a title."""
    device = probe_device(ARCHITECTURES[architecture].spec)
    for case in cases(device):
        if only in case.title:
            for task in tasks_of(case.kernel, Case(case.title, case.run), device):
                yield count(case.title, task, device.processors, case.bits)


def cases(device: Device) -> Iterator[Counted]:
    """Yield linear layers of 8192 x 8192 at a few rows, and decoding attention over each kind of cache."""
    for title, weight, bits, compute in _weights(device):
        problem = LinearProblem(weight.type, SIDE, SIDE, torch.bfloat16, device, compute)
        kernel = select("linear", problem).kernel
        packed = kernel.pack(weight, problem)
        for rows in ROWS:
            x = torch.empty((rows, SIDE), dtype=torch.bfloat16, device="meta")
            yield Counted(
                f"{title}, {rows} rows", kernel.name, partial(kernel.run, packed, problem, x, None), bits
            )
    yield from _experts(device)
    yield from _attention(device)


def _attention(device: Device) -> Iterator[Counted]:
    """Yield attention of decoding and of prompts, over each kind of cache."""
    for kind in (KVType(torch.bfloat16), KVType(torch.float8_e4m3fn, "static"), KVType(torch.int8, "token")):
        problem = example_problem(device, kind)
        kernel = TritonGroupedAttention()
        for requests, new, length in ((16, 1, 4096), (2, 512, 2048)):
            run = partial(kernel._on_meta, problem, requests, new, length)
            yield Counted(f"attention, {kind} cache, {requests} x {new} tokens of {length}", kernel.name, run)


def _experts(device: Device) -> Iterator[Counted]:
    """Yield 128 experts of 768, eight a token, in int4: a few slots, one row each, and many, sorted by expert."""
    kernel = TritonExperts()
    weights = [meta_int_weight(*shape, 4, 128, False) for shape in ((2 * 768, 2048), (2048, 768))]
    first, second = (
        LinearProblem(weight.type, weight.shape[1], weight.shape[0], torch.bfloat16, device)
        for weight in weights
    )
    problem = ExpertsProblem((first,), second, 128, GatedActivation())
    packed = kernel.pack(ExpertsWeight(([weights[0]] * 128,), [weights[1]] * 128), problem)
    for tokens in (1, 16, 512):
        x = torch.empty((tokens, 2048), dtype=torch.bfloat16, device="meta")
        ids = torch.empty((tokens, 8), dtype=torch.int64, device="meta")
        run = partial(kernel.run, packed, problem, x, ids, ids.float(), ExpertsBias())
        yield Counted(f"experts of int4, {tokens} rows", kernel.name, run, 4)


def _weights(device: Device) -> Iterator[tuple[str, CanonicalWeight, float, Any]]:
    """Yield a name, a weight on meta, the bits of one as it is loaded, and how exactly to compute."""
    yield "int4 in groups of 128", meta_int_weight(SIDE, SIDE, 4, 128, False), 4, "auto"
    yield "int4 in groups of 32", meta_int_weight(SIDE, SIDE, 4, 32, True), 4, "auto"
    yield "int8 in groups of 128", meta_int_weight(SIDE, SIDE, 8, 128, False), 8, "auto"
    codes = torch.empty((SIDE, SIDE), dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty((SIDE // 128, SIDE // 128), device="meta")
    rows = torch.empty((SIDE, 1), device="meta")
    yield "fp8, inputs as they are", Fp8Weight(codes, rows, (1, 0), "float"), 8, "auto"
    yield "mxfp4", resized(TritonFp4().examples()[0], SIDE, SIDE), 4, "auto"
    if device.architecture is not None and device.architecture.fp8:
        yield "fp8 by fp8", Fp8Weight(codes, rows, (1, 0), "token"), 8, "auto"
        yield "fp8 by fp8 in blocks", Fp8Weight(codes, scales, (128, 128), "group"), 8, "auto"
    bytes_ = codes.view(torch.uint8)
    yield "int8 by int8", IntWeight(bytes_, rows, None, 8, SIDE, activations="token"), 8, "auto"


# Kernels that are launched beside the one that does the work.
BESIDE = ("add_splits", "join_splits", "quantise_rows")

COLUMNS = (
    *("work", "kernel", "GPU", "instructions", "weights a step", "a weight"),
    *("registers", "stack", "shared", "warps", "waves", "before"),
)


def _line(row: dict[str, Any]) -> str:
    a_weight = f"{row['per_weight']:.2f}" if row["weights"] else ""
    then = row["before"]
    before = "" if then is None else f"{then['per_weight']:.2f}" if row["weights"] else str(then["loop"])
    cells = (
        *(row["title"], row["function"], row["architecture"], row["loop"], row["weights"] or "", a_weight),
        *(row["registers"], row["stack"], row["shared"], row["warps"], f"{row['waves']:.2f}", before),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _nvidia() -> list[str]:
    return [name for name, architecture in ARCHITECTURES.items() if architecture.is_nvidia]


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
