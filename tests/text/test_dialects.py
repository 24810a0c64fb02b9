"""What is read from a chat template: its family of calls and thoughts, and the messages that it wants."""

from __future__ import annotations

import copy
import json
import random

import jsonschema
import pytest
from transformers import AutoTokenizer

from pymllm.text.chat_template import ChatTemplate
from pymllm.text.conversation import for_template
from pymllm.text.dialect import dialect_of
from pymllm.text.grammars import Grammar, GrammarCompiler
from pymllm.text.parts import Arguments, Content, Reasoning, ToolCall
from pymllm.text.tokenizer import TextStream, Tokenizer
from pymllm.text.tool_calls.base import Tool
from tests.chat_templates import FAMILIES, PLAIN, write_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer(write_tokenizer(folder / name, name)) for name in FAMILIES}


@pytest.mark.parametrize(
    ("name", "calls", "thoughts", "knows_tools", "names", "as_text"),
    [
        ("thinking", "hermes", "think", True, ("reasoning_content",), False),
        ("xml_tools", "hermes", "think", True, ("reasoning_content",), False),
        ("silent", "plain_json", None, False, (), False),
        ("opened", "plain_json", "think", True, (), True),
        ("strict", "plain_json", None, False, (), False),
        ("llama", "llama3_json", None, True, (), False),
        ("mistral", "mistral", None, True, (), False),
        ("mistral_named", "mistral", "mistral", True, ("reasoning",), False),
        ("harmony", "harmony", None, True, ("thinking",), False),
        ("granite", "granite", "granite", True, ("thinking",), False),
        ("plain", "plain_json", None, False, (), False),
    ],
)
def test_a_family_is_known_by_its_template(tokenizers, name, calls, thoughts, knows_tools, names, as_text):
    dialect = dialect_of(tokenizers[name])
    assert dialect.calls.name == calls
    assert (dialect.thoughts.name if dialect.thoughts else None) == thoughts
    assert dialect.knows_tools == knows_tools
    assert dialect.thought_names == names
    assert dialect.arguments_as_text == as_text
    assert dialect.tools_variable == (
        None if not knows_tools else "xml_tools" if name == "xml_tools" else "tools"
    )
    special = FAMILIES[name][1]
    assert dialect.kept_tokens == {mark: 4096 + index for index, mark in enumerate(special)}


