"""Tools in a request, and which of them are to be called."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from pymllm.errors import nearest
from pymllm.server.protocol.base import Many, StrictModel, refuse
from pymllm.text.tool_calls.base import Tool


class FunctionDefinition(StrictModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(StrictModel):
    """A tool as OpenAI's API has it."""

    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> Tool:
        """Return the tool."""
        given = self.function
        return Tool(given.name, given.description, given.parameters or {}, given.strict)


class FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    mode: Literal["auto", "required"]
    tools: Many[NamedTool]


class AllowedChoice(StrictModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Mode = Literal["auto", "none", "required"]
Choice = Mode | NamedTool | AllowedChoice


CHOICES: dict[str, type[NamedTool] | type[AllowedChoice]] = {
    "function": NamedTool,
    "allowed_tools": AllowedChoice,
}


def check_choice(choice: Any) -> None:
    """Refuse with a RequestError a choice that is none of those that there are."""
    if choice is None or choice in ("auto", "none", "required"):
        return
    kind = choice.get("type") if isinstance(choice, dict) else None
    try:
        CHOICES[kind].model_validate(choice)  # type: ignore[index]
    except (KeyError, TypeError, ValidationError):
        refuse(
            "tool_choice",
            'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}; '
            f"found {reprlib.repr(choice)}",
        )


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may make.

    tools: that the model is told of, none if it is to call none.  callable: those of them that it may call.
    forced: whether it must call one.  most: how many calls there may be; None: any number.
    """

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    forced: bool = False
    most: int | None = None


def choose(tools: list[Tool], choice: Choice | None, parallel: bool | None) -> Calls:
    """Choose what an answer may call.  RequestError where the choice names a tool that there is none of.

    parallel: whether it may call several at a time; None: yes.
    """
    if choice is not None and choice not in ("none", "auto") and not tools:
        refuse("tool_choice", "asks for a call, and there are no tools")
    most = 1 if parallel is False else None
    if choice == "none" or not tools:
        return Calls()
    everything = tuple(tools)
    if isinstance(choice, NamedTool):
        return Calls(everything, (_find(tools, choice),), True, 1)
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        if not allowed.tools:
            refuse("tool_choice", 'allows no tool; ask for "none" instead')
        few = {(tool := _find(tools, named)).name: tool for named in allowed.tools}
        return Calls(tuple(few.values()), tuple(few.values()), allowed.mode == "required", most)
    return Calls(everything, everything, choice == "required", most)


def _find(tools: list[Tool], named: NamedTool) -> Tool:
    name = named.function.name
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        hint = nearest(name[:140], [tool.name for tool in tools])
        refuse("tool_choice", f"names the tool {name[:140]!r}, which is not among the tools. {hint}".rstrip())
    return found
