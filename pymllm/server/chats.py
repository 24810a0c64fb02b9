"""What a chat asks of the model: a prompt, settings, and the reader of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pymllm.errors import RequestError
from pymllm.server.protocol.base import refuse
from pymllm.server.protocol.chat import ChatRequest
from pymllm.text.conversation import for_template
from pymllm.text.dialect import SWITCHES, Dialect
from pymllm.text.parts import PartReader
from pymllm.text.tokenizer import Tokenizer

# Variables that the request has in other places.
TAKEN = ("messages", "tools", "xml_tools", "add_generation_prompt", "continue_final_message")
TAIL = 16  # tokens of a prompt, in which a mark that it ends with is


@dataclass(frozen=True)
class Chat:
    """A conversation that is ready to be answered.

    settings: the keywords of SamplingParams.  new_reader: makes the reader of one answer.
    """

    prompt: list[int]
    settings: dict[str, Any]
    new_reader: Callable[[], PartReader]


def prepare_chat(
    request: ChatRequest, settings: Mapping[str, Any], tokenizer: Tokenizer, dialect: Dialect
) -> Chat:
    """Make of a conversation what the model is to do.  RequestError for what the chat template cannot honour.

    settings: the keywords of SamplingParams that the request sets.
    """
    calls = request.calls
    given = [message.for_template() for message in request.messages]
    messages = for_template(given, calls.tools, dialect)
    variables = _variables(request, dialect)
    tools = [tool.for_template() for tool in calls.tools] or None
    if tools is not None and dialect.tools_variable not in (None, "tools"):
        variables[dialect.tools_variable] = tools
    prompt = tokenizer.apply_chat_template(
        messages,
        tools=tools if dialect.tools_variable == "tools" else None,
        add_generation_prompt=request.begins_answer,
        continue_final_message=request.continue_final_message,
        variables=variables,
    )
    settings, tail = dict(settings), ""
    if dialect.thoughts is not None:
        tail = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    continued = messages[-1]["content"] if request.continue_final_message else None
    opened = dialect.thoughts is not None and dialect.thoughts.opened_by(
        tail, continued if isinstance(continued, str) else None
    )
    follows = _follow(settings, request, dialect, tail, opened)
    kept = dialect.kept(with_tools=bool(calls.tools))
    if kept and settings.get("skip_special_tokens", True):
        settings["kept_tokens"] = kept
    opened = opened and follows
    return Chat(prompt, settings, lambda: dialect.reader(calls.callable, most=calls.most, opened=opened))


def find_variables(dialect: Dialect) -> tuple[str, ...]:
    """Return which variables about thinking the chat template reads, those that turn it on and off first."""
    return tuple(name for name in (*SWITCHES, "reasoning_effort") if name in dialect.variables)


def _follow(
    settings: dict[str, Any], request: ChatRequest, dialect: Dialect, tail: str, opened: bool
) -> bool:
    """Set the grammar of calls that are forced, and let the model think before what a schema holds it to.

    Returns whether the answer may begin with thoughts.
    """
    calls, schema = request.calls, settings.get("json_schema")
    if calls.forced:
        # What else was asked of the form is asked of what is said, and nothing is.
        for name in ("json_schema", "regex", "grammar"):
            settings.pop(name, None)
        settings["grammar"] = dialect.grammar(
            calls.callable, most=calls.most, schema=None, prompt=tail, opened=opened
        )
        return True
    for name in ("regex", "grammar"):
        if name in settings:
            if calls.callable:
                raise RequestError(
                    f"{name} leaves no room for calls of tools",
                    code="grammar",
                    tensor=name,
                    fix="Send tool_choice none, or a JSON schema.",
                )
            return False
    if schema is None and any(tool.strict for tool in calls.callable):
        strict = dialect.strict_grammar(calls.callable, most=calls.most, opened=opened)
        if strict is not None:
            settings["grammar"] = strict
        return True
    thinks = dialect.thoughts is not None or dialect.writes_messages
    if schema is None or not (calls.callable or thinks):
        return True
    read = _read_schema(schema)
    if read is not None:
        del settings["json_schema"]
        settings["grammar"] = dialect.grammar(
            calls.callable, most=calls.most, schema=read, prompt=tail, opened=opened
        )
    return True


def _read_schema(schema: Any) -> dict[str, Any] | None:
    """Return a schema as an object; None: it is none, which SamplingParams says."""
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        return None
    return {} if read is True else read if isinstance(read, dict) else None


def _variables(request: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    """Return the variables of the chat template.  RequestError for those that it does not read."""

    variables = dict(request.chat_template_kwargs or {})
    for name, value in variables.items():
        if name in TAKEN:
            refuse("chat_template_kwargs", f"may not have {name}, which the request itself has")
        nothing = value is None or (name in SWITCHES and value is False and dialect.thoughts is None)
        if not nothing and name not in dialect.variables:
            refuse(
                "chat_template_kwargs", f"has {name[:140]!r}, which this model's chat template does not read"
            )
    if request.documents:
        if "documents" not in dialect.variables:
            refuse("documents", "is not read by this model's chat template", code="unsupported_parameter")
        variables["documents"] = request.documents
    effort = request.reasoning_effort
    if effort is not None and "reasoning_effort" not in variables:
        switch = next((name for name in SWITCHES if name in dialect.variables), None)
        if "reasoning_effort" in dialect.variables:
            variables["reasoning_effort"] = effort
        elif effort == "none" and switch is not None:
            variables.setdefault(switch, False)
        elif effort != "medium" and not (effort == "none" and dialect.thoughts is None):
            refuse(
                "reasoning_effort", "is not read by this model's chat template", code="unsupported_parameter"
            )
    return variables
