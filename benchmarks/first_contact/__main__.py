"""The command: which stages, how long, where to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .driver import ROOT, Settings, remove_leftovers, run
from .stages import GROUPS, Stage, chosen

LEAST_SECONDS = 20  # Python and torch alone take some to begin


def read_settings(arguments: Sequence[str] | None = None) -> tuple[list[tuple[Stage, ...]], Settings]:
    """Read the command line: the stages to run, and how.  Exits with status 2 where it is not understood."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.first_contact",
        description="Check the GPU kernels on a GPU, run models on it, and measure them, in one call.",
        allow_abbrev=False,
    )
    build = ROOT / "build"
    names = ", ".join(stage.name for group in GROUPS for stage in group)
    parser.add_argument(
        "--seconds", type=float, default=540.0, metavar="N", help="for everything; default: 540"
    )
    parser.add_argument("--stages", default="", metavar="'A B'", help=f"only these: {names}")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: in Triton's interpreter, tiny shapes"
    )
    parser.add_argument(
        "--out", type=Path, default=build / "first_contact", metavar="FOLDER", help="for the results"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=build / "first_contact.work",
        metavar="FOLDER",
        help="for what is large: models, which are removed, and compiled kernels, which are kept",
    )
    parser.add_argument(
        "--cpus", type=int, metavar="N", help="run as many processes as for N CPUs; default: all"
    )
    args = parser.parse_args(arguments)
    try:
        groups = chosen(args.stages.replace(",", " ").split())
    except ValueError as error:
        parser.error(str(error))
    if not args.seconds >= LEAST_SECONDS:
        parser.error(f"--seconds {args.seconds:g}: expected {LEAST_SECONDS} or more")
    if args.cpus is not None and args.cpus < 1:
        parser.error(f"--cpus {args.cpus}: expected 1 or more")
    out, work = args.out.resolve(), args.work.resolve()
    return groups, Settings(args.seconds, out, work, args.rehearse, args.cpus)


def main(arguments: Sequence[str] | None = None) -> int:
    groups, settings = read_settings(arguments)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        settings.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"a folder cannot be made: {error}: choose others with --out and --work", file=sys.stderr)
        return 2
    remove_leftovers(settings.work)
    return run(groups, settings)


if __name__ == "__main__":
    sys.exit(main())
