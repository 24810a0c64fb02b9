"""`pymllm search`: the rules that harm a model least within so many bits a weight."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pymllm.cli.options import add_common_options, positive
from pymllm.cli.output import print_json, say, show

if TYPE_CHECKING:
    from pymllm.searching.result import SearchResult

EXAMPLES = """Rules go to stdout, or to --out FILE; every verb reads them with --quant-file FILE. Measurements are
kept: the same command goes on where it was stopped, and another budget needs few more. docs/searching.md has the rest.

examples:
  pymllm search org/name --bits 4.5 --out rules.txt
  pymllm search org/name --bits 4.5 --methods int4:group_size=64,int8,stored
  pymllm search org/name --bits 5 --format compressed-tensors --out rules.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm search MODEL --bits N [options]", EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or a hub id org/name")
    parser.add_argument("--bits", type=float, required=True, metavar="N", help="bits a weight, at most")
    group = parser.add_argument_group("what to choose from")
    group.add_argument(
        "--methods",
        action="append",
        metavar="METHOD,...",
        help="methods as in rules, e.g. int4:group_size=64,int8,none; stored leaves a weight as it is; repeatable",
    )
    group.add_argument(
        "--free-parts",
        action="store_true",
        help="let parts that run in one product (q, k and v) have different methods: they then run one by one",
    )
    group.add_argument(
        "--format",
        metavar="FORMAT",
        help="choose only what `pymllm quantize --format FORMAT` can write",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group = parser.add_argument_group("the text")
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="to estimate on; default: a text that comes with pymllm"
    )
    group.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="to measure on; default: parts of the text that are not estimated on",
    )
    group.add_argument(
        "--tokens", type=positive, default=2048, metavar="N", help="to estimate on; default: 2048"
    )
    group.add_argument(
        "--held-out-tokens", type=positive, default=1024, metavar="N", help="to measure on; default: 1024"
    )
    group.add_argument(
        "--window", type=positive, default=256, metavar="N", help="tokens that run together; default: 256"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the labels drawn; default: 0")
    group = parser.add_argument_group("the output")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the rules there")
    group.add_argument("--plot", type=Path, metavar="FILE", help="plot bytes against KL, as SVG or PNG")
    group.add_argument("--no-curve", action="store_true", help="measure the rules alone: quicker")
    group.add_argument("--json", action="store_true", help="everything as JSON (docs/searching.md)")
    group.add_argument(
        "--journal", type=Path, metavar="FILE", help="where measurements are kept; default: below ~/.cache"
    )
    group.add_argument("--restart", action="store_true", help="throw earlier measurements away")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    from pymllm.searching.result import write_text

    if args.plot is not None:
        from pymllm.checking.figures import require_matplotlib

        require_matplotlib()
    try:
        result = _search(args)
    except KeyboardInterrupt:
        say("\nStopped. What was measured is kept: the same command goes on from there.")
        return 130
    if args.out is not None:
        write_text(args.out, result.rules_file)
    if args.plot is not None:
        result.save_plot(args.plot)
    if args.json:
        print_json(result.to_dict())
    elif args.out is not None:
        show(str(result))
    else:
        say(str(result))
        print(result.rules_file, end="")
    return 0


def _search(args: argparse.Namespace) -> SearchResult:
    from pymllm.searching.search import search_rules

    return search_rules(
        args.model,
        args.bits,
        text=args.text,
        held_out=args.held_out,
        methods=args.methods,
        tokens=args.tokens,
        held_out_tokens=args.held_out_tokens,
        window=args.window,
        keep_fused=not args.free_parts,
        format=args.format,
        curve=not args.no_curve,
        seed=args.seed,
        journal=args.journal,
        restart=args.restart,
        revision=args.revision,
    )
