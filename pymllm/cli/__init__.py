"""The command line: one file a verb, imported when that verb is called, so that `pymllm --help` is quick.

A verb's file has `add_arguments(parser)` and `execute(args) -> int`. Its result goes to stdout, all else to stderr.
Exit codes: 0, 1 for an error or a check that fails, 2 for wrong usage, 130 for Ctrl+C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "run": "generate text",
    "plan": "show which method and kernel every layer gets, and why, without loading",
    "verify": "check every layer's kernel against float64",
    "quantize": "write a quantised checkpoint that other programs read too",
    "serve": "answer OpenAI-style requests over HTTP",
    "bench": "build, tune and measure kernels",
    "doctor": "show what this machine and this installation can do",
}
BROKEN_PIPE = 141  # what a shell shows for a process that SIGPIPE ended
CANNOT_WRITE = (errno.ENOSPC, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  argv: without the program's name; None: the process's own.  Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        args = _parser(argv).parse_args(argv)
        return _execute(args)
    except SystemExit as stop:  # argparse: 2 after a usage error, 0 after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno not in CANNOT_WRITE:
            raise
        # The interpreter's last flush must not fail on the same file again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read us is gone
            return BROKEN_PIPE
        print(f"error: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Knows all verbs, but the arguments of the called one alone."""
    import pymllm

    parser = argparse.ArgumentParser(
        prog="pymllm",
        description="Run a language model, every weight through the method that fits it.",
        epilog="`pymllm VERB --help` explains a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pymllm {pymllm.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name == called:
            module = importlib.import_module(f"pymllm.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(execute=module.execute, parser=verb)
    return parser


def _execute(args: argparse.Namespace) -> int:
    from pymllm.cli.output import first_rank_only, rank, start_logging
    from pymllm.errors import PymllmError

    start_logging(args.verbose)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that cannot show a character still gets the rest
    try:
        with first_rank_only():
            code: int = args.execute(args)
            sys.stdout.flush()
        return code
    except PymllmError as error:
        sys.stdout.flush()
        where = f" (rank {rank()})" if rank() else ""
        if error.brief is None or args.verbose or getattr(args, "json", False):
            print(f"error{where}: {error}", file=sys.stderr)
        else:
            print(f"error{where}: {error.shortened()} --verbose lists all of them.", file=sys.stderr)
        return 1
