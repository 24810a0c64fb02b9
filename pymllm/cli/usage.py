"""The parser of the command line, and what it says to wrong words: a line of usage, the error, the nearest word.

Its errors are short, as whoever misspells an option does not want forty lines to read; `--help` has them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from pymllm.errors import NEAREST, escaped, nearest


class Paragraphs(argparse.HelpFormatter):
    """A help page whose text before and after the options is wrapped, but for paragraphs with indented lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill, parts = super()._fill_text, text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in parts)


class Parser(argparse.ArgumentParser):
    """A parser, of verbs too, whose errors are three lines, with what does not print in a word escaped."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Paragraphs, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Print a line of usage, an error and where the help is, and exit with 2."""
        message = message.replace("ignored explicit argument", "takes no value, not")
        usage = self.format_usage()
        if usage.count("\n") > 1:
            usage = f"usage: {self.prog} {_words_of(self)}[options]\n"
        where = f"`{self.prog} --help` lists all options."
        self.exit(2, f"{usage}{self.prog}: error: {escaped(message, chr(10)).rstrip(' .')}.\n{where}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of the choices, with the nearest of them."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if not isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(
                action, f"expected {' or '.join(choices)}, not {value!r}. {hint(str(value), choices)}"
            )
        help_line = hint(str(value), choices)
        if not help_line and action.dest == "verb":
            help_line = (
                "A model's answer: pymllm run MODEL" if "/" in value else f"Verbs: {', '.join(choices)}"
            )
        what = "verb" if action.dest == "verb" else str(action.metavar)
        raise argparse.ArgumentError(None, f"there is no {what} {value!r}. {help_line}")


def hint(word: str, known: Iterable[str]) -> str:
    """Make a hint of the known words that begin with a word, or else are most like it; "" where none is."""
    known = list(known)
    begun = [name for name in known if len(word.strip("-")) > 1 and name.startswith(word)]
    return f"{NEAREST} {', '.join(begun[:3])}." if begun else nearest(word, known)


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """List what a parser takes and a help page shows: its words and options, without those of its own verbs."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction):
            yield action


def parsers_within(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return a parser's own verbs, or actions, by name; {} for one that has none."""
    found = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((dict(action.choices) for action in found), {})


def parser_of(name: str, summary: str, verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add a verb's parser, without its arguments."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, prog=f"pymllm {name}", help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    return verb


def add_verb_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    """Import a verb's file and add its arguments to the verb's parser."""
    # A file list.py would take the place of Python's own list in this package.
    module = importlib.import_module(f"pymllm.cli.{'list_models' if name == 'list' else name}")
    module.add_arguments(verb)
    verb.set_defaults(execute=module.execute, parser=verb)


def refuse_words(parser: argparse.ArgumentParser, words: list[str], others: Iterable[str]) -> NoReturn:
    """Say which words of the command line a verb does not know, and what may be meant; exit with 2.

    parser: the verb's.  others: the names of all verbs, one of which may have the option.
    """
    word = next((word for word in words if word.startswith("-")), words[0])
    if not word.startswith("-"):
        behind = f" behind {_words_of(parser).strip()}" if _words_of(parser) else ""
        parser.error(f"there is no place for {word!r}{behind}")
    name, own, owners = word.partition("=")[0], _spellings(parser), []
    for other in others:
        verb = Parser(prog=other)
        add_verb_arguments(verb, other)
        if name in _spellings(verb):
            owners.append(other)
    if owners:
        parser.error(f"there is no option {name}. {name} is an option of {', '.join(owners)}")
    parser.error(f"there is no option {name}. {hint(name, own)}")


def called_within(parser: argparse.ArgumentParser, argv: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of the verb, or of its action, that a command line calls; without one, `parser` itself."""
    for word in argv:
        parser = parsers_within(parser).get(word, parser)
    return parser


def unknown_options(parser: argparse.ArgumentParser, argv: Iterable[str]) -> list[str]:
    """List the options of a command line that a parser does not have."""
    own = _spellings(parser)
    return [word for word in argv if word.startswith("-") and word.partition("=")[0] not in own]


def _spellings(parser: argparse.ArgumentParser) -> list[str]:
    return [spelling for action in options_of(parser) for spelling in action.option_strings]


def _words_of(parser: argparse.ArgumentParser) -> str:
    """Return the words that a parser takes, as its usage has them, with a space behind each."""
    if parser.usage:
        shown = parser.usage.removeprefix(parser.prog).replace("[options]", "").strip()
        return f"{shown} " if shown else ""
    shown = "".join(
        f"{action.metavar or action.dest} " for action in options_of(parser) if not action.option_strings
    )
    return shown + next(
        (f"{a.metavar} " for a in parser._actions if isinstance(a, argparse._SubParsersAction)), ""
    )
