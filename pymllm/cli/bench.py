"""`pymllm bench`: how fast a model reads prompts and answers here, beside what the machine allows at most."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import (
    SHIPPED,
    add_cache_options,
    add_model_options,
    cache_arguments,
    model_arguments,
    model_or_shipped,
    positive,
)
from pymllm.cli.output import console, print_json, readable_size, say, show
from pymllm.cli.table import Column, table_lines

if TYPE_CHECKING:
    from pymllm.api import LLM
    from pymllm.measuring.bench import Measured, Row
    from pymllm.measuring.cases import Case
    from pymllm.planning.plan import Plan

EPILOG = """Rows have llama-bench's names and its meaning: pp512 is prefill of 512 random tokens, tg128 decoding of
128 tokens, one a step, and "@ d1024" with 1024 tokens before them. Tokens a second are those of the whole batch: the
mean of the repetitions, and their standard deviation. The limit is what the machine, measured in the same run with as
many threads, allows at most: bytes of weights, keys and values at the rate at which memory is read, or multiply-adds.
Arithmetic limits are known of pymllm's own kernels on a CPU and of torch's in float32, and of no others.

Kernels are built, tuned and measured one by one with `pymllm kernels`.

examples:
  pymllm bench
  pymllm bench MODEL --prompt-tokens 128,512 --batch 1,8
  pymllm bench MODEL -p 0 -n 64 --threads 1,2 --depth 0,1024 --json"""
# The actions of `pymllm kernels`, which once was called bench.
DEVELOPERS_ACTIONS = ("aot", "tune", "table")
WIDTH = 80  # columns at most, but for names
COLUMNS = ("test", "batch", "threads", "tokens/s", "limit", "of it", "limited by")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pymllm bench [MODEL] [options]"
    parser.epilog = EPILOG
    group = parser.add_argument_group(
        "what is measured", "Each takes one number, or several with commas between."
    )
    for flags, name, what in (
        (("-p", "--prompt-tokens"), "prompts", "tokens of prefill; 0: no prefill; default: 512"),
        (("-n", "--answer-tokens"), "answers", "tokens of decoding; 0: no decoding; default: 128"),
    ):
        group.add_argument(*flags, dest=name, type=_counts(0), metavar="N,...", help=what)
    group.add_argument(
        *("-b", "--batch"),
        type=_counts(1),
        default=[1],
        metavar="N,...",
        help="requests side by side; default: 1",
    )
    group.add_argument(
        *("-t", "--threads"),
        type=_counts(1),
        metavar="N,...",
        help="threads on a CPU; default: those that the model would run on",
    )
    group.add_argument(
        *("-d", "--depth"),
        type=_counts(0),
        default=[0],
        metavar="N,...",
        help="tokens that stand before those that are measured; default: 0",
    )
    group.add_argument(
        *("-r", "--repetitions"), type=positive, default=5, metavar="N", help="of each test; default: 5"
    )
    group = parser.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="everything as JSON, with every repetition")
    group.add_argument("--csv", action="store_true", help="the rows alone, as CSV")
    group.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument(
        "model",
        nargs="?",
        type=_model,
        metavar="MODEL",
        help=f"a folder, or a hub id org/name; default: {SHIPPED}",
    )
    add_cache_options(parser)
    add_model_options(parser, positional=False)


def _model(text: str) -> str:
    if text in DEVELOPERS_ACTIONS and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"`pymllm bench {text}` is called `pymllm kernels {text}` now")
    return text


def _counts(least: int) -> Any:
    def read(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.isdecimal() and int(part) >= least for part in parts):
            raise argparse.ArgumentTypeError(
                f"expected integers of at least {least} with commas between, not {text!r}"
            )
        return list(dict.fromkeys(map(int, parts)))

    return read


def execute(args: argparse.Namespace) -> int:
    if args.prompts == [0] and args.answers == [0]:
        args.parser.error("nothing to measure: --prompt-tokens and --answer-tokens are both 0")
    if args.threads is not None and args.tensor_parallel_size > 1:
        args.parser.error("--threads is for one rank; OMP_NUM_THREADS sets the threads of every rank")
    import torch

    from pymllm.api import LLM
    from pymllm.measuring.bench import measure
    from pymllm.measuring.cases import check_cases

    options, model = model_arguments(args), model_or_shipped(args.model)
    sizes = cache_arguments(args)
    threads = args.threads
    if args.tensor_parallel_size == 1:
        from pymllm.planning.make_plan import plan

        # What cannot run is told before a tensor is read.
        planned = plan(model, **options, **sizes)
        if planned.device != "cpu" and threads is not None:
            args.parser.error("--threads is for models that run on a CPU; this one runs on a GPU")
        if planned.kv_cache:
            wanted = _cases(args, planned, threads or [1])
            sizes = _with_room(sizes, planned, wanted)
            planned = plan(model, **options, **sizes)
            _check(check_cases, wanted, planned)
    llm = LLM(
        model,
        tensor_parallel_size=args.tensor_parallel_size,
        expert_parallel=args.expert_parallel,
        **options,
        **sizes,
        check_memory=args.check_memory,
    )
    llm.model.check_generates()
    cases = _cases(args, llm.plan, threads or [torch.get_num_threads()])
    _check(check_cases, cases, llm.plan)
    measured = measure(llm, cases, args.repetitions, told=_tell)
    if args.json:
        print_json(to_dict(llm, measured))
    elif args.csv:
        show(csv_of(measured))
    else:
        width = console().width if sys.stdout.isatty() else WIDTH
        show("\n".join(lines_of(llm, measured, markdown=args.markdown, width=min(width, WIDTH))))
    return 0


def _tell(text: str) -> None:
    """Say on a terminal what is measured."""
    if sys.stderr.isatty():
        say(f"measuring {text}")


def _cases(args: argparse.Namespace, plan: Plan, threads: list[int]) -> list[Case]:
    """Combine the sizes that were asked for; those that were not are made to fit the model."""
    from pymllm.measuring.cases import default_sizes, make_cases

    sizes = default_sizes(plan.kv_cache["max_model_len"], max(args.batch), max(args.depth))
    prompts = [sizes[0]] if args.prompts is None else args.prompts
    answers = [sizes[1]] if args.answers is None else args.answers
    return make_cases(prompts, answers, args.batch, threads, args.depth)


def _with_room(sizes: dict[str, Any], plan: Plan, cases: list[Case]) -> dict[str, Any]:
    """Have the KV cache grow to what the cases need, unless the user has said how large it is."""
    needed = max(case.cache_tokens for case in cases)
    if sizes["kv_memory"] is not None or needed <= plan.kv_cache["tokens"]:
        return sizes
    each = -(-plan.kv_cache["bytes"] // max(plan.kv_cache["tokens"], 1))
    return {**sizes, "kv_memory": needed * each + plan.kv_cache["state_bytes"] * 2}


def _check(check: Any, cases: list[Case], plan: Plan) -> None:
    cache = plan.kv_cache
    check(cases, cache["max_model_len"], cache["tokens"], cache["requests"], plan.model)


def to_dict(llm: LLM, measured: Measured) -> dict[str, Any]:
    """Collect everything that was measured, as JSON values."""
    import pymllm
    from pymllm.kernels.limits import machine
    from pymllm.measuring.bench import describe_kernels

    plan, cost = llm.plan, measured.cost
    return {
        "schema_version": 1,
        "model": plan.model,
        "model_type": plan.model_type,
        "device": plan.device,
        "dtype": plan.dtype,
        "compute": plan.compute,
        "strategy": plan.strategy.get("name"),
        "weight_bytes": plan.totals["weight_bytes"],
        "read_bytes_per_token": cost.read_bytes(1, 1, 0),
        "kv_cache_bytes_per_token": plan.totals["kv_cache_bytes_per_token"],
        "machine": {**machine(), "pymllm": pymllm.__version__, "device_name": _device_name(llm)},
        "read_bytes_per_second": {str(threads): rate for threads, rate in measured.read_rates.items()},
        "operations_per_second": {str(threads): rates for threads, rates in measured.operation_rates.items()},
        "other_cpus": measured.other_cpus,
        "kernels": describe_kernels(llm),
        "elementwise": plan.elementwise.get("kernel"),
        "sampling": plan.sampling.get("kernel"),
        "eager_reason": measured.eager_reason,
        "warnings": warnings(llm, measured),
        "rows": [_row(row) for row in measured.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    case = row.case
    return {
        "test": case.name,
        "kind": "prefill" if case.reads else "decode",
        "tokens": case.tokens,
        "batch": case.batch,
        "threads": case.threads,
        "depth": case.depth,
        "tokens_per_second": row.mean,
        "deviation": row.deviation,
        "limit_tokens_per_second": row.limit,
        "share_of_limit": row.share,
        "limited_by": None if row.bound is None else row.bound.by,
        "other_cpus": row.other_cpus,
        "repetitions": row.speeds,
    }


def csv_of(measured: Measured) -> str:
    """Write the rows as CSV, without the repetitions."""
    rows = [{key: value for key, value in _row(row).items() if key != "repetitions"} for row in measured.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def lines_of(llm: LLM, measured: Measured, *, markdown: bool = False, width: int = WIDTH) -> list[str]:
    """Write the header, the table and what ran, for people: at most `width` columns, but for names."""
    head = [_wrapped(name, text, width) for name, text in _head(llm, measured)]
    cells = [list(COLUMNS), *map(_cells, measured.rows)]
    if markdown:
        table = ["| " + " | ".join(row) + " |" for row in cells]
        table.insert(1, "| --- |" + " ---: |" * 5 + " --- |")
        head = [f"    {line}" for entry in head for line in entry.split("\n")]
    else:
        widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
        table = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
        if max(map(len, table)) > width:
            kinds = [
                Column(title, 0 < index < len(COLUMNS) - 1, index == 0) for index, title in enumerate(COLUMNS)
            ]
            table = table_lines(kinds, cells[1:], width)
    kernels = ["kernels", *_kernel_lines(llm)]
    if markdown:
        kernels = [f"    {line}" for line in kernels]
    said = [textwrap.fill(text, width, break_on_hyphens=False) for text in warnings(llm, measured)]
    return [*head, "", *table, "", *kernels, *([""] if said and markdown else []), *said]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    words = (0, len(widths) - 1)
    return [
        cell.ljust(width) if column in words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _wrapped(name: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{name:9}{text}", width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
    )


def _head(llm: LLM, measured: Measured) -> list[tuple[str, str]]:
    """Say of what, where and with what: the names and texts of the header's lines."""
    import pymllm
    from pymllm.kernels.limits import machine

    plan, info = llm.plan, machine()
    methods: dict[str, int] = {}
    for layer in plan.weighted_layers:
        methods[layer.method_detail] = methods.get(layer.method_detail, 0) + 1
    usual = sorted(methods, key=lambda name: -methods[name])
    weights = readable_size(plan.totals["weight_bytes"])
    read = readable_size(measured.cost.read_bytes(1, 1, 0))
    place = _device_name(llm)
    if plan.device == "cpu":
        place += f", {info['logical_cpus']} CPUs, path {info['path']}"
    rates = ", ".join(
        f"{rate / 1e9:.1f} GB/s" + (f" with {_number(threads, 'thread')}" if plan.device == "cpu" else "")
        for threads, rate in measured.read_rates.items()
    )
    return [
        ("model", f"{Path(plan.model).name} ({plan.what_runs}), {weights} of weights: {', '.join(usual)}"),
        (
            "a token",
            f"reads {read} of weights, and {plan.totals['kv_cache_bytes_per_token']} bytes of keys and values for "
            "each token before it",
        ),
        ("machine", f"{place}; {plan.dtype} between layers, compute {plan.compute}"),
        ("memory", f"is read at {rates}"),
        (
            "versions",
            f"pymllm {pymllm.__version__}, torch {info['torch']}, Python {info['python']}, {info['system']}",
        ),
    ]


