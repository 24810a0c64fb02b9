"""The command line: one file for each verb, imported when the verb is called, so that `pymllm --help` is quick.

A verb's file has `add_arguments(parser)` and `execute(args) -> int`. A verb writes its result to stdout and all else to
stderr. Exit codes: 0; 1 for an error or a check that fails; 2 for wrong usage; 130 for Ctrl+C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

VERBS = {
    "run": "generate text",
    "chat": "talk with a model in this terminal",
    "plan": "show which method and kernel every layer gets, and why, without loading",
    "verify": "check what every layer's kernel computes against float64",
    "quantize": "write a quantised checkpoint that other programs read too",
    "search": "find the rules that harm a model least within so many bits a weight",
    "serve": "answer OpenAI-style requests over HTTP",
    "batch": "answer a file of OpenAI-style requests into another",
    "bench": "measure prefill and decode, beside the limits of the machine",
    "doctor": "show what this machine and this installation can do",
    "kernels": "build, tune and measure kernels (for those who work on them)",
}
FIRST_STEPS = """first steps:
  pymllm run --demo              the small model that comes along answers
  pymllm doctor                  what this machine can run, and what is missing
  pymllm plan MODEL              a folder or hub id: each layer's method and kernel
  pymllm run MODEL "a prompt"    without MODEL: the small one

`pymllm VERB --help` explains a verb."""

# The exit code that a shell shows for a process that SIGPIPE ended.
BROKEN_PIPE = 141

# Errors of a file that cannot take more.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _Paragraphs(argparse.HelpFormatter):
    """A help page whose text before and after the options is wrapped, but for paragraphs with indented lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill, parts = super()._fill_text, text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in parts)


class _Parser(argparse.ArgumentParser):
    """A parser, of verbs too, whose errors show what does not print in a word escaped."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit with 2."""
        shown = (
            letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message
        )
        super().error("".join(shown))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  argv: without the program's name; None: the process's own.  Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        # Whoever started this process may have closed it.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        parser = _parser(argv)
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = _parse(parser, argv)
        args.argv = argv
        return _execute(args)
    except SystemExit as stop:
        # argparse exits with 2 after a usage error, with 0 after --help.
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno not in CANNOT_WRITE:
            raise
        # The interpreter's last flush must not fail on the same file again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of the output has gone.
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"error: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Make the parser: it knows all verbs, but only the arguments of the one that is called."""
    import pymllm

    parser = _Parser(
        prog="pymllm",
        description="Run a language model, every weight through the method that fits it.",
        epilog=FIRST_STEPS,
        formatter_class=_Paragraphs,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pymllm {pymllm.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=_Paragraphs,
            allow_abbrev=False,
        )
        if name == called:
            module = importlib.import_module(f"pymllm.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(execute=module.execute, parser=verb)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the command line, with words anywhere among the options: argparse leaves words behind an option over."""
    args, left = parser.parse_known_args(argv)
    words = getattr(args, "words", None)
    if left and words is not None and not any(word.startswith("-") for word in left):
        args.words, left = [*words, *left], []
    if left:
        # The verb's own parser prints the verb's usage with the error.
        args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _execute(args: argparse.Namespace) -> int:
    from pymllm.cli.output import first_rank_only, rank, start_logging
    from pymllm.errors import PymllmError

    start_logging(args.verbose)
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that cannot show a character still gets the rest.
        sys.stdout.reconfigure(errors="replace")
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
