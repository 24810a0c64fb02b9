"""`pymllm plan`: which method and kernel every layer gets, and why, from config and headers alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import (
    add_cache_options,
    add_model_options,
    cache_arguments,
    model_arguments,
    model_or_shipped,
)
from pymllm.cli.output import console, print_json, readable_size
from pymllm.cli.table import Column, print_table
from pymllm.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pymllm.planning.difference import PlanDifference
    from pymllm.planning.plan import Plan, PlannedLayer


EXAMPLES = """A plan reads only config.json and the headers of the weight files, so that it takes about a second for any
model.

examples:
  pymllm plan org/name
  pymllm plan ./model --quant '**.mlp.**=fp8' --quant 'lm_head=none' --why
  pymllm plan ./model --device cuda:sm90     what a machine with such a GPU would do
  pymllm plan ./model --json > before.json
  pymllm plan ./model --compute exact --diff before.json"""

# How many lines of refused kernels are shown without --why.
MOST_OFFERS = 2
COUNT, SIZE, NAMES = Column("#", numeric=True), Column("size", numeric=True), Column("layers", name=True)
KIND, METHOD, KERNEL, WHY = Column("kind"), Column("method"), Column("kernel"), Column("decided by")
GROUPS = (COUNT, NAMES, KIND, METHOD, KERNEL, SIZE, WHY)
SHAPES = Column("shape", numeric=True), Column("on this rank", numeric=True)
LAYERS = (Column("layer", name=True), KIND, *SHAPES, METHOD, KERNEL, SIZE, WHY)
DIFFERENCE = (COUNT, NAMES, METHOD, KERNEL, SIZE)
# What of a layer may change beside its method, kernel and size, and what to call it.
FURTHER = {
    "numerics": "computes with",
    "rounds_activations": "rounds inputs to fewer bits",
    "rule": "rule",
    "source": "decided by",
    "kind": "kind",
    "shape": "shape",
    "shape_local": "shape on this rank",
    "fused_with": "in one product with",
    "tied_to": "tied to",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm plan [MODEL] [options]", EXAMPLES
    add_model_options(parser)
    add_cache_options(parser)
    parser.add_argument(
        "--rank",
        type=int,
        default=0,
        metavar="R",
        help="the rank of --tensor-parallel-size whose share to show; default: 0",
    )
    parser.add_argument("--all", action="store_true", help="every layer on a line of its own")
    parser.add_argument(
        "--why", action="store_true", help="also every kernel that was not chosen, and the reason"
    )
    parser.add_argument(
        "--diff", type=Path, metavar="OTHER.json", help="what would change against a plan saved with --json"
    )
    parser.add_argument("--json", action="store_true", help="the whole plan as JSON (docs/plan-schema.md)")


def execute(args: argparse.Namespace) -> int:
    from pymllm.parallel import Parallel
    from pymllm.planning.make_plan import plan

    saved = None
    if args.diff:
        from pymllm.planning.difference import compare_plans, read_plan

        saved = read_plan(args.diff)
    # A plan needs no other process, so a machine of any size can show the share of any rank.
    with Parallel(args.rank, args.tensor_parallel_size, expert_parallel=args.expert_parallel):
        planned = plan(model_or_shipped(args.model), **model_arguments(args), **cache_arguments(args))
    if saved is not None:
        difference = compare_plans(saved, planned)
        if args.json:
            print_json(difference.to_dict())
        else:
            print_difference(difference, console())
    elif args.json:
        print_json(planned.to_dict())
    else:
        print_plan(planned, console(), every_layer=args.all, why=args.why)
    return 0


def print_plan(
    plan: Plan, out: Console, *, every_layer: bool = False, reasons: bool = True, why: bool = False
) -> None:
    """Print the plan as a table, its totals and notes below.

    reasons: also print what kernels compute with, and the refused kernels that matter.  why: print all refused kernels.
    """
    size = plan.tensor_parallel
    ranks = f", rank {size['rank']} of {size['size']}" if size["size"] > 1 else ""
    out.print(f"{plan.model}", style="bold")
    out.print(f"{plan.what_runs} on {plan.where}{ranks}")
    out.print(plan.describe_numbers())
    print_table(*(_layer_table(plan.layers) if every_layer else _group_table(plan)), out)
    totals = plan.totals
    weights, peak = readable_size(totals["weight_bytes"]), readable_size(totals["peak_load_bytes"])
    out.print(
        f"weights {weights}, at most {peak} while loading, "
        f"{plan.describe_rates()}; "
        f"tensor-parallel sizes that work: {', '.join(map(str, size['legal_sizes']))}"
    )
    out.print(plan.describe_cache())
    if reasons:
        _print_ranks(size, out)
        for rule in plan.rules:
            if rule["decides"] < rule["matches"]:
                out.print(
                    f"rule {rule['rule']} decides {rule['decides']} of the "
                    f"{counted(rule['matches'], 'layer')} it names, "
                    f"the others go to {', '.join(rule['shadowed_by'])}",
                    style="yellow",
                )
    if reasons:
        for kind, kernel, numerics in dict.fromkeys((x.kind, x.kernel, x.numerics) for x in plan.layers):
            out.print(f"{kernel} ({kind}) computes with: {numerics}", style="dim")
        for line in refusal_lines(plan, every=why):
            out.print(line, style="dim")
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow")


def _print_ranks(sizes: Mapping[str, Any], out: Console) -> None:
    """Print what a rank would hold for each tensor-parallel size that works, and why other sizes do not."""
    if len(sizes["legal_sizes"]) > 1:
        each = ", ".join(
            f"{size}: {readable_size(nbytes)}" for size, nbytes in sizes["weight_bytes_by_size"].items()
        )
        out.print(f"weights a rank, by tensor-parallel size: {each}", style="dim")
    for size, why in sizes["refused_sizes"].items():
        out.print(f"not {counted(size, 'rank')}: {why}", style="dim")


def print_difference(difference: PlanDifference, out: Console) -> None:
    """Print what changes from the saved plan to this one: settings, alike layers on one line, totals."""
    if difference.empty:
        out.print("nothing would change")
        return
    for name, (before, after) in (difference.settings | difference.further).items():
        out.print(f"{name}: {_plain(before)} -> {_plain(after)}")
    if difference.changed:
        rows, further = [], []
        for first, names, old, new in difference.groups():
            pattern = common_pattern(names)
            method, kernel = (
                _arrow(first.before.get(key), first.after.get(key)) for key in ("method_detail", "kernel")
            )
            rows.append([str(len(names)), pattern, method, kernel, _arrow(_sizes(old), _sizes(new))])
            changes = [
                f"{title}: {_plain(first.before[key])} -> {_plain(first.after[key])}"
                for key, title in FURTHER.items()
                if key in first.after and first.before.get(key) != first.after[key]
            ]
            if changes:
                further.append(f"{counted(len(names), 'layer')}, {pattern}: {'; '.join(changes)}")
        print_table(DIFFERENCE, rows, out)
        for line in further:
            out.print(line)
    for sign, names in (
        ("only in this plan", difference.added),
        ("only in the saved one", difference.removed),
    ):
        if names:
            out.print(f"{counted(len(names), 'layer')} {sign}: {common_pattern(names)}")
    for name, (before, after) in difference.totals.items():
        out.print(
            f"{name}: {readable_size(before)} -> {readable_size(after)} ({readable_change(after - before)})"
        )
    for sign, notes in zip(("saved plan", "this plan"), difference.notes, strict=True):
        for note in notes:
            out.print(f"note, only in {'the ' if sign == 'saved plan' else ''}{sign}: {note}", style="yellow")


def readable_change(nbytes: int) -> str:
    return f"{'-' if nbytes < 0 else '+'}{readable_size(abs(nbytes))}"


def _arrow(before: Any, after: Any) -> str:
    return str(after) if before == after else f"{before} -> {after}"


def _sizes(sums: Mapping[str, int]) -> str:
    """Write the size of some alike layers: of their weights, or for each token or request."""
    for key, unit in (("kv_bytes_per_token", "token"), ("state_bytes", "request")):
        if sums[key]:
            return f"{sums[key]} B/{unit}"
    return readable_size(sums["bytes"])


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _group_table(plan: Plan) -> tuple[Sequence[Column], list[list[str]]]:
    """Make a table with alike layers on one line: its columns and rows."""
    rows = []
    by_prefix = {layer.prefix: layer for layer in plan.layers}
    for first, names in plan.groups():
        size = sum(_memory(by_prefix[name]) for name in names)
        cells = [first.kind, first.method_detail, first.kernel, _size(first, size), _why(first)]
        rows.append([str(len(names)), common_pattern(names), *cells])
    return GROUPS, rows


def _layer_table(layers: list[PlannedLayer]) -> tuple[Sequence[Column], list[list[str]]]:
    rows = []
    for layer in layers:
        shape, local = ("×".join(map(str, sides)) for sides in (layer.shape, layer.shape_local))
        method = [layer.method_detail, layer.kernel, _size(layer, _memory(layer)), _why(layer)]
        rows.append([layer.prefix, layer.kind, shape, local, *method])
    return LAYERS, rows


def _memory(layer: PlannedLayer) -> int:
    return layer.bytes or layer.kv_bytes_per_token or layer.state_bytes


def _size(layer: PlannedLayer, nbytes: int) -> str:
    if layer.kind in ("attention", "recurrence"):
        return f"{nbytes} B/{'token' if layer.kind == 'attention' else 'request'}"
    return "shared" if layer.tied_to else readable_size(nbytes) if nbytes else "–"


def _why(layer: PlannedLayer) -> str:
    if layer.rule:
        return f"rule {layer.rule}"
    return (
        f"tied to {layer.tied_to}"
        if layer.tied_to
        else layer.source.replace("quantization_config", "checkpoint")
    )


@dataclass(frozen=True)
class _Refused:
    """One kernel's alike refusals.  layers: of how many layers; nbytes: how much their weights take."""

    kernel: str
    kind: str
    why: str
    cause: str
    fix: str
    layers: int
    nbytes: int

    @property
    def named(self) -> str:
        return f"{self.kernel} ({self.layers} x {self.kind})"


