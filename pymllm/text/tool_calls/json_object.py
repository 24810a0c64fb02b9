"""Calls that are JSON objects with a name and arguments, which most families write in some wrapping."""

from __future__ import annotations

import json
import re
from typing import Any

from pymllm.text.tool_calls.base import AnswerText, Extent, Steps, parse_object

# The keys under which families write arguments.
ARGUMENTS = ("arguments", "parameters")
STRING = r'"(?:[^"\\]|\\.){0,256}"'
# A call up to where its arguments begin, as all models are taught to write it.
HEAD = re.compile(
    rf'\{{\s*(?:"(?:type|id)"\s*:\s*{STRING}\s*,\s*){{0,2}}"name"\s*:\s*({STRING})\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)',
    re.DOTALL,
)
FIRST_KEY = re.compile(rf"\{{\s*({STRING})\s*:", re.DOTALL)
NAMED = re.compile(rf'\{{\s*"name"\s*:\s*({STRING})\s*[,}}]', re.DOTALL)
KEYS = ("name", "type", "id", "function", *ARGUMENTS)


def parse_call(text: str) -> tuple[str, str] | None:
    """Parse a call, which is a JSON object.  Returns its name, and its arguments as text; None: it is no call."""
    call = parse_object(text)
    if call is None:
        return None
    head = HEAD.match(text)
    if isinstance(call.get("function"), dict):
        call, head = call["function"], None
    name = call.get("name")
    if not isinstance(name, str) or not name:
        return None
    if head is not None:
        end = Extent(head.end()).find_end(text)
        return name, text[head.end() : end]
    given: Any = next((call[key] for key in ARGUMENTS if call.get(key) is not None), {})
    if isinstance(given, str):
        return (name, given) if parse_object(given) is not None else None
    return (name, json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else None


class ObjectCalls(AnswerText):
    """The text of an answer whose calls are JSON objects.

    any_name: whether a call may have a name that no tool has, as it is told from other text by its wrapping.
    """

    any_name = True

    def object_call(self) -> Steps:
        """Read the call at this place.  Returns False, and reads nothing, where it is none."""
        start = self.at
        extent = Extent(start)
        while True:
            end = extent.find_end(self.buffer)
            if end is not None:
                call = parse_call(self.buffer[start:end])
                if call is None or not self._knows(call[0]):
                    return False
                self.add_arguments(self.begin_call(call[0]), call[1])
                self.at = end
                return True
            if self.final or not self._may_be_call(start):
                return False
            named = '"' in self.buffer[start : start + 1024]
            head = HEAD.match(self.buffer, start, start + 2048) if named else None
            name = None if head is None else unquoted(head.group(1))
            if head is not None and name is not None and self._knows(name):
                break
            yield
        self.at = head.end()
        if not (yield from self.arguments(name)):
            self.at = start
            return False
        yield from self._end_object(start, extent)
        return True

    def array_of_calls(self) -> Steps:
        """Read the calls of the array at this place, up to one that is none.  Returns whether there is one."""
        start, read = self.at, False
        if not (yield from self.take("[")):
            return False
        while (yield from self.skip_space()) and (yield from self.object_call()):
            start, read = self.at, True
            if not (yield from self.take_after_space(",")):
                yield from self.take_after_space("]")
                return True
        self.at = start
        return read

    def _end_object(self, start: int, extent: Extent) -> Steps:
        """Read what an object has after its arguments, which have been given out."""
        while (end := extent.find_end(self.buffer)) is None:
            if self.final:
                return False
            yield
        if parse_object(self.buffer[start:end]) is not None:
            self.at = end
        return True

    def _knows(self, name: str | None) -> bool:
        return bool(name) and (self.any_name or name in self.names)

    def _may_be_call(self, start: int) -> bool:
        """Tell whether an object may still turn out to be a call."""
        head = self.buffer[start : start + 1024]
        if not head:
            return True
        inside = head[1:].lstrip()
        if not head.startswith("{") or (inside and not inside.startswith('"')):
            return False
        if not inside:
            return True
        first, named = FIRST_KEY.match(head), NAMED.match(head)
        if first is not None and unquoted(first.group(1)) not in KEYS:
            return False
        return named is None or self._knows(unquoted(named.group(1)))


def unquoted(text: str) -> str | None:
    """Return the text of a JSON string; None: it is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return None
