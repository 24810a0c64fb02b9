"""Calls of tools read from answers that come in any pieces, in each family's wire form."""

from __future__ import annotations

import json
import random
import string

import pytest

from pymllm.errors import RequestError
from pymllm.text.parts import Arguments, Content, Reasoning, ToolCall
from pymllm.text.tool_calls.base import Tool, check_tools
from pymllm.text.tool_calls.granite import Granite
from pymllm.text.tool_calls.harmony import Harmony
from pymllm.text.tool_calls.hermes import Hermes
from pymllm.text.tool_calls.llama3_json import Llama3Json
from pymllm.text.tool_calls.mistral import Mistral
from pymllm.text.tool_calls.plain_json import PlainJson

NAMES = ("f", "get_weather")
HERMES, LLAMA, PLAIN, GRANITE, HARMONY = Hermes(), Llama3Json(), PlainJson(), Granite(), Harmony()
ARRAY, NAMED = Mistral(named=False), Mistral(named=True)


def said(parts):
    """(content, reasoning, [(name, arguments)]), with every piece in its place."""
    calls = [[part.name, ""] for part in parts if isinstance(part, ToolCall)]
    for part in parts:
        if isinstance(part, Arguments):
            calls[part.index][1] += part.text
    content = "".join(part.text for part in parts if isinstance(part, Content))
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return content, thought, [tuple(call) for call in calls]


def read(family, pieces, most=None, names=NAMES):
    reader = family.reader(names, most)
    parts = [part for piece in pieces for part in reader.read(piece, final=False)]
    return parts + reader.read("", final=True)


def pieces_of(text):
    """Every way to cut a text in two, all characters apart, and some random ways."""
    yield from ([text[:cut], text[cut:]] for cut in range(len(text) + 1))
    yield list(text)
    for seed in range(20):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=5))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


ARGUMENTS = '{"city": "Paris", "deep": {"list": [1, "}]", "\\"</tool_call>"]}}'
WELL_FORMED = [
    (
        HERMES,
        f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>',
        "",
        [("f", ARGUMENTS)],
    ),
    (
        HERMES,
        'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"a": 1}, "name": "any"}</tool_call>\nDone.\n',
        "Let me see.Done.\n",
        [("f", "{}"), ("any", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "f"}', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"function": {"name": "f", "arguments": {"a": 1}}}', "", [("f", '{"a": 1}')]),
    (HERMES, 'a <tool_call>{"name": "é\\u00e9", "arguments": null}</tool_call>', "a", [("éé", "{}")]),
    (LLAMA, f' {{"name": "f", "parameters": {ARGUMENTS}}}\n', "", [("f", ARGUMENTS)]),
    (
        LLAMA,
        '{"type": "function", "name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"a": 1}}',
        "",
        [("f", "{}"), ("get_weather", '{"a": 1}')],
    ),
    (LLAMA, '<|python_tag|>{"name": "other", "parameters": {"a": 1}}', "", [("other", '{"a": 1}')]),
    (
        PLAIN,
        '{"name": "f", "arguments": {"a": 1}}\n{"name": "f", "arguments": {}}',
        "",
        [("f", '{"a": 1}'), ("f", "{}")],
    ),
    (PLAIN, '```json\n[{"name": "f", "arguments": {"a": 1}}]\n```', "", [("f", '{"a": 1}')]),
    (ARRAY, f'[TOOL_CALLS][{{"name": "f", "arguments": {ARGUMENTS}}}]', "", [("f", ARGUMENTS)]),
    (
        ARRAY,
        'Yes. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        "Yes.",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (
        NAMED,
        f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS] {{}}",
        "",
        [("f", ARGUMENTS), ("get_weather", "{}")],
    ),
    (NAMED, '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    (GRANITE, '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (
        GRANITE,
        '<|tool_call|>{"name": "f", "arguments": {"a": 1}}<|/tool_call|>\n<|tool_call|>[{"name": "f"}]<|/tool_call|>',
        "",
        [("f", '{"a": 1}'), ("f", "{}")],
    ),
    (
        HARMONY,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.f <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        "I look.",
        [("f", ARGUMENTS)],
    ),
    (
        HARMONY,
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}',
        "",
        [("f", '{"a": 1}')],
    ),
    (
        HARMONY,  # after a prompt that ends with <|start|>assistant
        ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>',
        "",
        [("f", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_c', "", [("f", "{}")]),  # cut off
]
NO_CALLS = [
    (HERMES, " plain <tool text < with { braces }\n\n"),
    (HERMES, "  \n"),
    (HERMES, "<tool_call>print(1)</tool_call> x"),
    (HERMES, '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "argu'),
    (HERMES, '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>'),
    (HERMES, "<tool_call>"),
    (LLAMA, '{"name": "unknown", "parameters": {"a": 1}} text'),
    (LLAMA, '{"answer": {"name": "f"}}'),
    (LLAMA, "<|python_tag|>print(2)"),
    (LLAMA, 'He says {"name": "f", "parameters": {}}'),
    (PLAIN, '[1, 2, {"name": "f"}]'),
    (PLAIN, "```python\nprint(1)\n```"),
    (ARRAY, "[TOOL_CALLS] [1]"),
    (ARRAY, "a[TOOL_CALLS"),
    (NAMED, "[TOOL_CALLS]f[ARGS]none"),
    (GRANITE, "<|tool_call|>nothing"),
    (HARMONY, "no channel <|chan"),
    (HARMONY, " to=functions.f and so on"),
    (HARMONY, "<|channel|>commentary to=functions.f<|message|> none"),
]
# What breaks after the arguments have begun.
BROKEN = [
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call> after'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x}</tool_call>'),
    (ARRAY, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1'),
    (NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1,}'),
    (PLAIN, '{"name": "f", "arguments": {"a" 1}}'),
    (HARMONY, '<|channel|>commentary to=functions.f<|message|>{"a": '),
]


@pytest.mark.parametrize(("family", "text", "content", "calls"), WELL_FORMED)
def test_calls_are_read_however_their_text_comes(family, text, content, calls):
    assert said(family.reader(NAMES, None).read(text, final=True)) == (content, "", calls)
    for pieces in pieces_of(text):
        parts = read(family, pieces)
        assert said(parts) == (content, "", calls), pieces
        indices = [part.index for part in parts if isinstance(part, ToolCall)]
        assert indices == list(range(len(calls)))


@pytest.mark.parametrize(("family", "text"), NO_CALLS)
def test_what_is_no_call_is_content_as_it_was_written(family, text):
    assert said(family.reader(NAMES, None).read(text, final=True)) == (text, "", [])
    for pieces in pieces_of(text):
        assert said(read(family, pieces)) == (text, "", []), pieces


@pytest.mark.parametrize(("family", "text"), BROKEN)
def test_a_call_that_breaks_is_content_and_in_a_stream_nothing_of_it_is_lost(family, text):
    assert said(family.reader(NAMES, None).read(text, final=True)) == (text, "", [])
    for pieces in pieces_of(text):
        content, _, calls = said(read(family, pieces))
        if not calls:
            assert content == text, pieces
            continue
        ((name, arguments),) = calls
        assert name == "f" and text.rstrip().endswith((arguments + content).rstrip()), pieces


@pytest.mark.parametrize("family", [HERMES, LLAMA, PLAIN, ARRAY, NAMED, GRANITE], ids=lambda f: f.name)
def test_random_calls_come_back_from_random_pieces(family):
    rng = random.Random(7)

    def value(depth):
        kind = rng.randrange(7 if depth else 5)
        if kind < 2:
            return "".join(rng.choices('ab"\\{}[]<>/é\n \u2028😀:,', k=rng.randrange(8)))
        if kind < 5:
            return rng.choice([rng.randrange(-9, 9), 1.5, True, None, 1e30])
        items = [value(depth - 1) for _ in range(rng.randrange(3))]
        return items if kind == 5 else {f"k{index}": item for index, item in enumerate(items)}

    for _ in range(60):
        names = ["".join(rng.choices(string.ascii_letters + "_", k=5)) for _ in range(rng.randrange(1, 4))]
        wanted = [
            (name, json.dumps({"v": value(3), "w": value(2)}, ensure_ascii=rng.random() < 0.5))
            for name in names
        ]
        key = "parameters" if family is LLAMA else "arguments"
        objects = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in wanted]
        text = {
            "hermes": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
            "llama3_json": "; ".join(objects),
            "plain_json": "\n".join(objects),
            "granite": f"<|tool_call|>[{', '.join(objects)}]",
            "mistral": "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in wanted)
            if family is NAMED
            else f"[TOOL_CALLS][{', '.join(objects)}]",
        }[family.name]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert said(read(family, pieces, names=names)) == ("", "", wanted), pieces


@pytest.mark.parametrize(
    "family", [HERMES, LLAMA, ARRAY, NAMED, GRANITE, HARMONY, PLAIN], ids=lambda f: f.name
)
def test_random_text_of_braces_and_marks_is_never_lost(family):
    rng = random.Random(3)
    alphabet = [*family.markers, *'{}[]",:;\\ \n', '"name"', '"f"', '"arguments"', "é", "x"]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(20)))
        content, thought, calls = said(read(family, list(text)))
        if not calls and not thought and family is not HARMONY:
            assert content == text


