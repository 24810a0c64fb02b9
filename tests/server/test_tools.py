"""Tools and thoughts over a real socket, with the official client."""

from __future__ import annotations

import copy
import json
import re

import jsonschema
import openai
import pytest

from pymllm.server import service as service_module
from pymllm.text.grammars import GrammarCompiler
from pymllm.text.tokenizer import Tokenizer
from tests.chat_templates import write_tokenizer
from tests.server.conftest import serve

MODEL = "shipped"
MESSAGES = [{"role": "user", "content": "What is the weather?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Ask.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}},
]
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def with_template(llm, folder, name, **settings):
    """The shipped model with another template."""
    other = copy.copy(llm)
    other.tokenizer = Tokenizer(write_tokenizer(folder, name, **settings))
    other.grammars = GrammarCompiler(other.tokenizer, llm.config.size("vocab_size"), [2, 0])
    return other


@pytest.fixture(scope="module")
def thinking(llm, tmp_path_factory):
    with serve(with_template(llm, tmp_path_factory.mktemp("thinking"), "thinking")) as running:
        yield running


@pytest.fixture(scope="module")
def mistral(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    with serve(with_template(llm, folder, "mistral", in_place_of_padding="[TOOL_CALLS]")) as running:
        yield running


@pytest.fixture
def script(monkeypatch):
    """Have the model answer chats with a given text, token by token; seen has what was prepared."""
    prepare, seen = service_module.prepare_chat, []

    def install(lark):
        def scripted(*args):
            chat = prepare(*args)
            chat.settings["grammar"] = f"start: {lark}"
            seen.append(chat)
            return chat

        monkeypatch.setattr(service_module, "prepare_chat", scripted)
        return seen

    return install


def ask(client, **settings):
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 200, **settings}
    return client.chat.completions.create(**given)


def streamed(client, **settings):
    """A stream's deltas put together as a message, its calls, and why it ended."""
    content = thought = ""
    calls, reason = [], None
    for chunk in ask(client, stream=True, **settings):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        thought += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls) and call.type == "function" and call.function.arguments == ""
                calls.append([call.function.name, ""])
            else:
                calls[call.index][1] += call.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    return content, thought, calls, reason


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("server", ["served", "thinking", "mistral"])
def test_a_forced_call_follows_its_schema(request, server, choice):
    client = request.getfixturevalue(server).client()
    settings = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    if server == "thinking":
        settings["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(client, **settings).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert choice == "required" or call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    content, _, calls, reason = streamed(client, **settings)
    assert (content, reason) == ("", "tool_calls")
    assert calls == [[call.function.name, call.function.arguments]]
    assert len(call.id) == 9 if server == "mistral" else call.id.startswith("call_")


def test_allowed_tools_are_the_ones_that_are_called(client):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert answer.choices[0].message.tool_calls[0].function.name == "add"


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": true}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "thought", "calls"),
    [
        (f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}", "Let me see.", "Hm.", [["add", '{"a": true}']]),
        (f"{CALL}\n{CALL}", None, None, [["add", '{"a": true}']] * 2),
        ("<tool_call>none</tool_call>", "<tool_call>none</tool_call>", None, []),
        ("plain é 😀", "plain é 😀", None, []),
    ],
)
def test_an_answer_s_parts_are_told_apart(thinking, script, text, content, thought, calls):
    script(json.dumps(text, ensure_ascii=False))
    client = thinking.client()
    answer = ask(client, tools=TOOLS).choices[0]
    message = answer.message
    assert (message.content, getattr(message, "reasoning_content", None)) == (content, thought)
    assert [[call.function.name, call.function.arguments] for call in message.tool_calls or ()] == calls
    reason = "tool_calls" if calls else "stop"
    assert answer.finish_reason == reason
    assert streamed(client, tools=TOOLS) == (content or "", thought or "", calls, reason)


def test_without_tools_a_call_is_text(thinking, script):
    script(json.dumps(CALL))
    assert ask(thinking.client()).choices[0].message.content == CALL
    assert ask(thinking.client(), tools=TOOLS, tool_choice="none").choices[0].message.content == CALL


