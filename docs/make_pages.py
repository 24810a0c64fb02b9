"""Write what docs/cli.md and docs/api.md say of options and arguments, from the parsers and docstrings themselves.

    python docs/make_pages.py

Between `<!-- made: NAME -->` and `<!-- end -->` a page has what NAME, a part below, makes; all else is written by hand.
tests/test_made_pages.py fails where a page is older than what it describes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PART = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
# A list of names before a colon, where a line, a sentence or a parenthesis begins, as in tests/test_public_names.py.
NAMED = re.compile(r"(?:^|(?<=  )|(?<=\())(\w+(?:,\s+\w+)*):(?=\s)", re.MULTILINE)


def make(page: str) -> str:
    """Return a page's text with the parts that are made as they should be."""
    return PART.sub(lambda found: f"{found[1]}{_part(found[2])}{found[3]}", page)


def _part(name: str) -> str:
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "verbs": _verbs,
        "exit codes": _exit_codes,
        "errors": _errors,
    }
    lines = makers[name]() if name in makers else _described(*name.split())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"\n{text}\n\n"


# The command line


def _verbs() -> Iterator[str]:
    from pymllm.cli import whole_parser
    from pymllm.cli.usage import parsers_within

    parser = whole_parser()
    yield from _options("pymllm", parser)
    for name, verb in parsers_within(parser).items():
        yield from _verb(f"pymllm {name}", verb)


def _verb(title: str, verb: argparse.ArgumentParser) -> Iterator[str]:
    from pymllm.cli.usage import parsers_within

    yield from ("", f"## {title}", "", verb.description or "", "")
    if verb.usage:
        yield from ("```text", verb.usage, "```", "")
    yield from _options(title, verb)
    if verb.epilog:
        prose, _, examples = verb.epilog.partition("examples:\n")
        examples, _, behind = examples.partition("\n\n")
        if "\n  " not in prose:
            yield from ("", " ".join(prose.split()))
        else:
            yield from ("", "```text", prose.strip(), "```")
        if examples:
            commands = re.sub(r"(?<=\S) {3,}(?=\S)", "    # ", textwrap.dedent(examples))
            yield from ("", "<!-- not run: examples of the help -->", "```sh", commands, "```")
        if behind:
            yield from ("", " ".join(behind.split()))
    for name, action in parsers_within(verb).items():
        yield from _verb(f"{title} {name}", action)


