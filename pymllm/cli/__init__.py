"""The command line: one file for each verb, imported when the verb is called, so that `pymllm --help` is quick.

A verb's file has `add_arguments(parser)` and `execute(args) -> int`. A verb writes its result to stdout and all else to
stderr; EXIT_CODES says how it ends.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from pymllm.cli.options import add_common_options
from pymllm.cli.usage import (
    Parser,
    add_verb_arguments,
    called_within,
    parser_of,
    parsers_within,
    refuse_words,
    unknown_options,
)

VERBS = {
    "run": "generate text",
    "chat": "talk with a model in this terminal",
    "plan": "show which method and kernel every layer gets, and why, without loading",
    "verify": "check what every layer's kernel computes against float64",
    "quantize": "write a quantised checkpoint that other programs read too",
    "search": "find the rules that harm a model least within so many bits a weight",
    "serve": "answer OpenAI-style requests over HTTP",
    "batch": "answer a file of OpenAI-style requests into another",
    "pack": "keep a model's packed weights, so that its next start is quick",
    "bench": "measure prefill and decode, beside the limits of the machine",
    "list": "list the models in the hub's cache",
    "rm": "remove models from the hub's cache",
    "doctor": "show what this machine and this installation can do",
    "kernels": "build, tune and measure kernels (for those who work on them)",
    "completion": "print what lets a shell complete pymllm's words on Tab",
}
FIRST_STEPS = """first steps:
  pymllm run --demo              the small model that comes along answers
  pymllm doctor                  what this machine can run, and what is missing
  pymllm plan MODEL              a folder or hub id: each layer's method and kernel
  pymllm run MODEL "a prompt"    without MODEL: the small one

`pymllm VERB --help` explains a verb. docs/cli.md has all of them on one page."""

# A server that SIGTERM, or whoever started it, asks to stop finishes its requests: that is 0, and 143 before it serves.
EXIT_CODES = {
    0: "done",
    1: "an error, or a check that has failed (verify, doctor, a line of batch)",
    2: "wrong usage",
    130: "ended by Ctrl+C (SIGINT)",
    141: "the reader of the output has gone (as SIGPIPE)",
    143: "ended by SIGTERM; 0 for a server, which finishes its requests",
}
USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

# Errors of a file that cannot take more.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
            return USAGE
        args = _parse(parser, argv)
        args.argv = argv
        return _execute(args)
    except SystemExit as stop:
        # argparse exits with 2 after a usage error, with 0 after --help.
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
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
    parser = Parser(
        prog="pymllm",
        usage="pymllm VERB [options]",
        description="Run a language model, every weight through the method that fits it.",
        epilog=f"{FIRST_STEPS}\n\n{_exit_code_lines()}",
    )
    parser.add_argument("--version", action=_Version, help="print the versions of pymllm and what it runs on")
    add_common_options(parser, everywhere=True)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = parser_of(name, summary, verbs)
        if name == called:
            add_verb_arguments(verb, name)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Make the parser with the arguments of every verb, for pages and completions."""
    parser = _parser([])
    for name, verb in parsers_within(parser).items():
        add_verb_arguments(verb, name)
    return parser


def _exit_code_lines() -> str:
    return "exit codes:" + "".join(f"\n  {code:<3}  {meaning}" for code, meaning in EXIT_CODES.items())


class _Version(argparse.Action):
    """The option --version, whose text is only made when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=settings["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print the versions, on one line, and exit."""
        print(versions())
        parser.exit()


def versions() -> str:
    """Say which pymllm this is, and what it runs on, without importing any of it."""
    import pymllm

    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch"
    native = "native kernels" if find_spec("pymllm._native") else "no native kernels"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"pymllm {pymllm.__version__} (Python {python}, {torch}, {native})"


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the command line, with words anywhere among the options: argparse leaves words behind an option over."""
    if all(word.startswith("-") for word in argv) and (unknown := unknown_options(parser, argv)):
        refuse_words(parser, unknown, VERBS)
    args, left = parser.parse_known_args(argv)
    words = getattr(args, "words", None)
    if left and words is not None and not any(word.startswith("-") for word in left):
        args.words, left = [*words, *left], []
    if left:
        # The verb's own parser prints the verb's usage with the error.
        refuse_words(called_within(parser, argv), left, VERBS)
    return args


def _execute(args: argparse.Namespace) -> int:
    from pymllm.cli.output import first_rank_only, rank, start_output
    from pymllm.errors import PymllmError

    start_output(args.verbose, args.quiet)
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