TOOLS = [Tool("add", "Add two numbers.", {"type": "object", "properties": {"a": {"type": "integer"}}})]
GIVEN = [
    {"role": "user", "content": "1 + 2?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I add.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "3"},
]


@pytest.mark.parametrize("name", ["thinking", "llama", "mistral", "mistral_named", "harmony", "granite"])
def test_a_conversation_is_written_as_transformers_writes_it(tokenizers, name):
    tokenizer, dialect = tokenizers[name], dialect_of(tokenizers[name])
    reference = AutoTokenizer.from_pretrained(tokenizer.folder)
    # As transformers' documentation has it: arguments are objects, thoughts under the template's own name.
    wanted = copy.deepcopy(GIVEN)
    wanted[1]["content"] = ""
    wanted[1]["tool_calls"][0]["function"]["arguments"] = {"a": "é"}
    for other in ("reasoning", "thinking"):
        wanted[1][other] = wanted[1]["reasoning_content"]
    if name == "granite":  # which writes no calls
        wanted[1]["content"] = '<|tool_call|>[{"name": "add", "arguments": {"a": "é"}}]'
    if name == "mistral":
        made = for_template(GIVEN, TOOLS, dialect)
        wanted[1]["tool_calls"][0]["id"] = wanted[2]["tool_call_id"] = made[2]["tool_call_id"]
    tools = [tool.for_template() for tool in TOOLS]
    expected = reference.apply_chat_template(wanted, tools=tools, tokenize=False, add_generation_prompt=True)
    found = tokenizer.render_chat(for_template(GIVEN, TOOLS, dialect), tools=tools)
    assert found == expected
    assert '"é"' in found


def test_arguments_stay_text_where_the_template_or_they_want_it(tokenizers):
    opened = for_template(GIVEN, [], dialect_of(tokenizers["opened"]))
    assert opened[1]["tool_calls"][0]["function"]["arguments"] == '{"a": "é"}'
    broken = copy.deepcopy(GIVEN)
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"a": '
    made = for_template(broken, [], dialect_of(tokenizers["thinking"]))
    assert made[1]["tool_calls"][0]["function"]["arguments"] == '{"a": '
    empty = copy.deepcopy(GIVEN)
    empty[1]["tool_calls"][0]["function"]["arguments"] = ""
    made = for_template(empty, [], dialect_of(tokenizers["thinking"]))
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_several_calls_of_a_message_come_through_however_few_a_template_writes(tokenizers, tmp_path):
    given = copy.deepcopy(GIVEN)
    given[1]["tool_calls"] += [
        {"id": "call_2", "type": "function", "function": {"name": "sub", "arguments": '{"b": 2}'}},
        {"id": "call_3", "type": "function", "function": {"name": "mul", "arguments": "{}"}},
    ]
    given += [
        {"role": "tool", "tool_call_id": "call_2", "content": "4"},
        {"role": "user", "content": "Well?"},
    ]
    # The template writes the first call of a message.
    llama = for_template(given, TOOLS, dialect_of(tokenizers["llama"]))
    assert [message["role"] for message in llama[1:]] == [*("assistant", "tool") * 2, "assistant", "user"]
    assert [len(message["tool_calls"]) for message in llama[1:6:2]] == [1, 1, 1]
    text = tokenizers["llama"].render_chat(llama)
    assert text.index('"add"') < text.index("3") < text.index('"sub"') < text.index("4") < text.index('"mul"')
    for name in ("thinking", "mistral"):
        assert len(for_template(given, TOOLS, dialect_of(tokenizers[name]))[1]["tool_calls"]) == 3
    # It has tools, and no calls.
    silent = Tokenizer(write_tokenizer(tmp_path, "plain"))
    silent.use_chat_template(ChatTemplate("{{ tools | tojson }}" + PLAIN, "x"))
    made = for_template(given, TOOLS, dialect_of(silent))
    text = silent.render_chat(made, tools=[tool.for_template() for tool in TOOLS])
    assert '{"name": "sub", "arguments": {"b": 2}}\n{"name": "mul", "arguments": {}}' in text


@pytest.mark.parametrize(
    "arguments", ['{"a": "\\ud83d"}', '{"a": 1e999}'], ids=["half a character", "too large"]
)
def test_arguments_that_no_template_can_write_stay_text(tokenizers, arguments):
    given = copy.deepcopy(GIVEN)
    given[1]["tool_calls"][0]["function"]["arguments"] = arguments
    (_, made, _) = for_template(given, TOOLS, dialect_of(tokenizers["thinking"]))
    assert made["tool_calls"][0]["function"]["arguments"] == arguments
    assert json.dumps(arguments) in tokenizers["thinking"].render_chat([made])


def test_variables_are_what_a_template_reads_and_not_its_words(tokenizers):
    tokenizer = copy.copy(tokenizers["plain"])
    tokenizer.use_chat_template(
        ChatTemplate(
            "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}thinking: "
            "{{ messages[0].reasoning_effort }}{% for message in messages %}{{ message.content }}{% endfor %}",
            "x",
        )
    )
    assert dialect_of(tokenizer).variables == {"messages", "enable_thinking"}


def test_a_template_without_tools_gets_them_in_words(tokenizers):
    dialect = dialect_of(tokenizers["plain"])
    second = {"role": "tool", "tool_call_id": "call_2", "name": "add", "content": "4"}
    system, user, assistant, results = for_template([*GIVEN, second], TOOLS, dialect)
    assert system["role"] == "system" and json.dumps(TOOLS[0].for_template()["function"]) in system["content"]
    assert user == GIVEN[0]
    assert assistant == {"role": "assistant", "content": '{"name": "add", "arguments": {"a": "é"}}'}
    assert results == {"role": "user", "content": "The result of add:\n3\n\nThe result of add:\n4"}
    strict = dialect_of(tokenizers["strict"])
    user = {"role": "user", "content": "And now?"}
    made = for_template([*GIVEN, second, user], TOOLS, strict)
    assert [message["role"] for message in made] == ["user", "assistant", "user"]
    assert made[0]["content"] == f"{system['content']}\n\n1 + 2?"
    assert made[2]["content"] == results["content"] + "\n\nAnd now?"
    tokenizers["strict"].render_chat(made)
    (own, *_) = for_template([{"role": "system", "content": "Be brief."}, *GIVEN], TOOLS, dialect)
    assert own["content"] == "Be brief.\n\n" + system["content"]


def test_parts_reach_the_template_as_it_reads_them(tokenizers):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer = tokenizers["thinking"]
    [made] = for_template([{"role": "user", "content": parts}], [], dialect_of(tokenizer))
    joined = [{"role": "user", "content": "a\nb"}]
    assert tokenizer.render_chat([made]) == tokenizer.render_chat(joined)


def random_schema(rng, depth=2):
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return {"enum": rng.sample(["a", "b c", "é", '"q"', 7, None], 2)}
    if kind == 1:
        return {"type": "integer", "minimum": -3, "maximum": 12}
    if kind == 2:
        return {"type": "boolean"}
    if kind == 3:
        return {"type": "string", "maxLength": 4}
    if kind == 4:
        return {"const": "x"}
    if kind == 5:
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": 2}
    return random_parameters(rng, depth - 1)


def random_parameters(rng, depth=2):
    names = [f"p{index}" for index in range(rng.randrange(3))]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": names[: rng.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def answer_by_chance(tokenizer, grammar, rng):
    """Follow a grammar by allowed tokens taken by chance, the shorter ones more often; return the text."""
    compiler = GrammarCompiler(tokenizer, 4096 + 8, [2])
    matcher, stream = compiler.start(Grammar("lark", grammar)), None
    dialect = dialect_of(tokenizer)
    stream = TextStream(tokenizer, begins=False, kept=dialect.kept(with_tools=True))
    for _ in range(400):
        allowed = matcher.allowed().nonzero().flatten().tolist()
        few = sorted(
            rng.sample(allowed, min(len(allowed), 6)), key=lambda token: len(tokenizer.token_text(token))
        )
        token = 2 if 2 in allowed and rng.random() < 0.5 else few[0]
        matcher.accept(token)
        if token == 2:
            break
        stream.push(token)
        if matcher.complete:
            break
    else:
        pytest.fail("the grammar has no end")
    stream.finish()
    return stream.text


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_forced_calls_are_read_again_and_follow_the_schemas(tokenizers, name, seed):
    rng = random.Random(seed)
    tools = [Tool(f"tool_{index}", None, random_parameters(rng)) for index in range(rng.randrange(1, 4))]
    dialect, most = dialect_of(tokenizers[name]), rng.choice([1, 3])
    opened = name == "opened"
    prompt = "<|im_start|>assistant\n" + ("<think>\n" if opened else "")
    # Thoughts by chance have no end: after a prompt that closes them there are none.
    if dialect.thoughts is not None and not opened:
        prompt += dialect.thoughts.starts[0] + dialect.thoughts.ends[0]
    grammar = dialect.grammar(tools, most=most, schema=None, prompt=prompt, opened=opened)
    if opened:
        grammar = grammar.replace("/(?s:.*)/", "/[a-z]{0,3}/")
    if name == "harmony":
        grammar = grammar.replace("/(?s:.*)/", "/[a-z]{0,3}/")
    text = answer_by_chance(tokenizers[name], grammar, rng)
    parts = dialect.reader(tools, most=most, opened=opened).read(text, final=True)
    assert not any(isinstance(part, Content) for part in parts), text
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert 1 <= len(calls) <= most, text
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in calls:
        arguments = "".join(p.text for p in parts if isinstance(p, Arguments) and p.index == call.index)
        jsonschema.validate(json.loads(arguments), schemas[call.name])


def accepts(tokenizer, grammar, text):
    compiler = GrammarCompiler(tokenizer, 4096 + 8, [2])
    matcher = compiler.start(Grammar("lark", grammar))
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return matcher.complete or bool(matcher.allowed()[2])


@pytest.mark.parametrize(
    ("name", "texts", "others"),
    [
        ("thinking", ["<think>\nHm < {\n</think>\n\n{}", "{}"], ["Hm", "<think>{}"]),
        ("mistral_named", ["[THINK]Hm[/THINK]{}", "{}"], ["Hm{}", "[THINK]{}"]),
        (
            "harmony",
            [
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>{}",
                "<|channel|>final<|message|>{}",
            ],
            ["{}", "<|channel|>final<|message|>Hm"],
        ),
    ],
)
def test_a_model_may_think_before_it_follows_a_schema(tokenizers, name, texts, others):
    dialect = dialect_of(tokenizers[name])
    grammar = dialect.grammar([], most=None, schema={"type": "object"}, prompt="", opened=False)
    for text in texts:
        assert accepts(tokenizers[name], grammar, text), text
        parts = dialect.reader([], most=None, opened=False).read(text, final=True)
        assert "".join(part.text for part in parts if isinstance(part, Content)) == "{}"
        thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
        assert thought == ("Hm < {" if "<think>" in text else "Hm" if "Hm" in text else "")
    for text in others:
        assert not accepts(tokenizers[name], grammar, text), text


def test_calls_or_an_answer_that_follows_a_schema(tokenizers):
    dialect = dialect_of(tokenizers["thinking"])
    grammar = dialect.grammar(TOOLS, most=1, schema={"const": "said"}, prompt="</think>", opened=False)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert accepts(tokenizers["thinking"], grammar, call)
    assert accepts(tokenizers["thinking"], grammar, '"said"')
    assert not accepts(tokenizers["thinking"], grammar, "said")


@pytest.mark.parametrize("name", ["thinking", "llama", "mistral", "mistral_named", "granite", "plain"])
def test_strict_tools_are_held_to_their_schemas_where_they_are_called(tokenizers, name):
    strict = [Tool("add", None, TOOLS[0].parameters, True), Tool("loose", None, {"required": ["x"]})]
    tokenizer, dialect = tokenizers[name], dialect_of(tokenizers[name])
    grammar = dialect.strict_grammar(strict, most=None, opened=False)

    def call(tool, arguments):
        key = "parameters" if name == "llama" else "arguments"
        written = f'{{"name": "{tool}", "{key}": {arguments}}}'
        return {
            "thinking": f"<tool_call>\n{written}\n</tool_call>",
            "mistral": f"[TOOL_CALLS][{written}]",
            "mistral_named": f"[TOOL_CALLS]{tool}[ARGS]{arguments}",
            "granite": f"<|tool_call|>[{written}]",
        }.get(name, written)

    good, loose = call("add", '{"a": 1}'), call("loose", '{"b": 2}')
    texts = ["Just text, {x}.", '{"a": 1}', good, loose]
    if name not in ("llama", "plain"):
        texts += [f"See:\n{good}"]
    if name == "mistral_named":
        texts += ["[THINK]Hm.[/THINK]Yes", f"[THINK]Hm.[/THINK]{good}"]
    if name == "thinking":
        texts += [f"<think>\nHm.\n</think>\n\n{good}\n{loose}"]
    for text in texts:
        assert accepts(tokenizer, grammar, text), text
    for text in (call("add", '{"a": "x"}'), call("none", "{}")):
        assert not accepts(tokenizer, grammar, text), text


def test_special_tokens_that_are_kept_are_in_the_text_and_others_are_not(tokenizers):
    tokenizer = tokenizers["mistral_named"]
    text = 'a [TOOL_CALLS]f[ARGS]{"a": 1}<|im_end|> b'
    ids = tokenizer.encode(text, add_special_tokens=False)
    kept = dialect_of(tokenizer).kept(with_tools=True)
    for settings, wanted in (
        ({}, 'a f{"a": 1} b'),
        ({"kept": kept}, 'a [TOOL_CALLS]f[ARGS]{"a": 1} b'),
        ({"special": True}, text),
    ):
        stream = TextStream(tokenizer, **settings)
        assert "".join([*map(stream.push, ids), stream.finish()]) == wanted == stream.text
    stream = TextStream(tokenizer, ["1}"], with_stop=True)
    assert "".join([*map(stream.push, ids), stream.finish()]) == 'a f{"a": 1}'
    assert stream.stopped
