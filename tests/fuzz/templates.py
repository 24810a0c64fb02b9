"""Chat templates: those of several families with changed statements and expressions, and odd conversations.

The answer is the text, which must be transformers' own for the same template, messages, tools and variables, or a
refusal. transformers renders in the child that judges, after ours has: what took ours more than its limits is no more
asked of transformers.
"""

from __future__ import annotations

import itertools
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from jinja2 import defaults

from pymllm.server.protocol.base import parse_json
from pymllm.text import chat_template
from pymllm.text.chat_template import ChatTemplate

from ..chat_templates import FAMILIES
from .inputs import NASTY, Input, changed_json, chosen, dumped

FILE, CALL = "chat_template.jinja", "call.json"

PARTS = re.compile(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", re.DOTALL)
# What is not the same twice: the time, what is drawn, and where an object lies.
CHANCE = re.compile(r"random|lipsum|strftime|generate|shuffle")
OBJECT = re.compile(r"(?:[\w.]|<locals>)+ (object )?at 0x[0-9a-f]+|0x[0-9a-f]+")

NAMES = (
    *("messages", "tools", "message", "add_generation_prompt", "bos_token", "eos_token", "loop", "documents"),
    *("nothing", "enable_thinking", "range", "dict", "namespace", "cycler", "joiner", "self", "caller"),
    *("varargs", "kwargs", "raise_exception", "true", "none", "loop.index", "message.role", "messages[0]"),
    *("message.content", "message['content']", "messages[-1].content", "message.tool_calls", "tools[0]"),
)
LITERALS = (
    *(
        "0",
        "1",
        "-1",
        "2.5",
        "1e308",
        "64",
        "100000000",
        "''",
        "'a'",
        "'é中\\n'",
        "'%s'",
        "'{0}{x}'",
        "'<b>'",
    ),
    *("[]", "[1,[2]]", "{}", "{'a':1}", "('a','b')", "'\\x00'", "'\\ud800'", "[none]", "[messages]"),
)
METHODS = (
    *("split", "strip", "upper", "format", "format_map", "join", "get", "items", "keys", "append", "pop"),
    *(
        "replace",
        "startswith",
        "endswith",
        "center",
        "zfill",
        "encode",
        "splitlines",
        "index",
        "copy",
        "update",
    ),
    *(
        "setdefault",
        "values",
        "title",
        "translate",
        "expandtabs",
        "ljust",
        "__len__",
        "__class__",
        "mro",
        "count",
    ),
)
BINARY = (
    *("+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "in", "not in", "is", "==", "!=", "<", ">="),
)
# Statements, with a place for what they hold.
AROUND = (
    *("{{% if {e} %}}{body}{{% endif %}}", "{{% if {e} %}}a{{% else %}}{body}{{% endif %}}"),
    *(
        "{{% for message in {e} %}}{body}{{% endfor %}}",
        "{{% for k, v in {e} %}}{body}{{% else %}}b{{% endfor %}}",
    ),
    "{{% for m in messages recursive %}}{body}{{{{ loop({e}) }}}}{{% endfor %}}",
    "{{% for m in messages if {e} %}}{body}{{% if loop.last %}}{{% break %}}{{% endif %}}{{% endfor %}}",
    *(
        "{{% set x %}}{body}{{% endset %}}{{{{ x }}}}",
        "{{% set x = {e} %}}{body}",
        "{{% set ns.x = {e} %}}{body}",
    ),
    *("{{% filter {f} %}}{body}{{% endfilter %}}", "{{% generation %}}{body}{{% endgeneration %}}"),
    "{{% macro f(a, b={e}) %}}{body}{{{{ a }}}}{{{{ caller() if caller }}}}{{% endmacro %}}{{{{ f({e}) }}}}",
    "{{% macro g() %}}{{{{ caller() }}}}{{% endmacro %}}{{% call g() %}}{body}{{% endcall %}}",
    *("{{% with message = {e} %}}{body}{{% endwith %}}", "{{% raw %}}{body}{{% endraw %}}", "{{#{body}#}}"),
    *("{{% block b %}}{body}{{% endblock %}}{{{{ self.b() }}}}", "{{%- if {e} -%}} {body} {{%+ endif %}}"),
    *(
        "{{% autoescape {e} %}}{body}{{% endautoescape %}}",
        "{{% include {e} %}}{body}",
        "{{% extends {e} %}}{body}",
    ),
)
# Small texts that ask for much, each in its own way.
BOMBS = (
    "{{ 10**64**64 }}",
    "{{ 'a'|center(2000000000) }}",
    "{{ '%2000000000d'|format(1) }}",
    "{{ range(1000000000)|batch(500000000)|list }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'x' * 999999999 }}",
    "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "-" * 3000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{{ [1] * 99999999 }}",
    "{{ 1 << 99999999 }}{{ 7 // 0 }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!'|urlize(nofollow=true) }}{{ 'x' ~ ('w' * 999999)|wordwrap(1) }}",
    "{{ 'a'|indent(999999999) }}",
    "{{ (1.0).__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
    "{{ lipsum(n=99999) }}",
    "{{ messages|map('string')|join|list|permutations }}",
    "{{ '%c' % 1114112 }}",
    "{{ '9' * 5000|int }}{{ ('9' * 5000)|int }}",
    "{{ dict.fromkeys(range(99999999)) }}",
    "{% for x in [1, 2] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "{{ messages|tojson(indent=99999999) }}",
    "{{ 1e308|round(400) }}{{ 10|round(-400, 'floor') }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ [3, 'a', none]|sort }}",
    "{{ cycler(*range(99999999)) }}",
    "{{ 'a'.zfill(3000000000) }}{{ 'a\\t'.expandtabs(3000000000) }}",
)

TALK: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Be brief. <b>é</b>"},
    {"role": "user", "content": " one\n"},
    {"role": "assistant", "content": "two", "reasoning_content": "because"},
    {"role": "user", "content": [{"type": "text", "text": "three"}, {"type": "text", "text": "中 😀"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "y"]}}}
        ],
    },
    {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "f"},
)
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "ü <x>", "parameters": {"type": "object"}}}
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def expression(rng: random.Random, depth: int = 3) -> str:
    """Write an expression, of names and literals more often than not."""
    kind = rng.randrange(12) if depth else rng.randrange(2)
    if kind < 2:
        return rng.choice(NAMES if kind else LITERALS)
    one = expression(rng, depth - 1)
    if kind < 5:
        name = rng.choice((*defaults.DEFAULT_FILTERS, "tojson", "tojson"))
        return f"({one})|{name}" + (f"({expression(rng, 0)})" if rng.random() < 0.4 else "")
    other = expression(rng, depth - 1)
    if kind == 5:
        return f"({one}) is {rng.choice(('', 'not '))}{rng.choice(tuple(defaults.DEFAULT_TESTS))}"
    if kind == 6:
        return f"({one}).{rng.choice(METHODS)}({rng.choice(('', expression(rng, 0)))})"
    if kind == 7:
        return f"({one})[{rng.choice(('0', '-1', '::-1', '1:', expression(rng, 0)))}]"
    if kind == 8:
        return f"({one} if {other} else {expression(rng, 0)})"
    if kind == 9:
        return f"({one})({rng.choice(('', other, f'x={other}', f'*{other}', f'**{other}'))})"
    if kind == 10:
        return rng.choice((f"[{one}, {other}]", f"{{'a': {one}, 'b': {other}}}", f"not {one}", f"-{one}"))
    return f"({one} {rng.choice(BINARY)} {other})"