def test_arguments_come_in_pieces_after_the_name():
    text = '<tool_call>{"name": "f", "arguments": {"city": "Paris"}}</tool_call>'
    reader = HERMES.reader(NAMES, None)
    seen = [(at, part) for at, letter in enumerate(text) for part in reader.read(letter, final=False)]
    name_at = next(at for at, part in seen if isinstance(part, ToolCall))
    assert name_at == text.index("{", 5) + len('"name": "f", "arguments": {')
    pieces = [part.text for _, part in seen if isinstance(part, Arguments)]
    assert len(pieces) > 10 and "".join(pieces) == '{"city": "Paris"}'


def test_calls_beyond_the_most_that_may_be_are_left_out():
    text = "".join(f'<tool_call>{{"name": "f", "arguments": {{"a": {n}}}}}</tool_call>' for n in range(3))
    for pieces in ([text], list(text)):
        assert said(read(HERMES, pieces, most=1)) == ("", "", [("f", '{"a": 0}')])


def test_ids_are_of_the_family_and_differ():
    assert len({HERMES.new_id() for _ in range(100)}) == 100
    assert HERMES.new_id().startswith("call_")
    ids = {ARRAY.new_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(one) == 9 and one.isalnum() for one in ids)
    given = ARRAY.history_id("call_0123456789")
    assert len(given) == 9 and given.isalnum() and given == ARRAY.history_id("call_0123456789")
    assert ARRAY.history_id("abcDEF123") == "abcDEF123"


@pytest.mark.parametrize(
    ("tools", "word"),
    [
        ([Tool("f")] * 2, "twice"),
        ([Tool("")], "name"),
        ([Tool("a b")], "name"),
        ([Tool("f" * 129)], "name"),
        ([Tool(f"f{n}") for n in range(129)], "128"),
        ([Tool("f", parameters={"type": "array"})], "object"),
    ],
)
def test_tools_that_are_none_are_refused(tools, word):
    with pytest.raises(RequestError, match=word) as caught:
        check_tools(tools)
    assert caught.value.param == "tools"
