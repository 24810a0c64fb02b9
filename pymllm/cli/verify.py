"""`pymllm verify`: every layer's kernel against float64 over the checkpoint's own tensors, the worst first."""

from __future__ import annotations

import argparse
from pathlib import Path

from pymllm.cli.options import add_model_options, model_arguments, model_or_shipped, positive
from pymllm.cli.output import console, print_json, show
from pymllm.cli.table import Column, print_table
from pymllm.errors import counted

EXAMPLES = """The exit code is 1 if a layer's error is larger than its kernel's rounding explains.

examples:
  pymllm verify ./model
  pymllm verify ./model --quant '**.mlp.**=fp8' --text FILE
  pymllm verify ./model --text FILE --compare '' '**.mlp.**=fp8' '**.mlp.**=int4; **.self_attn.**=int8'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm verify [MODEL] [options]", EXAMPLES
    add_model_options(parser)
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="show N layers, the worst first; default: 10"
    )
    group = parser.add_argument_group("the whole model")
    group.add_argument(
        "--end-to-end",
        action="store_true",
        help="also compare next-token distributions with those of the weights in float32, on random token ids; both "
        "read the files in the same way, so that an error of reading does not show",
    )
    group.add_argument("--text", type=Path, metavar="FILE", help="the same on this text, with its perplexity")
    group.add_argument(
        "--tokens", type=positive, default=2048, metavar="N", help="tokens of the text; default: 2048"
    )
    group.add_argument(
        "--window",
        type=positive,
        default=512,
        metavar="N",
        help="tokens of the text that run together; default: 512",
    )
    group.add_argument(
        "--compare",
        nargs="+",
        metavar="RULES",
        help="sets of rules to compare by bytes, errors and answers; rules of a set are separated by ';' or stand in "
        "@FILE, and '' is the model as it is stored",
    )
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="with --compare: draw what answers lose against bytes, as SVG",
    )
    parser.add_argument("--json", action="store_true", help="all of it as JSON (docs/verify-schema.md)")


def execute(args: argparse.Namespace) -> int:
    if args.top < 1:
        args.parser.error("--top must be at least 1")
    if args.plot and not args.compare:
        args.parser.error("--plot draws what --compare finds; give --compare too")
    if args.compare:
        return _compare(args)
    from pymllm.checking.verify import LEGEND, TITLES, verify
    from pymllm.parallel import choose_parallel

    with choose_parallel(args.tensor_parallel_size, args.expert_parallel, device=args.device):
        verification = verify(
            model_or_shipped(args.model),
            **model_arguments(args),
            check_memory=args.check_memory,
            end_to_end=args.end_to_end,
            text=args.text,
            tokens=args.tokens,
            window=args.window,
        )
    if args.json:
        print_json(verification.to_dict())
    else:
        _print_rows(TITLES, verification.rows(args.top), " ".join(LEGEND))
        failed = sum(not layer.ok for layer in verification.layers)
        verdict = f"{failed} FAIL" if failed else "all within what rounding explains"
        checked = counted(len(verification.layers), "layer")
        console().print(f"{verification.model}: {checked} against float64, {verdict}")
        if verification.end_to_end is not None:
            console().print("\n".join(verification.end_to_end.lines()))
    return 0 if verification.ok else 1


def _print_rows(titles: list[str], rows: list[list[str]], legend: str) -> None:
    """Print a table whose last column is text, and what its titles mean."""
    out = console()
    columns = [Column(title, numeric=True) for title in titles[:-1]] + [Column(titles[-1], name=True)]
    print_table(columns, rows, out)
    out.print(legend, style="dim")


def _compare(args: argparse.Namespace) -> int:
    arguments = model_arguments(args)
    if arguments.pop("quant"):
        args.parser.error("--compare takes rules of its own; leave --quant out")
    if args.tensor_parallel_size > 1:
        args.parser.error("--compare runs in one process")
    from pymllm.checking.compare import LAYER_LEGEND, compare
    from pymllm.checking.figures import require_matplotlib

    if args.plot:
        require_matplotlib()
    found = compare(
        model_or_shipped(args.model),
        args.compare,
        text=args.text,
        tokens=args.tokens,
        window=args.window,
        **arguments,
    )
    if args.plot:
        found.save_plot(args.plot)
    if args.json:
        print_json(found.to_dict())
    else:
        _print_rows(found.titles, found.rows(), found.legend)
        show("")
        _print_rows(found.layer_titles(), found.layer_rows(args.top), LAYER_LEGEND)
        if args.plot:
            show(f"\n{args.plot}: the same as a picture")
    return 0 if found.ok else 1
