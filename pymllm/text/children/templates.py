"""Chat templates in the environment in which transformers renders them: its extensions, filters and globals.

Runs in a process of its own (program.py). The text that a template gives here is the text that transformers gives,
character for character: tests/text/test_chat_template.py compares them.
"""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Compiled templates that are kept.
KEPT = 8


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks an assistant's text for training, and changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set within it is not known after it.
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` of a template, without the attributes of the real one."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


class _Namespace(Namespace):
    """`namespace` of a template, which holds no name that begins with an underscore."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *rest = given
        for name in (attributes := dict(*rest, **named)):
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Refusal(jinja2.TemplateError):
    """The refusal of a conversation by the template itself."""


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


ENVIRONMENT = make_environment()
_compiled: OrderedDict[str, jinja2.Template] = OrderedDict()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile a template (`source`), or render one that `key` names with `variables`.

    The text may have `most` characters more than the request brought.
    """
    key = request["key"]
    if "source" in request:
        return _compile(key, request["source"])
    if key not in _compiled:
        return {"unknown": True}
    _compiled.move_to_end(key)
    return _render(_compiled[key], request["variables"], request["most"] + request["size"])


def _compile(key: str, source: str) -> dict[str, Any]:
    try:
        tree = ENVIRONMENT.parse(source)
        read = meta.find_undeclared_variables(tree) - ENVIRONMENT.globals.keys()
        facts = {**content_forms(tree), "variables": sorted(read)}
        _compiled[key] = ENVIRONMENT.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        return {"invalid": f"line {error.lineno}: {error.message}"}
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        return {"invalid": f"{type(error).__name__}: {error}"}
    while len(_compiled) > KEPT:
        _compiled.popitem(last=False)
    return facts


def _render(template: jinja2.Template, variables: Mapping[str, Any], most: int) -> dict[str, Any]:
    pieces, size = [], 0
    try:
        for piece in template.generate(**variables):
            size += len(piece)
            if size > most:
                return {"limit": f"it wrote more than {most} characters"}
            pieces.append(piece)
    except _Refusal as error:
        return {"refused": str(error)}
    except (MemoryError, RecursionError):
        raise
    except (jinja2.exceptions.SecurityError, OverflowError) as error:
        return {"limit": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


# --- What a template reads of a message's content ---


def content_forms(tree: nodes.Template) -> dict[str, bool]:
    """Tell from a template's syntax whether it goes through the parts of a content, and tests what it is.

    A content is `message.content`, `message['content']`, a name that was set to one, and the parameter of a macro that
    is called with one.
    """
    names = _names_of_contents(tree)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    tests = any(
        test.name in ("string", "iterable", "sequence", "mapping") and _is_content(test.node, names)
        for test in tree.find_all(nodes.Test)
    )
    indexes = any(
        isinstance(item.arg, nodes.Const)
        and isinstance(item.arg.value, int)
        and _is_content(item.node, names)
        for item in tree.find_all(nodes.Getitem)
    )
    return {"loops": loops or indexes, "tests": tests}


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const):
            return node.arg.value == "content"
        # A slice of the parts is parts.
        return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.Call):
        # message.get('content')
        getter = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
        first = node.args[0] if node.args else None
        return getter and isinstance(first, nodes.Const) and first.value == "content"
    return False


def _names_of_contents(tree: nodes.Template) -> set[str]:
    names: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        found = {
            *_set_to_contents(tree, names),
            *(name for call in tree.find_all(nodes.Call) for name in _passed(call, macros, names)),
        }
        if found <= names:
            return names
        names |= found


def _set_to_contents(tree: nodes.Template, names: set[str]) -> Iterator[str]:
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            yield assignment.target.name


def _passed(call: nodes.Call, macros: Mapping[str, nodes.Macro], names: set[str]) -> Iterator[str]:
    if isinstance(call.node, nodes.Name) and call.node.name in macros:
        for parameter, given in zip(macros[call.node.name].args, call.args, strict=False):
            if _is_content(given, names):
                yield parameter.name
        for named in call.kwargs:
            if _is_content(named.value, names):
                yield named.key
