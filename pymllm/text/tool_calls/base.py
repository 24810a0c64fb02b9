"""What the families of tool calls share: tools, the contract, and the text of an answer that comes in pieces."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pymllm.errors import RequestError
from pymllm.text.grammars import SPACE
from pymllm.text.parts import Arguments, Content, Part, PartReader, ToolCall

MAX_TOOLS = 128
MAX_CALLS = 16  # of a forced answer
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")

# What a reader runs: each `yield` waits for more text, or for the end.
Steps = Generator[None, None, bool]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.  parameters: the JSON schema of its arguments, an object's."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments, with `type`, which some leave out."""
        return {"type": "object", **self.parameters}

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it: as OpenAI's API has it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) or {"type": "object", "properties": {}}
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse with a RequestError too many tools, names that are none or come twice, and parameters of no object."""
    if len(tools) > MAX_TOOLS:
        raise _bad(f"may be at most {MAX_TOOLS}", found=str(len(tools)))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if not NAME.fullmatch(tool.name):
            raise _bad(
                f"have a name that is none (at tools.{index})",
                expected="1 to 128 letters, digits, _, - or .",
                found=repr(tool.name[:140]),
            )
        if tool.name in seen:
            raise _bad(f"have the name {tool.name!r} twice (at tools.{index})")
        if tool.schema["type"] != "object":
            raise _bad(
                f"have parameters that are no object (at tools.{index})",
                expected='a JSON schema of the type "object"',
                found=repr(tool.schema["type"])[:80],
            )
        seen.add(tool.name)


def _bad(problem: str, **details: str) -> RequestError:
    return RequestError(f"tools {problem}", code="parameter", tensor="tools", **details)  # type: ignore[arg-type]


class ToolFamily:
    """The way in which the models of a family write calls of tools.

    name: of the family.  markers: texts around calls; those that are special tokens are kept in the answer's text.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        """Make the reader of one answer.

        names: of the tools.  most: how many calls are read; what comes after these is left out.  None: all.
        """
        raise NotImplementedError

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        """Yield the rules of a grammar in Lark's notation; the rule `calls` is one to `most` calls of these tools.

        spell: writes a marker as the grammar has it, a token or a text.
        """
        raise NotImplementedError

    def optional(self, most: int, spell: Callable[[str], str]) -> list[str] | None:
        """Write the rule `perhaps`: any text, in which calls follow the rules that `rules` yields.

        None: this family has no such rule, where its marks are no special tokens.
        """
        marked = bool(self.markers) and spell(self.markers[0]).startswith("<")
        return ["perhaps: ANY | ANY? calls", "ANY: /(?s:.+)/"] if marked else None

    def before_answer(self, spell: Callable[[str], str]) -> str:
        """Write what a grammar has before what is said, thoughts among it (`thought_rule`); "": nothing."""
        return ""

    def thought_rule(self, spell: Callable[[str], str]) -> str:
        """Write the rule of thoughts, `thinks`, which `rules` yields too."""
        raise NotImplementedError

    def new_id(self) -> str:
        """Make the id of a call, to which its result refers."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def in_words(self, calls: Sequence[str]) -> str:
        """Write calls of an earlier turn, JSON objects, where the template does not."""
        return "\n".join(calls)

    def history_id(self, given: str) -> str:
        """Return a call's id from an earlier turn as the family's templates accept it."""
        return given


def literal(text: str) -> str:
    """Write a text as a grammar has it."""
    return json.dumps(text, ensure_ascii=False)


def repeated(rule: str, separator: str, most: int) -> str:
    """Write one to `most` of a rule, with something between them."""
    between = f"{separator} " if separator else ""
    return rule if most == 1 else f"{rule} ({between}{rule}){{0,{most - 1}}}"


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """Write the rule of a JSON text that follows a schema."""
    described = {**schema, "x-guidance": {"whitespace_pattern": SPACE}}
    return f"{name}: %json {json.dumps(described)}"


def object_rules(tools: Sequence[Tool], arguments: str) -> Iterator[str]:
    """Yield the rules of one call that is a JSON object, `call`.  arguments: the key of the arguments."""
    yield "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
    for index, tool in enumerate(tools):
        begins = f'{{"name": {json.dumps(tool.name)}, "{arguments}": '
        yield f'call_{index}: {literal(begins)} args_{index} "}}"'
        yield json_rule(f"args_{index}", tool.schema)


SPACES = re.compile(r"\s*")
# What a JSON object or array consists of, as far as its end is concerned.
SIGNS = re.compile(r'["{}\[\]]')
QUOTED_SIGNS = re.compile(r'["\\]')


