"""`pymllm kernels`: compile GPU kernels for GPUs that are not here, tune them on one that is, run a benchmark."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pymllm.cli.options import add_common_options
from pymllm.cli.output import print_json

# Outputs and inputs of the linear layers of an 8 B model.
SHAPES_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
QUICK_TILES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    aot = _action(
        actions, "aot", "compile every GPU kernel ahead of time, for every architecture; needs no GPU"
    )
    aot.add_argument("--arch", action="append", metavar="NAME", help="sm90, gfx942, ...; default: all")
    aot.add_argument("--only", default="", metavar="TEXT", help="only kernels with TEXT in their name")
    aot.add_argument("--limit", type=int, metavar="N", help="at most N launches of each architecture")
    aot.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each CPU")
    aot.add_argument("--json", action="store_true", help="every compiled launch as JSON")
    aot.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write triton_aot.json and triton_aot.md there"
    )
    add_common_options(aot)
    tune = _action(actions, "tune", "find the fastest tiles on this GPU, and keep them in its file")
    tune.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="OUTxIN",
        help="a linear layer's outputs and inputs; default: those of an 8 B model",
    )
    tune.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1, 16, 64],
        metavar="N",
        help="rows of the input; default: 1 16 64",
    )
    tune.add_argument("--device", default="cuda", help="cuda or, of several GPUs, cuda:1; default: cuda")
    tune.add_argument(
        "--seconds",
        type=_seconds,
        metavar="N",
        help="stop after about so long, shared over the shapes; the likeliest tiles come first. Default: try all",
    )
    tune.add_argument(
        "--quick", action="store_true", help=f"only the {QUICK_TILES} likeliest tiles of each shape"
    )
    tune.add_argument("--out", type=Path, metavar="FILE", help="default: the file that this device reads")
    add_common_options(tune)
    table = _action(actions, "table", "run a script of benchmarks/, from a clone")
    table.add_argument("name", metavar="NAME", help="gpu_linear, cpu_linear, ...")
    table.add_argument("rest", nargs=argparse.REMAINDER, help="the script's own options")
    add_common_options(table)


def _action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    return added


def execute(args: argparse.Namespace) -> int:
    return {"aot": _ahead_of_time, "tune": _tune, "table": _table}[args.action](args)


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdecimal() and inputs.isdecimal() and int(outputs) and int(inputs)):
        raise argparse.ArgumentTypeError(f"expected OUTPUTSxINPUTS, e.g. 4096x14336, not {text!r}")
    return int(outputs), int(inputs)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, not {text!r}")
    return seconds


def _tune(args: argparse.Namespace) -> int:
    from pymllm.errors import ConfigError
    from pymllm.kernels.hardware import current, probe_device
    from pymllm.kernels.triton.experts import WEIGHTS
    from pymllm.kernels.triton.timing import seconds_each
    from pymllm.kernels.triton.tune import tune
    from pymllm.kernels.triton.tuning import device_file, write_tuned
    from pymllm.kernels.triton.weight_only import EXPAND_TOKENS

    device = probe_device(args.device)
    if device.type == "cpu" or not device.present:
        raise ConfigError(
            f"tiles are measured on a GPU that is here, not on {device}",
            code="device",
            expected="--device cuda, or cuda:N with a GPU's number",
            found=args.device,
        )
    for tokens in args.tokens:
        if not 0 < tokens < EXPAND_TOKENS:
            raise ConfigError(
                "so many rows have no tile to tune",
                code="tokens",
                expected=f"--tokens from 1 to {EXPAND_TOKENS - 1}; from {EXPAND_TOKENS} on torch multiplies",
                found=str(tokens),
            )
    path = args.out or device_file(device)
    print(f"on {device.describe()}")
    weights = [kernel for kernel in WEIGHTS if kernel.name != "dense"]
    jobs = list(itertools.product(args.tokens, args.shape or SHAPES_8B, weights))
    started, wrong = time.monotonic(), 0
    with current(device.torch_device):
        for number, (tokens, (out_features, in_features), kernel) in enumerate(jobs):
            now = time.monotonic()
            left = math.inf if args.seconds is None else started + args.seconds - now
            if number and left <= 0:
                print(f"the time is up: {len(jobs) - number} of {len(jobs)} shapes are left as they were")
                break
            found = tune(
                kernel,
                kernel.examples()[0],
                out_features,
                in_features,
                tokens,
                device,
                where=device.torch_device,
                clock=seconds_each,
                keep=lambda key, tile: write_tuned(path, {key: tile}, device),
                limit=QUICK_TILES if args.quick else None,
                deadline=now + left / (len(jobs) - number),
            )
            print(found, flush=True)
            for line in found.wrong:
                wrong += 1
                print(f"{found.key}: wrong result: {line}", file=sys.stderr)
    print(f"kept in {path}")
    return 1 if wrong else 0


def _ahead_of_time(args: argparse.Namespace) -> int:
    from pymllm.disk import write_whole, writing
    from pymllm.errors import unknown_name
    from pymllm.kernels.hardware import ARCHITECTURES
    from pymllm.kernels.triton.ahead_of_time import build, gather_tasks

    architectures = args.arch or list(ARCHITECTURES)
    for name in architectures:
        if name not in ARCHITECTURES:
            raise unknown_name("architecture", name, ARCHITECTURES, code="architecture")
    tasks = [task for name in architectures for task in gather_tasks([name], only=args.only)[: args.limit]]
    built = build(tasks, workers=args.workers)
    rows = [{**vars(row), "verdict": row.verdict} for row in built]
    report = {"versions": _versions(), "launches": rows}
    if args.out is not None:
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / "triton_aot.md", [(table(report) + "\n").encode()])
        write_whole(args.out / "triton_aot.json", [_one_line_a_row(report).encode()])
    if args.json:
        print_json(report)
    else:
        print(table(report))
    return 1 if any(row["verdict"] != "ok" for row in rows) or not rows else 0


def _one_line_a_row(report: dict[str, Any]) -> str:
    """Write JSON that compares well: one launch a line, without the times of compiling."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report["launches"]]
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"versions": {json.dumps(report["versions"])}, "launches": [\n{lines}\n]}}\n'


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__}


