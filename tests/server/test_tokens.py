"""/tokenize and /detokenize as vLLM has them; /version, /plan and the cards of models; HEAD where GET is."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

import pymllm
from tests.processes import SECONDS

from .conftest import MODEL

MESSAGES = [{"role": "user", "content": "Write a function."}]


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served.url, timeout=SECONDS) as client:
        yield client


def post(http, path, **body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_becomes_its_tokens_and_back(http, llm):
    text = "def f(x):\n    return 'Grüße 🎈'\n"
    ids = llm.encode(text)
    answer = post(http, "/tokenize", model=MODEL, prompt=text)
    longest = llm.plan.kv_cache["max_model_len"]
    assert answer == {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": None}
    assert post(http, "/detokenize", model=MODEL, tokens=ids) == {"prompt": text}
    spelled = post(http, "/tokenize", prompt=text, return_token_strs=True)["token_strs"]
    assert len(spelled) == len(ids) and spelled[:2] == ["def", "Ġf"]
    special = llm.tokenizer.encode("<|endoftext|>", add_special_tokens=False)
    assert post(http, "/detokenize", tokens=special) == {"prompt": "<|endoftext|>"}
    assert post(http, "/tokenize", prompt="")["tokens"] == llm.encode("")
    assert post(http, "/detokenize", tokens=[]) == {"prompt": ""}


def test_a_conversation_becomes_its_tokens(http, llm):
    def count(**asked):
        return post(http, "/tokenize", messages=MESSAGES, **asked)["tokens"]

    assert count() == llm.tokenizer.apply_chat_template(MESSAGES)
    bare = llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert count(add_generation_prompt=False) == bare != count()
    assert count(add_special_tokens=False, chat_template_kwargs={}, tools=None) == count()
    assert post(http, "/detokenize", tokens=count())["prompt"].endswith("\n")


@pytest.mark.parametrize(
    ("path", "param", "asked"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "prompt", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", "prompt", {"prompt": [1, 2]}),
        ("/tokenize", "tool_choice", {"prompt": "x", "tool_choice": "required"}),
        ("/tokenize", "chat_template_kwargs", {"prompt": "x", "chat_template_kwargs": {"y": 1}}),
        ("/tokenize", "continue_final_message", {"messages": MESSAGES, "continue_final_message": True}),
        ("/tokenize", "add_special_tokens", {"messages": MESSAGES, "add_special_tokens": True}),
        ("/tokenize", "messages", {"messages": []}),
        ("/tokenize", "messages", {"messages": [{"role": "robot", "content": "Hi"}]}),
        ("/tokenize", "chat_template", {"messages": MESSAGES, "chat_template": "{{ x }}"}),
        ("/tokenize", "prompt", {"prompt": "x" * ((1 << 20) + 1)}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": "1 2"}),
        ("/detokenize", "tokens", {"tokens": [-1]}),
        ("/detokenize", "tokens", {"tokens": [1, 1 << 20]}),
        ("/detokenize", "tokens", {"tokens": [1 << 70]}),
        ("/detokenize", "skip_special_tokens", {"tokens": [1], "skip_special_tokens": True}),
    ],
    ids=lambda one: None,
)
def test_what_cannot_be_read_is_refused_by_name(http, path, param, asked):
    answer = http.post(path, json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_tools_that_may_not_be_called_are_not_in_the_prompt(http):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    bare, told, none = (
        post(http, "/tokenize", messages=MESSAGES, **asked)["count"]
        for asked in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "none"})
    )
    assert bare == none < told
    assert post(http, "/tokenize", prompt="x", tool_choice="none")["count"] == 1


def test_special_tokens_may_be_asked_for_as_they_come(http, llm):
    special = next(token for token in range(100) if not llm.tokenizer.decode([token]))
    asked = {"tokens": [special], "skip_special_tokens": False}
    assert http.post("/detokenize", json=asked).json()["prompt"] == llm.tokenizer.token_text(special) != ""


def test_another_model_is_not_here(http):
    assert http.post("/tokenize", json={"prompt": "x", "model": "another"}).status_code == 404
    assert http.post("/detokenize", json={"tokens": [1], "model": "another"}).status_code == 404


def test_the_version_and_the_plan(http, llm):
    assert http.get("/version").json() == {"version": pymllm.__version__}
    plan = http.get("/plan")
    assert plan.json() == llm.plan.to_dict()
    assert {"schema_version", "layers", "totals", "kv_cache"} <= plan.json().keys()


def test_a_plan_that_a_swap_has_changed_is_written_again(http, llm):
    before = http.get("/plan").json()
    undo = llm.plan
    try:
        llm.plan = replace(llm.plan, notes=[*llm.plan.notes, "swapped"])
        assert http.get("/plan").json()["notes"] == [*before["notes"], "swapped"]
    finally:
        llm.plan = undo
    assert http.get("/plan").json() == before


def test_cards_say_how_long_a_request_may_be(http, llm):
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["parent"]) == (MODEL, llm.plan.model, None)
    assert card["max_model_len"] == llm.plan.kv_cache["max_model_len"]
    assert http.get(f"/v1/models/{MODEL}").json() == card


@pytest.mark.parametrize("path", ["/version", "/plan", "/v1/models", f"/v1/models/{MODEL}"])
def test_head_is_answered_where_get_is(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
