"""Answers whose parts a script says: items of the Responses API, blocks of the Messages API; whole and streamed."""

from __future__ import annotations

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import StreamPiece
from pymllm.server.answers.anthropic import MessagesAnswer
from pymllm.server.answers.conversation import Conversation
from pymllm.server.answers.responses import ResponsesAnswer
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.server.protocol.base import read_request
from pymllm.server.protocol.responses import ResponsesRequest
from pymllm.text.parts import Arguments, Content, Reasoning, ToolCall

EVENTS = TypeAdapter(ResponseStreamEvent)
CALLS = '<a>{"city": "Oslo"}</a><b>{"n": [1, 2]}</b>'
TEXTS = {
    "said": "Hello, world.",
    "thought and said": "Hm. Well|Hello.",
    "called": CALLS,
    "thought, said and called": "Let me see|I look it up." + CALLS,
    "thought alone": "Hm. Well|",
    "nothing": "",
    "cut off in a call": '<a>{"city": "Oslo", "days": 3, "note": "fo',
}


class ScriptReader:
    """A reader that takes what comes before | for thoughts, and <name>{...}</name> for calls; a letter at a time."""

    def __init__(self, thinks: bool) -> None:
        self.thinks, self.calls, self.tag, self.inside = thinks, 0, "", False

    def read(self, text, *, final):
        parts = [part for letter in text for part in self.one(letter)]
        return parts

    def one(self, letter):
        if self.tag or letter == "<":
            self.tag += letter
            if letter != ">":
                return []
            name, self.tag = self.tag.strip("<>"), ""
            self.inside = not name.startswith("/")
            if not self.inside:
                return []
            self.calls += 1
            return [ToolCall(self.calls - 1, f"call_{self.calls}", name)]
        if self.thinks and letter == "|":
            self.thinks = False
            return []
        if self.inside:
            return [Arguments(self.calls - 1, letter)]
        return [Reasoning(letter) if self.thinks else Content(letter)]


def output_of(llm, text, reason="stop", stopped_by=None, cached=0):
    ids = tuple(llm.encode(text)) or (0,)
    entries = tuple(TokenLogprobs(token, -0.5, ((token, -0.5), (3, -1.5))) for token in ids)
    return RequestOutput(
        tuple(range(5, 25)), ids, text, reason, 0.1, 0.1, entries, cached_tokens=cached, stopped_by=stopped_by
    )


def pieces_of(llm, output):
    """The pieces of a stream, a token each."""
    texts = [llm.tokenizer.decode([token]) for token in output.token_ids] if output.text else [""]
    assert "".join(texts) == output.text
    last = len(texts) - 1
    return [
        StreamPiece(
            text, (token,), output if at == last else None, (entry,), None, 0, 20, output.cached_tokens
        )
        for at, (text, token, entry) in enumerate(zip(texts, output.token_ids, output.logprobs, strict=True))
    ]


def answers(llm, kind, answer, text, **asked):
    """A function that begins the answer to the same request."""
    request = read_request(kind, {"max_tokens": 9, **asked} if kind is MessagesRequest else asked)
    reader = lambda: ScriptReader("|" in text)  # noqa: E731
    return lambda: answer("m", llm.tokenizer, Conversation(reader), request, SamplingParams(logprobs=1))


def stream(answer, pieces):
    events = [*answer.begin(1)]
    for piece in pieces:
        events += answer.add(0, piece)
    events += answer.end([pieces[-1].output])
    # As they go over the wire, each under its name.
    for event in events:
        name, data, rest = event.encode().split("\n", 2)
        assert rest == "\n" and name == f"event: {event.data['type']}"
        assert json.loads(data.removeprefix("data: ")) == event.data
    return [json.loads(json.dumps(event.data)) for event in events]