def refusal_lines(plan: Plan, *, every: bool) -> list[str]:
    """Describe the kernels that were asked before the chosen ones, and refused.

    Kernels that another setting, or an installation, would allow come first: only those of the largest weights, unless
    `every`. Kernels for other devices take one line in any case.
    """
    refused = _refused(plan)
    offers: dict[str, list[str]] = {}
    for r in sorted(refused, key=lambda r: -r.nbytes):
        if r.cause in ("setting", "installation"):
            offers.setdefault(f"{r.why}; {r.fix} would allow it" if r.fix else r.why, []).append(r.named)
    lines = [f"not chosen: {', '.join(named)}: {why}" for why, named in offers.items()]
    elsewhere = [r for r in refused if r.cause == "device"]
    if every:
        lines += [f"not chosen: {r.named}: {r.why}" for r in refused if r.cause == "layer"]
        if elsewhere:
            lines.append(
                f"not chosen, as they are for other devices: {', '.join(r.named for r in elsewhere)}"
            )
        return lines
    lines = lines[:MOST_OFFERS]
    more = len(refused) - sum(map(len, list(offers.values())[:MOST_OFFERS]))
    if more:
        devices = f", {len(elsewhere)} of them by kernels for other devices" if elsewhere else ""
        lines.append(f"{counted(more, 'more refusal')}{devices}: see --why")
    return lines


def _refused(plan: Plan) -> list[_Refused]:
    """Gather the refusals that are alike for several layers, in the order of the plan."""
    layers: dict[tuple[str, str, str, str, str], list[PlannedLayer]] = {}
    for layer in plan.layers:
        for refusal in layer.refused:
            key = (refusal["kernel"], layer.kind, refusal["why"], refusal["cause"], refusal["fix"])
            layers.setdefault(key, []).append(layer)
    return [_Refused(*key, len(alike), sum(x.bytes for x in alike)) for key, alike in layers.items()]


def common_pattern(names: list[str]) -> str:
    """Find the narrowest pattern that covers these names, such as model.layers.*.mlp.*; it may cover others too."""
    patterns = (
        list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
        if len(names) > 1
        else names
    )
    segments = [pattern.split(".") for pattern in patterns]
    same = 0
    while all(len(s) > same and s[same] == segments[0][same] for s in segments):
        same += 1
    if len(patterns) == 1:
        return patterns[0]
    tail = "*" if all(len(s) == same + 1 for s in segments) else "**"
    return ".".join([*segments[0][:same], tail])