def _options(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    from pymllm.cli.usage import options_of

    rows = [_row(action) for action in options_of(parser) if action.dest not in ("help", "verbose", "quiet")]
    if title == "pymllm":
        rows = [_row(action) for action in options_of(parser) if action.dest != "help"]
    if rows:
        yield from ("| argument | default | |", "| --- | --- | --- |", *rows)


def _row(action: argparse.Action) -> str:
    value = action.metavar or (
        f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    )
    value = value if isinstance(value, str) else " ".join(value)
    takes = "" if action.nargs == 0 else f" {value}"
    named = ", ".join(f"`{spelling}{takes}`" for spelling in action.option_strings) or f"`{value}`"
    meaning = (action.help or "").replace("%%", "%")
    # The help says it where there is more to say than the parser's value.
    meaning, _, default = re.sub(r"(; |^)default: ", "\0", meaning).partition("\0")
    if not default and action.nargs == 0:
        default = "" if action.dest == "version" else "off"
    elif not default and action.default not in (None, [], argparse.SUPPRESS):
        default = f"`{action.default}`"
    cells = (named, default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _exit_codes() -> Iterator[str]:
    from pymllm.cli import EXIT_CODES

    yield from (
        "| code | |",
        "| --- | --- |",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
    )


# The Python API


def _described(path: str, *members: str) -> Iterator[str]:
    """Describe a class or function, "pymllm.LLM" say, and its public methods: those named, or else all of its own."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    yield from _one(name, value)
    if inspect.isclass(value):
        for member, held in _members(value):
            if not members or member in members:
                yield from _one(f"{name}.{member}", held)


def _members(value: type) -> Iterator[tuple[str, Any]]:
    """List the methods and properties of a class, and of its bases of ours, that have a docstring."""
    seen = set()
    for home in value.__mro__:
        if home.__module__.startswith("pymllm."):
            for member, held in vars(home).items():
                held = held.__func__ if isinstance(held, (classmethod, staticmethod)) else held
                described = (
                    isinstance(held, property) or inspect.isfunction(held) or hasattr(held, "attrname")
                )
                if described and not member.startswith("_") and member not in seen and inspect.getdoc(held):
                    seen.add(member)
                    yield member, held


def _one(name: str, value: Any) -> Iterator[str]:
    parameters = {} if isinstance(value, property) or hasattr(value, "attrname") else _parameters(value)
    shown = [part for key, parameter in parameters.items() if (part := _short(key, parameter))]
    named = [
        key for key, one in parameters.items() if getattr(one, "kind", None) is inspect.Parameter.KEYWORD_ONLY
    ]
    if named and not dataclasses.is_dataclass(value):
        shown.insert(shown.index(named[0]), "*")
    call = f"({', '.join(shown)})" if callable(value) else ""
    yield from ("", f"### `{name}{call}`", "")
    yield from _text(inspect.getdoc(value) or "", parameters)


def _parameters(value: Any) -> dict[str, Any]:
    """Return what a docstring may explain: the arguments of a function, those of its options, the fields of a class."""
    found: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        found = {field.name: str(field.type) for field in dataclasses.fields(value) if field.name[0] != "_"}
    for name, parameter in inspect.signature(value).parameters.items():
        if "Unpack" in str(parameter.annotation):
            from pymllm.loading.options import LoadOptions

            found["**options"] = None
            found |= {
                key: getattr(kind, "__forward_arg__", kind)
                for key, kind in LoadOptions.__annotations__.items()
            }
        elif name != "self" and not name.startswith("_"):
            found[name] = parameter
    return found


def _short(name: str, parameter: Any) -> str:
    """Return an argument as the heading has it: its name alone."""
    if name == "**options":
        return name
    if not isinstance(parameter, inspect.Parameter):
        return ""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    return f"{stars}{name}"


def _long(name: str, parameter: Any) -> str:
    """Return an argument with its type, and its default."""
    if not isinstance(parameter, inspect.Parameter):
        return f"`{name}: {parameter}`" if parameter else f"`{name}`"
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    plain = parameter.default is parameter.empty or "<" in repr(parameter.default)
    return f"`{name}{kind}{'' if plain else f' = {parameter.default!r}'}`"


def _text(docstring: str, parameters: dict[str, Any]) -> Iterator[str]:
    """Turn a docstring into paragraphs, code, and a list of arguments."""
    for paragraph in docstring.split("\n\n"):
        if re.match(r"(    )?(\w+ = |async with |with |for |print|pymllm\.|import )\S", paragraph):
            yield from ("```python", textwrap.dedent(paragraph), "```", "")
            continue
        marks = [m for m in NAMED.finditer(paragraph) if set(re.split(r",\s+", m[1])) & set(parameters)]
        ends = [*(mark.start() for mark in marks[1:]), len(paragraph)] if marks else []
        before = paragraph[: marks[0].start()] if marks else paragraph
        if before.strip():
            yield from (" ".join(before.split()), "")
        behind: list[str] = []
        for mark, end in zip(marks, ends, strict=True):
            meaning, *rest = re.split(r"\n(?=(?:Returns|Raises) )", paragraph[mark.end() : end])
            names = [_long(name, parameters.get(name)) for name in re.split(r",\s+", mark[1])]
            yield f"- {', '.join(names)}: {' '.join(meaning.split())}"
            behind += [" ".join(part.split()) for part in rest]
        if marks:
            yield ""
        for part in behind:
            yield from (part, "")


@functools.cache
def _codes() -> dict[str, set[str]]:
    """Find the codes that errors of each class are raised with."""
    codes: dict[str, set[str]] = defaultdict(set)
    for file in (DOCS.parent / "pymllm").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if 'code="' in text else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                named = {word.arg: word.value for word in node.keywords}
                kind = named["error"].id if isinstance(named.get("error"), ast.Name) else node.func.id
                kind = "ConfigError" if kind == "unknown_name" else kind
                if isinstance(code := named.get("code"), ast.Constant):
                    codes[kind].add(str(code.value))
    return codes


def _errors() -> Iterator[str]:
    from pymllm import errors

    codes = _codes()
    yield from ("| class | | codes |", "| --- | --- | --- |")
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.PymllmError):
            first = (value.__doc__ or "").split("\n\n")[0]
            bases = ", ".join(base.__name__ for base in value.__bases__)
            named = ", ".join(f"`{code}`" for code in sorted(codes[name]))
            yield f"| `{name}({bases})` | {' '.join(first.split())} | {named} |"


if __name__ == "__main__":
    for page in (DOCS / "cli.md", DOCS / "api.md"):
        page.write_text(make(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)