def without(value, *names):
    if isinstance(value, dict):
        return {key: without(one, *names) for key, one in value.items() if key not in names}
    return [without(one, *names) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_events_of_a_response_are_openai_s_and_add_up_to_the_whole_one(llm, text, reason):
    output = output_of(llm, text, reason, cached=16)
    begin = answers(
        llm, ResponsesRequest, ResponsesAnswer, text, input="Hi", include=["message.output_text.logprobs"]
    )
    whole, events = begin().whole([output]), stream(begin(), pieces_of(llm, output))
    Response.model_validate(whole, strict=True)
    for event in events:
        EVENTS.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    status = "incomplete" if reason == "length" else "completed"
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{status}" and whole["status"] == status
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == "length" else None)
    assert without(events[-1]["response"], "id", "created_at") == without(whole, "id", "created_at")
    assert whole["usage"]["input_tokens"] == 20
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 16
    assert whole["usage"]["output_tokens"] == len(output.token_ids)
    thought = text.partition("|")[0] if "|" in text else ""
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len(llm.encode(thought))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_each_item_of_a_response_comes_in_openai_s_order(llm, text):
    output = output_of(llm, text)
    events = stream(
        answers(llm, ResponsesRequest, ResponsesAnswer, text, input="Hi")(), pieces_of(llm, output)
    )
    final = events[-1]["response"]["output"]
    for place, item in enumerate(final):
        own = [event for event in events if event.get("output_index") == place]
        names = [event["type"].removeprefix("response.") for event in own]
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        kind = {"message": "output_text", "reasoning": "reasoning_text"}.get(item["type"])
        kind = kind or "function_call_arguments"
        deltas = [event["delta"] for event in own if event["type"] == f"response.{kind}.delta"]
        parts = kind != "function_call_arguments"
        expected = ["output_item.added", *["content_part.added"] * parts, *[f"{kind}.delta"] * len(deltas)]
        assert names == [*expected, f"{kind}.done", *["content_part.done"] * parts, "output_item.done"]
        text_of_it = item["content"][0]["text"] if parts else item["arguments"]
        assert "".join(deltas) == text_of_it
        assert own[0]["item"]["status"] == "in_progress" and own[-1]["item"] == item
    said = [item["type"] for item in final]
    assert (
        said
        == {
            "said": ["message"],
            "thought and said": ["reasoning", "message"],
            "called": ["function_call"] * 2,
            "thought, said and called": ["reasoning", "message", "function_call", "function_call"],
            "thought alone": ["reasoning"],
            "nothing": ["message"],
            "cut off in a call": ["function_call"],
        }[next(name for name, one in TEXTS.items() if one == text)]
    )


def test_a_text_of_a_response_has_the_log_probabilities_of_its_own_tokens(llm):
    text = TEXTS["thought, said and called"]
    output = output_of(llm, text)
    asked = {"input": "Hi", "top_logprobs": 2}
    whole = answers(llm, ResponsesRequest, ResponsesAnswer, text, **asked)().whole([output])
    message = next(item for item in whole["output"] if item["type"] == "message")
    content = message["content"][0]
    spelled = "".join(entry["token"] for entry in content["logprobs"])
    assert content["text"] in spelled and len(spelled) < len(content["text"]) + 8
    assert content["logprobs"][0]["bytes"] == list(content["logprobs"][0]["token"].encode())
    assert [entry["logprob"] for entry in content["logprobs"][0]["top_logprobs"]] == [-0.5, -1.5]
    silent = answers(llm, ResponsesRequest, ResponsesAnswer, "Hi.", input="Hi")()
    bare = RequestOutput((1,), (5,), "Hi.", "stop", 0.1, 0.1)
    assert silent.whole([bare])["output"][0]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("text", ["Hm. Well|Hello.", '<a>{"n": 1}</a>Hello.'])
def test_the_tokens_of_a_mark_are_not_those_of_the_message_behind_it(llm, text):
    begin = answers(llm, ResponsesRequest, ResponsesAnswer, text, input="Hi", top_logprobs=1)
    output = output_of(llm, text)
    for answer in (begin().whole([output]), stream(begin(), pieces_of(llm, output))[-1]["response"]):
        content = answer["output"][-1]["content"][0]
        assert content["text"] == "Hello."
        first, *others = [entry["token"] for entry in content["logprobs"]]
        assert (first + "".join(others)).endswith("Hello.") and len("".join(others)) < len("Hello.")