def changed_template(rng: random.Random, source: str) -> tuple[str, str]:
    """Change a template: an expression, a statement, or what stands around some of them.  Returns it, and how."""
    parts = [part for part in PARTS.split(source) if part]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        way = rng.choice(
            ("expression", "expression", "around", "around", "insert", "drop", "repeat", "swap", "word")
        )
        done.append(way)
        if way == "expression":
            places = [index for index, part in enumerate(parts) if part.startswith("{{")]
            at = rng.choice(places or [at])
            parts[at] = "{{ " + expression(rng) + " }}"
        elif way == "around":
            end = min(len(parts), at + rng.randrange(4))
            form, body = rng.choice(AROUND), "".join(parts[at:end])
            filter_ = rng.choice(tuple(defaults.DEFAULT_FILTERS))
            parts[at:end] = [form.format(e=expression(rng, 2), f=filter_, body=body)]
        elif way == "insert":
            parts.insert(at, "{{ " + expression(rng) + " }}")
        elif way == "drop":
            del parts[at]
        elif way == "repeat":
            parts.insert(at, parts[at])
        elif way == "swap":
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            words = re.findall(r"\w+|\W", parts[at])
            words[rng.randrange(len(words))] = rng.choice((*NAMES, *LITERALS, "", "-", "%}", "{%", "'", "|"))
            parts[at] = "".join(words)
        parts = parts or [""]
    return "".join(parts), ", ".join(done)


