"""Messages as clients send them, made into those that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pymllm.text.dialect import Dialect
from pymllm.text.tool_calls.base import Tool, ToolFamily, parse_object
from pymllm.text.tool_calls.plain_json import PlainJson


def for_template(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], dialect: Dialect
) -> list[dict[str, Any]]:
    """Make the messages that a template reads.

    Arguments of earlier calls, which are text, become what the template writes: an object, or text. Text that is no
    JSON object stays text. Thoughts get the names that the template reads. The result of a tool gets its name.
    What has no content gets "".
    Several calls of one message become messages of one call each, with its result, where the template writes one; and
    all become text of the message, where it writes none.
    A template that does not know tools gets these, their calls and their results as texts.
    tools: that the model is told of.
    """
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("id"), str)
    }
    made = [_message(message, names, dialect) for message in messages]
    if not dialect.knows_tools:
        return _in_words(made, tools, dialect)
    if dialect.earlier_calls == "none":
        return [_with_calls_in_words(message, dialect.calls) for message in made]
    return _one_call_each(made) if dialect.earlier_calls == "one" else made


def _message(message: Mapping[str, Any], names: Mapping[str, str], dialect: Dialect) -> dict[str, Any]:
    made = dict(message)
    if made.get("content") is None:
        made["content"] = ""
    thought = made.pop("reasoning_content", None)
    # The templates of families that write messages refuse an answer that thinks, speaks and calls.
    says_and_calls = bool(made.get("content") and made.get("tool_calls"))
    if thought is not None and not (dialect.writes_messages and says_and_calls):
        made |= dict.fromkeys(dialect.thought_names, thought)
    given = made.get("tool_call_id")
    if isinstance(given, str):
        made["tool_call_id"] = dialect.calls.history_id(given)
        if made.get("role") == "tool" and "name" not in made and given in names:
            made["name"] = names[given]
    if made.get("tool_calls"):
        made["tool_calls"] = [_call(call, dialect) for call in made["tool_calls"]]
    return made


def _call(call: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or "{}"
    as_text = dialect.arguments_as_text and dialect.knows_tools
    if isinstance(arguments, str) and not as_text:
        read = parse_object(arguments)
        arguments = read if read is not None and _is_writable(read) else arguments
    elif isinstance(arguments, Mapping) and as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    made = {"type": "function", **call, "function": function | {"arguments": arguments}}
    if isinstance(made.get("id"), str):
        made["id"] = dialect.calls.history_id(made["id"])
    return made


def _is_writable(value: Any) -> bool:
    """Tell whether a template can write a value as JSON again: half a surrogate pair is no text, 1e999 no number."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return False
    return True


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make of a message of several calls one for each, which its result follows."""
    made: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []  # the calls of the last message, if they are several
    results: list[dict[str, Any]] = []

    def end_turn() -> None:
        for place, call in enumerate(waiting):
            if place:
                made.append({"role": "assistant", "content": "", "tool_calls": [call]})
            own = next((result for result in results if result["tool_call_id"] == call.get("id")), None)
            if own is not None:
                made.append(own)
                results.remove(own)
        made.extend(results)
        waiting.clear()
        results.clear()

    for message in messages:
        if waiting and message["role"] == "tool":
            results.append(message)
            continue
        end_turn()
        if len(message.get("tool_calls") or ()) > 1:
            waiting += message["tool_calls"]
            message = {**message, "tool_calls": waiting[:1]}
        made.append(message)
    end_turn()
    return made


def _in_words(
    messages: list[dict[str, Any]], tools: Sequence[Tool], dialect: Dialect
) -> list[dict[str, Any]]:
    """Tell of tools, calls and results in the words of the plain family.

    Results come from the user, and together with what the user says next, as some templates want roles in turn.
    """
    made: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        message = _with_calls_in_words(message, PlainJson())
        is_result = message["role"] == "tool"
        if is_result:
            name = message.get("name", message["tool_call_id"])
            message = {"role": "user", "content": f"The result of {name}:\n{_text(message['content'])}"}
        if after_result and message["role"] == "user":
            made[-1]["content"] += f"\n\n{_text(message['content'])}"
        else:
            made.append(message)
        after_result = is_result
    if tools:
        told = (dialect.calls if isinstance(dialect.calls, PlainJson) else PlainJson()).instructions(tools)
        first = made[0] if made else {}
        if first.get("role") == "system":
            first["content"] = f"{_text(first['content'])}\n\n{told}"
        elif first.get("role") == "user" and not dialect.takes_system:
            first["content"] = f"{told}\n\n{_text(first['content'])}"
        else:
            made.insert(0, {"role": "system", "content": told})
    return made


def _with_calls_in_words(message: dict[str, Any], family: ToolFamily) -> dict[str, Any]:
    """Write a message's calls behind its text."""
    calls = message.pop("tool_calls", None)
    if calls:
        said = _text(message["content"])
        called = family.in_words([_line(call["function"]) for call in calls])
        message["content"] = f"{said}\n{called}" if said else called
    return message


def _line(function: Mapping[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