def test_with_one_call_at_most_further_ones_are_left_out(thinking, script):
    script(json.dumps(f"{CALL}\n{CALL}"))
    answer = ask(thinking.client(), tools=TOOLS, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_several_answers_have_calls_of_their_own(thinking, script):
    script(json.dumps(f"{CALL}\n{CALL}"))
    answer = ask(thinking.client(), tools=TOOLS, n=2)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def test_a_special_token_before_calls_is_read_and_not_shown(mistral, script):
    script('"Yes. " <[3]> ' + json.dumps('[{"name": "add", "arguments": {"a": true}}]'))
    for choice, calls in ((None, 1), ("none", 0)):
        settings = {"tools": TOOLS} if choice is None else {"tools": TOOLS, "tool_choice": choice}
        message = ask(mistral.client(), **settings).choices[0].message
        assert len(message.tool_calls or ()) == calls
        assert "TOOL_CALLS" not in message.content and message.content.startswith("Yes.")
    shown = ask(mistral.client(), extra_body={"skip_special_tokens": False})
    assert "[TOOL_CALLS]" in shown.choices[0].message.content


@pytest.mark.parametrize("server", ["served", "thinking", "mistral"])
def test_an_assistant_s_message_goes_back_as_it_came(request, server, script):
    running = request.getfixturevalue(server)
    client = running.client()
    forced = {"tools": TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False}
    message = ask(client, **forced).choices[0].message
    history = [
        *MESSAGES,
        {**message.model_dump(), "annotations": [], "name": "me"},
        {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "content": [{"type": "text", "text": "Sun."}],
        },
        {"role": "assistant", "content": None, "refusal": "I will not.", "reasoning": "No.", "images": []},
        {"role": "user", "content": "Why?", "tool_calls": [], "provider_fields": {"refusal": None}},
    ]
    seen = script('"x"')
    ask(client, messages=history, tools=TOOLS)
    prompt = running.llm.tokenizer.decode(seen[-1].prompt, skip_special_tokens=False)
    assert json.dumps(json.loads(message.tool_calls[0].function.arguments)) in prompt
    assert "Sun." in prompt and "I will not." in prompt
    assert ("<think>\nNo.\n</think>" in prompt) == (server == "thinking")


def test_what_a_client_has_read_of_a_message_goes_back_with_it(client, script):
    settings = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    with client.chat.completions.stream(**settings, tool_choice=NAMED) as stream:
        message = stream.get_final_completion().choices[0].message.model_dump()
    assert "parsed_arguments" in message["tool_calls"][0]["function"]
    seen = script('"x"')
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Sun."}
    for read in ({"a": True}, None):
        message["parsed"] = message["tool_calls"][0]["function"]["parsed_arguments"] = read
        ask(client, messages=[*MESSAGES, message, result], tools=TOOLS)
    assert seen[0].prompt == seen[1].prompt


def test_template_variables_reach_the_template(thinking, script):
    seen = script('"x"')
    tokenizer = thinking.llm.tokenizer
    for body, variables in (
        ({}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "medium"}, {}),
    ):
        ask(thinking.client(), extra_body=body)
        assert seen[-1].prompt == tokenizer.apply_chat_template(MESSAGES, variables=variables)
    without = ask(thinking.client(), extra_body={"add_generation_prompt": False})
    assert without.usage.prompt_tokens == len(
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    )


def test_tools_come_in_the_variable_that_the_template_reads(llm, tmp_path, script):
    with serve(with_template(llm, tmp_path, "xml_tools")) as running:
        seen = script('"x"')
        ask(running.client(), tools=TOOLS)
        prompt = running.llm.tokenizer.decode(seen[-1].prompt, skip_special_tokens=False)
    assert prompt.count(json.dumps(WEATHER)) == 1


def test_a_message_is_continued(thinking, script, monkeypatch):
    asked = {}

    def apply(messages, **settings):
        asked.update(settings)
        return [5, 6, 7]

    monkeypatch.setattr(thinking.llm.tokenizer, "apply_chat_template", apply)
    script('" end</think>said"')
    history = [*MESSAGES, {"role": "assistant", "content": "<think>begun"}]
    message = (
        ask(thinking.client(), messages=history, extra_body={"continue_final_message": True})
        .choices[0]
        .message
    )
    assert asked["continue_final_message"] and not asked["add_generation_prompt"]
    assert (message.reasoning_content, message.content) == ("end", "said")


@pytest.mark.parametrize("tools", [False, True])
def test_a_schema_holds_beside_tools_and_after_thoughts(thinking, client, tools):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": ADD}}
    given = {"tools": TOOLS} if tools else {}
    for one, body in (
        (client, {}),
        (thinking.client(), {"chat_template_kwargs": {"enable_thinking": False}}),
    ):
        answer = ask(one, response_format=form, parallel_tool_calls=False, extra_body=body, **given).choices[
            0
        ]
        if answer.message.tool_calls:
            call = answer.message.tool_calls[0]
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        else:
            jsonschema.validate(json.loads(answer.message.content), ADD)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"json": ADD}, r'\{\s*"a"'),
        ({"regex": "(ab){3}"}, "^ababab$"),
        ({"choice": ["yes", "n+o"]}, r"^(yes|n\+o)$"),
        ({"grammar": 'start: "x" "y"', "disable_any_whitespace": False}, "^xy$"),
        ({"json_object": True}, r"^\{"),
    ],
)
def test_structured_outputs_are_vllm_s(client, outputs, pattern):
    content = ask(client, extra_body={"structured_outputs": outputs}).choices[0].message.content
    assert re.search(pattern, content)