class Templates:
    """Rendering a conversation."""

    name = "templates"

    def prepare(self, folder: Path) -> None:
        # A compiler's remarks on what was changed.
        warnings.simplefilter("ignore", SyntaxWarning)
        # Here, once for all children.
        import transformers.utils.chat_template_utils  # noqa: F401

        # The tag of a final message then is transformers' own, of the same length.
        chat_template.secrets = SimpleNamespace(token_hex=lambda size: "TAG")  # type: ignore[attr-defined]
        self.sources = {name: source for name, (source, _) in FAMILIES.items()}

    def inputs(self) -> SearchStrategy[Input]:
        return chosen((10, self._sources), (6, self._calls), (1, self._bombs))

    def _input(self, subject: str, source: str, call: bytes, changed: str) -> Input:
        return Input(subject, {FILE: source.encode("utf-8", "surrogatepass"), CALL: call}, changed, "keeps")

    def _sources(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            name = draw(st.sampled_from(sorted(self.sources)))
            rng = draw(st.randoms(use_true_random=False))
            source, changed = changed_template(rng, self.sources[name])
            return self._input(name, source, dumped(a_call(rng)), changed)

        return make()

    def _calls(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            name = draw(st.sampled_from(sorted(self.sources)))
            call = a_call(draw(st.randoms(use_true_random=False)))
            text, changed = draw(changed_json(call, NASTY))
            return self._input(name, self.sources[name], text, changed)

        return make()

    def _bombs(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            name, bomb = draw(st.sampled_from(sorted(self.sources))), draw(st.sampled_from(BOMBS))
            source = self.sources[name]
            place = draw(st.sampled_from((0, len(source))))
            call = dumped({"messages": list(TALK[1:2]), "prompt": True})
            return self._input(name, source[:place] + bomb + source[place:], call, bomb[:60])

        return make()

    def judge(self, given: Input, folder: Path) -> bool:
        source = given.files[FILE].decode("utf-8", "surrogatepass")
        call = parse_json(given.files[CALL])
        if not isinstance(call, dict):
            call = {"messages": call}
        messages, tools, variables = call.get("messages"), call.get("tools"), call.get("variables")
        prompt, final = call.get("prompt", True) is True, call.get("final", False) is True
        variables = variables if isinstance(variables, dict) else {}
        tools = tools if tools is None or isinstance(tools, list) else [tools]
        text = ChatTemplate(source, FILE).render(
            messages,
            TOKENS,
            tools=tools,
            add_generation_prompt=prompt,
            continue_final_message=final,
            variables=variables,
        )
        if CHANCE.search(source):
            return True
        others = by_transformers(source, messages, tools, prompt, final, {**TOKENS, **variables})
        rendered = False
        for other in others:
            rendered = True
            # A template may write the final message more than once; transformers cuts at the last of its tags alone.
            other = other.replace(TAG, "").replace(TAG.strip(), "") if final else other
            if plain(text) == plain(other):
                return True
        return not rendered


def a_call(rng: random.Random) -> dict[str, Any]:
    """Make what a conversation is rendered with."""
    call: dict[str, Any] = {"messages": list(TALK[rng.randrange(3) : rng.randrange(3, 7)]), "prompt": True}
    if rng.random() < 0.4:
        call["tools"] = TOOLS
    if rng.random() < 0.2:
        call |= {"prompt": False, "final": True}
    if rng.random() < 0.3:
        call["variables"] = {"enable_thinking": rng.choice((True, False, None, "x"))}
    return call


def by_transformers(
    source: str, messages: Any, tools: Any, prompt: bool, final: bool, variables: Mapping[str, Any]
) -> Iterator[str]:
    """Render by transformers, the contents as they are and in other forms; what it does not render is left out.

    A template may read parts alone, or strings alone, and then gets the other as what it reads.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    for form in forms(messages):
        try:
            texts = render_jinja_template(
                [form],
                tools=tools,
                chat_template=source,
                add_generation_prompt=prompt,
                continue_final_message=final,
                **variables,
            )[0]
        except Exception:
            continue
        yield texts[0]


def forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages without what is null, each role's contents as they are, as strings or as parts."""
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    roles = sorted({str(message.get("role")) for message in kept})
    several = itertools.product((as_string, as_parts), repeat=min(len(roles), 6))
    for ways in itertools.chain([[as_it_is] * len(roles)], several):
        way = dict(zip(roles, ways, strict=False))
        yield [
            {**message, "content": way.get(str(message.get("role")), as_it_is)(message["content"])}
            if "content" in message
            else dict(message)
            for message in kept
        ]


def as_it_is(content: Any) -> Any:
    return content


def as_string(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else content


def as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def plain(text: str) -> str:
    """Leave out of a text whose classes objects are of, and where they lie."""
    return OBJECT.sub("0x", text)