class Extent:
    """The extent of a JSON object or array whose text comes in pieces.  at: how far it is known."""

    def __init__(self, start: int) -> None:
        self.at, self.depth, self.quoted = start, 0, False

    def find_end(self, text: str) -> int | None:
        """Return where the value ends in the text so far, which has been longer by nothing but its end; or None."""
        while (found := (QUOTED_SIGNS if self.quoted else SIGNS).search(text, self.at)) is not None:
            sign = found.group()
            if sign == "\\":
                if found.end() == len(text):
                    self.at = found.start()
                    return None
                self.at = found.end() + 1
                continue
            self.at = found.end()
            if sign == '"':
                self.quoted = not self.quoted
            else:
                self.depth += 1 if sign in "{[" else -1
                if self.depth == 0:
                    return self.at
        self.at = len(text)
        return None


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object strictly; None: it is none."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class AnswerText:
    """The text of one answer, from which a family's `steps` take content and calls as these become certain.

    White space around a call belongs to it. A call that turns out to be none is content, as it was written; but parts
    that have been given out stay, and what follows them is given out as it is.

    buffer: what has come of the text; up to `at` it is read.  final: whether it is whole.
    """

    def __init__(self, family: ToolFamily, names: Collection[str], most: int | None) -> None:
        self.family, self.names, self.most = family, names, most
        self.buffer, self.at, self.final = "", 0, False
        self.calls = 0
        self._parts: list[Part] = []
        self._space = ""  # white space that is content unless a call follows
        self._after_call = False  # nothing but white space has come since a call
        self._steps: Steps | None = self.steps()

    def steps(self) -> Steps:
        """Read the answer, one `yield` for each time that the text goes on."""
        raise NotImplementedError
        yield

    def read(self, text: str, *, final: bool) -> list[Part]:
        """Return the parts that have become certain with this piece.  final: no piece follows."""
        self.buffer += text
        self.final = final
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
                self.say(len(self.buffer))
        else:
            self.say(len(self.buffer))
        if final and not self._after_call and self._space:
            self._add_content(self._space)
            self._space = ""
        parts, self._parts = self._parts, []
        return parts

    # What `steps` are made of.

    def say(self, end: int) -> None:
        """Take the text up to `end` for content."""
        text = self._space + self.buffer[self.at : end]
        self.at = end
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._add_content(body)
            self._after_call = False

    def say_until(self, marker: str) -> Steps:
        """Take the text before a marker for content.  Returns whether there is one; it is not read yet."""
        while (found := self.buffer.find(marker, self.at)) < 0:
            if self.final:
                self.say(len(self.buffer))
                return False
            held = beginning_at_the_end(self.buffer, self.at, marker)
            self.say(len(self.buffer) - held)
            self.buffer, self.at = self.buffer[self.at :], 0
            yield
        self.say(found)
        return True

    def take(self, text: str) -> Steps:
        """Read this text if it comes.  Returns whether it does."""
        while len(self.buffer) - self.at < len(text) and text.startswith(self.buffer[self.at :]):
            if self.final:
                return False
            yield
        if not self.buffer.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def skip_space(self) -> Steps:
        """Read white space.  Returns whether text follows."""
        while True:
            self.at = end_of_space(self.buffer, self.at)
            if self.at < len(self.buffer):
                return True
            if self.final:
                return False
            yield

    def take_after_space(self, text: str) -> Steps:
        """Read white space and this text if they come, or else nothing.  Returns whether they do."""
        before = self.at
        if (yield from self.skip_space()) and (yield from self.take(text)):
            return True
        # An answer may be cut off within it.
        cut_off = self.final and text.startswith(self.buffer[before:].lstrip())
        self.at = len(self.buffer) if cut_off else before
        return cut_off

    def begin_call(self, name: str) -> int | None:
        """Give out the beginning of a call.  Returns its index; None: there are as many calls as may be."""
        self._space, self._after_call = "", True
        index = self.calls
        if self.most is not None and index >= self.most:
            return None
        self.calls += 1
        self._parts.append(ToolCall(index, self.family.new_id(), name))
        return index

    def add_arguments(self, index: int | None, text: str) -> None:
        """Give out a piece of a call's arguments."""
        if index is not None and text:
            self._parts.append(Arguments(index, text))

    def arguments(self, name: str) -> Steps:
        """Read the JSON object at this place, the arguments of a call of this name.

        Returns False, and reads nothing, where it is none; unless it has been begun before that was seen.
        """
        if not self.buffer.startswith("{", self.at):
            return False
        extent, sent = Extent(self.at), self.at
        index, begun = None, False
        while (end := extent.find_end(self.buffer)) is None:
            if self.final:
                if not begun:
                    return False
                end = len(self.buffer)
                break
            if not begun:
                index, begun = self.begin_call(name), True
            self.add_arguments(index, self.buffer[sent : extent.at])
            sent = extent.at
            yield
        if not begun:
            if parse_object(self.buffer[self.at : end]) is None:
                return False
            index = self.begin_call(name)
        self.add_arguments(index, self.buffer[sent:end])
        self.at = end
        return True

    def _add_content(self, text: str) -> None:
        if self._parts and isinstance(self._parts[-1], Content):
            text = self._parts.pop().text + text  # type: ignore[union-attr]
        self._parts.append(Content(text))


def end_of_space(text: str, start: int) -> int:
    """Return where the white space that begins at `start` ends."""
    return SPACES.match(text, start).end()  # type: ignore[union-attr]


def beginning_at_the_end(text: str, start: int, marker: str) -> int:
    """Return how many of the last characters may be the beginning of a marker."""
    longest = min(len(marker) - 1, len(text) - start)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
