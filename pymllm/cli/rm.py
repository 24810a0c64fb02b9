"""`pymllm rm`: remove models from the hub's cache, once the user agrees."""

from __future__ import annotations

import argparse
import sys

from pymllm.cli.options import add_common_options
from pymllm.cli.output import readable_size, say, show

EPILOG = """examples:
  pymllm rm org/name
  pymllm rm org/name-GGUF:Q4_K_M --yes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="as `pymllm list` shows it: org/name with all its revisions, or one GGUF model org/name:TAG",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask; needed without a terminal")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    from pymllm.weights.hub_cache import plan_removal

    removal = plan_removal(args.names)
    what = f"{', '.join(removal.names)} ({readable_size(removal.size)})"
    if not args.yes:
        if not sys.stdin.isatty():
            args.parser.error(f"this would remove {what}: say so with --yes")
        print(f"Remove {what}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("Nothing is removed.")
            return 1
    removal.execute()
    show(f"removed {what}")
    return 0
