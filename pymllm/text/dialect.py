"""How the models of a chat template write calls of tools and thoughts, and what the template makes of messages.

All of it is known from the template's text and the vocabulary, never from a model's name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pymllm.errors import PymllmError
from pymllm.text import reasoning
from pymllm.text.chat_template import ChatTemplate
from pymllm.text.parts import ContentReader, PartReader
from pymllm.text.reasoning import ThoughtReader, Thoughts
from pymllm.text.tokenizer import Tokenizer
from pymllm.text.tool_calls import granite, harmony, hermes, llama3_json, mistral
from pymllm.text.tool_calls.base import MAX_CALLS, Tool, ToolFamily, json_rule, literal
from pymllm.text.tool_calls.plain_json import PlainJson

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# The variables in which templates take tools.
TOOLS = ("tools", "xml_tools")
# Variables by which templates turn thoughts on and off.
SWITCHES = ("enable_thinking", "thinking")
# Where a template has the names under which thoughts of earlier turns may come.
THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Dialect:
    """The way in which a template's models write.

    source: the text of the template, and of the one for chats with tools, without comments.
    calls: the family of tool calls.  thoughts: the family of what is thought; None: nothing is told apart.
    tools_variable: the variable whose tools the template writes into the prompt; None: it writes none.
    thought_names: the fields under which the template reads an earlier turn's thoughts.
    takes_system: whether it writes a message of the role system.
    arguments_as_text: whether it takes the arguments of earlier calls as text; else as objects.
    earlier_calls: how many calls of an earlier message it writes: "one" where it leaves out others, or refuses them.
    variables: what it reads that neither it nor Jinja defines.
    kept_tokens: the special tokens among the families' marks.
    """

    source: str
    calls: ToolFamily
    thoughts: Thoughts | None
    tools_variable: str | None
    thought_names: tuple[str, ...]
    takes_system: bool
    arguments_as_text: bool
    earlier_calls: Literal["all", "one", "none"]
    variables: frozenset[str]
    kept_tokens: Mapping[str, int]

    @property
    def knows_tools(self) -> bool:
        """Tell whether the template writes tools into the prompt."""
        return self.tools_variable is not None

    @property
    def writes_messages(self) -> bool:
        """Tell whether an answer is messages, of which some are thoughts."""
        return isinstance(self.calls, harmony.Harmony)

    def kept(self, *, with_tools: bool) -> tuple[int, ...]:
        """Return the special tokens that the text of an answer must have, for its reader."""
        marks = set(self.thoughts.markers if self.thoughts is not None else ())
        if with_tools or self.writes_messages:
            marks |= set(self.calls.markers)
        return tuple(sorted(token for mark, token in self.kept_tokens.items() if mark in marks))

    def reader(self, tools: Sequence[Tool], *, most: int | None, opened: bool) -> PartReader:
        """Make the reader of one answer.

        tools: what may be called.  most: how many calls are read; None: all.  opened: whether the prompt ends inside
        thoughts.
        """
        says: PartReader = ContentReader()
        if tools or self.writes_messages:
            says = self.calls.reader([tool.name for tool in tools], most)
        return says if self.thoughts is None else ThoughtReader(self.thoughts, says, opened)

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        most: int | None,
        schema: Mapping[str, Any] | None,
        prompt: str,
        opened: bool,
    ) -> str:
        """Write a grammar, in Lark's notation, of an answer that calls tools, or follows a schema, and thinks before.

        most: how many calls there are at most.  schema: of a JSON text that the answer may be; None: it calls.
        prompt: what the answer follows.  opened: whether that ends inside thoughts.
        """
        rules: list[str] = []
        if tools:
            rules += self.calls.rules(tools, MAX_CALLS if most is None else most, self._spell)
        if schema is not None:
            rules.append(json_rule("answer", schema))
        said = self.calls.before_answer(self._spell)
        if said and not tools:
            rules.append(self.calls.thought_rule(self._spell))
        choices = [*(["calls"] if tools else []), *([f"{said} answer"] if schema is not None else [])]
        answer = " | ".join(choices)
        if self.thoughts is None:
            start = answer
        else:
            rules += self._thought_rules()
            before = "thought space" if opened else "(begin thought space)?"
            start = answer if self.thoughts.closed_by(prompt) and not opened else f"{before} ({answer})"
        return "\n".join([f"start: {start}", *rules])

    def strict_grammar(self, tools: Sequence[Tool], *, most: int | None, opened: bool) -> str | None:
        """Write a grammar of any answer, in which the arguments of strict tools follow their schemas.

        None: where the family has none; the arguments are then as the model writes them.
        """
        most = MAX_CALLS if most is None else most
        rules = self.calls.optional(most, self._spell)
        if rules is None:
            return None
        loose = [tool if tool.strict else dataclasses.replace(tool, parameters={}) for tool in tools]
        rules += self.calls.rules(loose, most, self._spell)
        start = "perhaps"
        # Thoughts whose marks are text are a part of it.
        if self.thoughts is not None and self.thoughts.ends[0] in self.kept_tokens:
            rules += self._thought_rules()
            start = "thought space perhaps" if opened else "(begin thought space)? perhaps"
        return "\n".join([f"start: {start}", *rules])

    def _thought_rules(self) -> list[str]:
        assert self.thoughts is not None
        begins, ends = self.thoughts.starts[0], self.thoughts.ends[0]
        if ends in self.kept_tokens:
            thought = ["thought: TEXT " + self._spell(ends), "TEXT: /(?s:.*)/"]
        else:
            thought = [f"thought[suffix={literal(ends)}]: /(?s:.*)/"]
        return [*thought, f"begin: {self._spell(begins)}", "space: /[ \\n]{0,2}/"]

    def _spell(self, mark: str) -> str:
        token = self.kept_tokens.get(mark)
        return literal(mark) if token is None else f"<[{token}]>"


def dialect_of(tokenizer: Tokenizer) -> Dialect:
    """Find the dialect of a tokenizer's chat template; without one, nothing is told apart."""
    source = _source(tokenizer)
    variable = _find_tools_variable(tokenizer, source) if source else None
    calls, thoughts = _tool_family(source), _thoughts(source, functools.partial(_is_token, tokenizer))
    if variable is None and not isinstance(calls, harmony.Harmony):
        calls = PlainJson()  # the model is told so in words
    marks = (*calls.markers, *(thoughts.markers if thoughts is not None else ()))
    kept = {mark: token for mark in marks if (token := _special(tokenizer, mark)) is not None}
    as_text = bool(source) and _takes_arguments_as_text(tokenizer)
    return Dialect(
        source,
        calls,
        thoughts,
        variable,
        tuple(name for name in THOUGHT_NAMES if re.search(rf"\b{name}\b", source)),
        bool(source) and _takes_system(tokenizer),
        as_text,
        _try_earlier_calls(tokenizer, as_text) if source else "none",
        _variables(tokenizer),
        kept,
    )