def test_a_response_that_fails_says_what_was_there_so_far(llm):
    text = TEXTS["thought and said"]
    answer = answers(llm, ResponsesRequest, ResponsesAnswer, text, input="Hi")()
    answer.begin(1)
    for piece in pieces_of(llm, output_of(llm, text))[:-1]:
        answer.add(0, piece)
    (event,) = answer.fail(500, "the model broke")
    EVENTS.validate_python(dict(event.data), strict=True)
    response = event.data["response"]
    assert (event.name, response["status"]) == ("response.failed", "failed")
    assert response["error"] == {"code": "server_error", "message": "the model broke"}
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]


def blocks_of(events):
    """Put the events of Anthropic's stream together, as the documents say."""
    blocks, open_at = [], None
    for event in events:
        if event["type"] == "content_block_start":
            assert open_at is None and event["index"] == len(blocks)
            open_at = event["index"]
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_at
            delta, block = event["delta"], blocks[-1]
            name = {
                "text_delta": "text",
                "thinking_delta": "thinking",
                "signature_delta": "signature",
                "input_json_delta": "json",
            }[delta["type"]]
            block[name] += delta["partial_json" if name == "json" else name]
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_at
            open_at = None
    assert open_at is None
    return blocks


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_events_of_a_message_add_up_to_the_whole_one(llm, text, reason):
    output = output_of(llm, text, reason, cached=16)
    begin = answers(llm, MessagesRequest, MessagesAnswer, text, messages=[{"role": "user", "content": "Hi"}])
    whole, events = begin().whole([output]), stream(begin(), pieces_of(llm, output))
    start, delta, stop = events[0], events[-2], events[-1]
    assert (start["type"], delta["type"], stop) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    assert start["message"]["content"] == [] and start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["input_tokens"] == 4
    assert start["message"]["usage"]["cache_read_input_tokens"] == 16
    blocks = blocks_of(events)
    for block, expected in zip(blocks, whole["content"], strict=True):
        written = block.pop("json")
        if block["type"] == "tool_use":
            closed = written if written.endswith("}") else written[: written.rindex(",")] + "}"
            block["input"] = json.loads(closed)
        assert block == expected
    usage = {name: value for name, value in whole["usage"].items() if name != "service_tier"}
    assert delta["usage"] == usage
    ended = {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
    assert delta["delta"] == ended
    called = any(block["type"] == "tool_use" for block in blocks)
    natural = "tool_use" if called else "end_turn"
    assert whole["stop_reason"] == ("max_tokens" if reason == "length" else natural)
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 20
    assert usage["output_tokens"] == len(output.token_ids)


def test_a_message_says_which_stop_sequence_ended_it(llm):
    output = output_of(llm, "Hello", stopped_by="END")
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    whole = answers(llm, MessagesRequest, MessagesAnswer, "Hello", **asked)().whole([output])
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")


def test_thoughts_that_are_to_be_omitted_are_a_signed_empty_block(llm):
    text = TEXTS["thought and said"]
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "thinking": {"type": "adaptive", "display": "omitted"},
    }
    begin = answers(llm, MessagesRequest, MessagesAnswer, text, **asked)
    whole = begin().whole([output_of(llm, text)])
    events = stream(begin(), pieces_of(llm, output_of(llm, text)))
    thinking, said = whole["content"]
    assert thinking["thinking"] == "" and len(thinking["signature"]) == 64 and said["text"] == "Hello."
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[0] == "signature_delta" and "thinking_delta" not in deltas


def test_a_message_that_fails_ends_with_anthropic_s_error(llm):
    answer = answers(llm, MessagesRequest, MessagesAnswer, "Hi", messages=[{"role": "user", "content": "Hi"}])
    (event,) = answer().fail(500, "the model broke")
    assert event.name == "error"
    assert event.data == {"type": "error", "error": {"type": "api_error", "message": "the model broke"}}
    (event,) = answer().fail(503, "the server stops")
    assert event.data["error"]["type"] == "overloaded_error"