def _device_name(llm: LLM) -> str:
    from pymllm.kernels.hardware import probe_device

    return probe_device(llm.plan.device).describe()


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _cells(row: Row) -> list[str]:
    case = row.case
    return [
        case.name,
        str(case.batch),
        str(case.threads),
        f"{_readable(row.mean)} ± {_readable(row.deviation)}",
        "" if row.limit is None else _readable(row.limit),
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.bound is None else row.bound.by,
    ]


def _readable(speed: float) -> str:
    return f"{speed:.2f}" if speed < 1000 else f"{speed:.1f}"


def _kernel_lines(llm: LLM) -> list[str]:
    from pymllm.measuring.bench import describe_kernels

    groups = describe_kernels(llm)
    lines = [
        f"{group['layers']:5d} {group['kind']:<11} {group['kernel']:<16} {group['method']}"
        for group in groups
    ]
    plan = llm.plan
    rest = {"elementwise": plan.elementwise.get("kernel"), "sampling": plan.sampling.get("kernel")}
    return [*lines, *(f"      {name:<11} {kernel}" for name, kernel in rest.items() if kernel)]


def warnings(llm: LLM, measured: Measured) -> list[str]:
    """Say what makes the figures lower than they could be, or the limits doubtful: a line each."""
    from pymllm.kernels.limits import machine
    from pymllm.kernels.native.extension import native_missing_reason
    from pymllm.measuring.others import NOTEWORTHY

    plan, info, said = llm.plan, machine(), []
    slow = [layer for layer in plan.layers if layer.kernel == "reference"]
    if slow:
        said.append(
            f"slow: {_number(len(slow), 'layer')} ({', '.join(dict.fromkeys(layer.kind for layer in slow))}) ran on "
            "the reference kernel, which is there to be right, not fast; `pymllm plan MODEL --why` says why."
        )
    if plan.device == "cpu" and (reason := native_missing_reason()) is not None:
        said.append(f"slow: {reason}.")
    if measured.eager_reason is not None:
        said.append(f"slow: decoding steps were not recorded and replayed: {measured.eager_reason}.")
    if measured.other_cpus is not None and measured.other_cpus >= NOTEWORTHY:
        said.append(
            f"busy: other processes took {measured.other_cpus:.1f} of {info['logical_cpus']} CPUs meanwhile; an idle "
            "machine is faster."
        )
    elif measured.other_cpus is None and info["load_average"] is not None and plan.device == "cpu":
        said.append(f"busy? The load average of the last minute is {info['load_average']:.1f}.")
    cache = info["l3_bytes"] or info["l2_bytes"] or 0
    if plan.device == "cpu" and any(row.share is not None and row.share > 1 for row in measured.rows):
        held = f" (here {cache >> 20} MiB)" if cache else ""
        said.append(
            f"above 100 %: a part of the weights stayed in the caches{held}, or the probes of the memory were "
            "disturbed."
        )
    if llm.parallel.size > 1:
        said.append("no limits: the model is divided over ranks.")
    elif plan.strategy.get("name") != "autoregressive":
        said.append(
            f"no limits: the strategy {plan.strategy.get('name')} makes more or fewer tokens of a step than one."
        )
    return said