def _templates(tokenizer: Tokenizer) -> list[ChatTemplate]:
    templates = [tokenizer.chat_template]
    # Some checkpoints have a template of its own for chats with tools.
    choose = getattr(tokenizer, "template_for", None)
    if choose is not None and templates[0] is not None:
        templates.append(choose([]))
    return [template for template in templates if template is not None]


def _source(tokenizer: Tokenizer) -> str:
    return "\n".join(dict.fromkeys(COMMENT.sub("", one.source) for one in _templates(tokenizer)))


def _variables(tokenizer: Tokenizer) -> frozenset[str]:
    try:
        return frozenset(name for template in _templates(tokenizer) for name in template.variables)
    except PymllmError:
        return frozenset()  # rendering says why


def _tool_family(source: str) -> ToolFamily:
    if harmony.CHANNEL in source and harmony.MESSAGE in source:
        return harmony.Harmony()
    if mistral.OPEN in source:
        return mistral.Mistral(named=mistral.ARGS in source)
    if granite.OPEN in source:
        return granite.Granite()
    # Other families have the same tag around calls that are not JSON.
    if hermes.OPEN in source and "<function=" not in source and "<arg_key>" not in source:
        return hermes.Hermes()
    if llama3_json.TAG in source or re.search(r"""["']parameters["']:""", source):
        return llama3_json.Llama3Json()
    return PlainJson()


def _thoughts(source: str, is_token: Callable[[str], bool]) -> Thoughts | None:
    if harmony.CHANNEL in source and harmony.MESSAGE in source:
        return None  # its messages are told apart by the family of calls
    if "[THINK]" in source:
        return reasoning.MISTRAL
    if "my thought process:" in source:
        return reasoning.GRANITE
    if "<think>" in source and "<response>" in source:
        return reasoning.GRANITE_TAGS
    marked = "<think>" in source or "</think>" in source
    if marked or (source and all(is_token(mark) for mark in reasoning.THINK.markers)):
        return reasoning.THINK
    return None


def _is_token(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.available and len(tokenizer.encode(text, add_special_tokens=False)) == 1


def _special(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the special token whose text this is; None: there is none."""
    if not tokenizer.available:
        return None
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


def _find_tools_variable(tokenizer: Tokenizer, source: str) -> str | None:
    """Try in which variable a template takes tools that it writes."""
    tools = [Tool("probe_tool", "x").for_template()]
    user = {"role": "user", "content": "x"}
    for name in TOOLS:
        given: dict[str, Any] = {"tools": tools} if name == "tools" else {"variables": {name: tools}}
        for messages in ([user], [{"role": "system", "content": "x"}, user]):
            try:
                if re.search(rf"\b{name}\b", source) and "probe_tool" in tokenizer.render_chat(
                    messages, **given
                ):
                    return name
            except PymllmError:
                continue
    return None


def _takes_system(tokenizer: Tokenizer) -> bool:
    messages = [{"role": "system", "content": "probe words"}, {"role": "user", "content": "x"}]
    try:
        return "probe words" in tokenizer.render_chat(messages)
    except PymllmError:
        return False


def _takes_arguments_as_text(tokenizer: Tokenizer) -> bool:
    """Try how a template writes an earlier call: some write its arguments as they are, others as JSON."""
    value = {"probe": "value"}
    text = json.dumps(value)
    from_object, from_text = (_write_calls(tokenizer, {"probe_tool": given}) for given in (value, text))
    if from_object is None or str(value) in from_object:
        return from_text is not None and text in from_text
    return False


def _try_earlier_calls(tokenizer: Tokenizer, as_text: bool) -> Literal["all", "one", "none"]:
    """Try how many calls of an earlier message a template writes."""
    arguments: Any = "{}" if as_text else {}
    one = _write_calls(tokenizer, {"probe_tool": arguments})
    two = _write_calls(tokenizer, {"probe_tool": arguments, "other_probe": arguments}) or ""
    if one is not None and "probe_tool" not in one:
        return "none"
    return "all" if one is None or ("probe_tool" in two and "other_probe" in two) else "one"


def _write_calls(tokenizer: Tokenizer, calls: Mapping[str, Any]) -> str | None:
    """Render a conversation with these calls, arguments by name; None: the template does not take it."""
    made = [
        {"id": f"abcdefgh{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(calls.items())
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": made},
        *({"role": "tool", "tool_call_id": call["id"], "name": "x", "content": "y"} for call in made),
    ]
    try:
        return tokenizer.render_chat(messages)
    except PymllmError:
        return None