def table(report: dict[str, Any]) -> str:
    """Write a Markdown table: for each kernel function and architecture the largest figures, then what is wrong."""
    rows = report["launches"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["function"], row["architecture"]), []).append(row)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# GPU kernels, compiled ahead of time",
        "",
        f"{versions}. {len(rows)} launches, each with the attributes and options of a real one; the largest of each.",
        "Registers and stack of a thread (a stack means spills), shared memory of a block in bytes.",
        "",
        "| kernel | function | architecture | launches | registers | stack | shared | limit | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kernel, function, architecture), group in sorted(groups.items()):
        most = {name: max(row[name] for row in group) for name in ("registers", "stack", "shared")}
        bad = Counter(row["verdict"] for row in group if row["verdict"] != "ok")
        verdict = "; ".join(f"{count} x {text}" for text, count in bad.items()) or "ok"
        lines.append(
            f"| {kernel} | {function} | {architecture} | {len(group)} | {most['registers']} | {most['stack']} "
            f"| {most['shared']} | {group[0]['shared_limit']} | {verdict} |"
        )
    wrong = [row for row in rows if row["verdict"] != "ok"]
    lines += ["", f"{len(rows) - len(wrong)} of {len(rows)} launches are well."]
    return "\n".join(
        lines
        + [f"- {row['architecture']} {row['function']} ({row['case']}): {row['verdict']}" for row in wrong]
    )


def _table(args: argparse.Namespace) -> int:
    from pymllm.errors import ConfigError, nearest

    folder = Path(__file__).parents[2] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if args.name not in names:
        raise ConfigError(
            f"there is no benchmark script {args.name!r}",
            code="benchmark",
            expected=" or ".join(names) or "a clone of the repository, whose benchmarks/ holds them",
            found=args.name,
            fix=nearest(args.name, names),
        )
    return subprocess.run(
        [sys.executable, str(folder / f"{args.name}.py"), *args.rest], check=False
    ).returncode