def test_the_stop_string_may_stay(client):
    settings = {"prompt": "def f(x):", "model": MODEL, "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**settings).choices[0].text
    stop = text[4:7]
    for stream in (False, True):
        answer = client.completions.create(
            **settings, stop=stop, stream=stream, extra_body={"include_stop_str_in_output": True}
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop) + 3]


MANY = [{"type": "function", "function": {"name": f"f{index}"}} for index in range(129)]


@pytest.mark.parametrize(
    ("param", "word", "body"),
    [
        (
            "tool_choice",
            "get_wether",
            {"tools": TOOLS, "tool_choice": {**NAMED, "function": {"name": "get_wether"}}},
        ),
        ("tool_choice", "no tools", {"tool_choice": "required"}),
        ("tool_choice", "no tools", {"tool_choice": NAMED, "tools": []}),
        ("tool_choice", "must be", {"tools": TOOLS, "tool_choice": "any"}),
        ("tool_choice", "must be", {"tools": TOOLS, "tool_choice": {"type": "custom"}}),
        ("tool_choice", "must be", {"tools": TOOLS, "tool_choice": {"type": ["function"]}}),
        ("tools", "twice", {"tools": [TOOLS[0], TOOLS[0]]}),
        ("tools", "128", {"tools": MANY}),
        ("tools", "name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        (
            "tools",
            "tools.0.function.colour",
            {"tools": [{"type": "function", "function": {"name": "f", "colour": 1}}]},
        ),
        ("tools", "type", {"tools": [{"type": "web_search"}]}),
        (
            "tools",
            "cannot be compiled",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 3}}}],
                "tool_choice": "required",
            },
        ),
        (
            "tools",
            "cannot be compiled",
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"properties": 3}},
                    }
                ]
            },
        ),
        ("functions", "not supported", {"functions": [{"name": "f"}]}),
        (
            "response_format",
            "tool_choice none",
            {"tools": TOOLS, "response_format": {"type": "regex", "regex": "a"}},
        ),
        ("guided_regex", "tool_choice none", {"tools": TOOLS, "guided_regex": "a"}),
        ("structured_outputs", "one of", {"structured_outputs": {}}),
        ("structured_outputs", "one of", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("structured_outputs", "structural_tag", {"structured_outputs": {"structural_tag": "{}"}}),
        ("chat_template_kwargs", "colour", {"chat_template_kwargs": {"colour": 1}}),
        ("chat_template_kwargs", "messages", {"chat_template_kwargs": {"messages": []}}),
        ("chat_template_kwargs", "enable_thinking", {"chat_template_kwargs": {"enable_thinking": True}}),
        ("documents", "template", {"documents": [{"text": "x"}]}),
        ("reasoning_effort", "template", {"reasoning_effort": "high"}),
        ("continue_final_message", "assistant", {"continue_final_message": True}),
        (
            "continue_final_message",
            "add_generation_prompt",
            {"continue_final_message": True, "add_generation_prompt": True},
        ),
        (
            "messages",
            "messages.0.content.0.colour",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}]},
        ),
        ("messages", "messages.0.colour", {"messages": [{"role": "user", "content": "x", "colour": 1}]}),
        ("messages", "tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
    ],
)
def test_what_cannot_be_honoured_is_named(client, param, word, body):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=body)
    assert caught.value.param == param
    assert word in caught.value.message


def test_what_asks_for_nothing_is_accepted(client):
    ask(
        client,
        max_tokens=2,
        extra_body={
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "chat_template_kwargs": {"enable_thinking": False, "documents": None},
            "documents": [],
            "reasoning_effort": "none",
            "continue_final_message": False,
            "add_generation_prompt": True,
            "skip_special_tokens": True,
            "structured_outputs": None,
        },
    )


def test_python_s_chat_passes_tools_and_variables_to_the_template(thinking):
    llm = thinking.llm
    answer = llm.chat(
        MESSAGES, llm.default_params(max_tokens=1), tools=TOOLS, variables={"enable_thinking": False}
    )
    wanted = llm.tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, variables={"enable_thinking": False})
    assert answer.prompt_token_ids == tuple(wanted)
