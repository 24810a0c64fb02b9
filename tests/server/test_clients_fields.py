"""Fields that clients send: what asks for nothing is accepted, what can be honoured is, the rest is named."""

from __future__ import annotations

import json
import shutil

import httpx
import openai
import pytest

import pymllm
from pymllm.server.protocol.neutral import CHAT, COMPLETIONS, EMBEDDINGS
from tests.processes import SECONDS
from tests.server.conftest import MODEL, serve

PROMPT = "def read_lines(path):\n"
MESSAGES = [{"role": "user", "content": "Write a function."}]


def complete(client, **settings):
    settings = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, **settings}
    return client.post("/completions", body=settings, cast_to=object)


def chat(client, **settings):
    settings = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 6, **settings}
    return client.post("/chat/completions", body=settings, cast_to=object)


def greedy(llm, prompt):
    return llm.generate(prompt, llm.default_params(temperature=0.0, max_tokens=6))[0]


def chunks(client, path, body):
    """Return the objects of a stream, as they come over the wire."""
    body = {"model": MODEL, "temperature": 0, "max_tokens": 6, "stream": True, **body}
    text = httpx.post(f"{str(client.base_url).rstrip('/')}{path}", json=body, timeout=SECONDS).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("call, table", [(complete, COMPLETIONS), (chat, CHAT)], ids=["completions", "chat"])
def test_what_asks_for_nothing_changes_nothing(client, call, table):
    plain = call(client)
    several = [{name: values[0] for name, values in table.items()}, dict.fromkeys(table)]
    several.append({name: values[-1] for name, values in table.items()})
    known = {
        "metadata": {"task": "a"},
        "user": "me",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "request_id": "r",
        "best_of": 1,
        "n": 1,
        "truncate_prompt_tokens": -1,
        "return_token_ids": False,
        "return_tokens_as_token_ids": False,
        "structured_outputs": None,
        "allowed_token_ids": None,
        "logits_processors": None,
        "prediction": None,
        "cache_salt": None,
    }
    for settings in (*several, known):
        answer = call(client, **settings)
        text = {"choices": plain["choices"], "usage": plain["usage"]["completion_tokens"]}
        assert {"choices": answer["choices"], "usage": answer["usage"]["completion_tokens"]} == text


def test_a_guess_at_the_answer_is_accepted(client):
    guess = {"type": "content", "content": "def f():\n"}
    assert chat(client, prediction=guess)["choices"] == chat(client)["choices"]


@pytest.mark.parametrize("name", sorted(COMPLETIONS | CHAT | EMBEDDINGS))
def test_what_asks_for_something_is_named(client, name):
    """A word of no meaning is none of the values that ask for nothing."""
    tables = ((complete, COMPLETIONS), (chat, CHAT), (lambda c, **s: embed(c, **s), EMBEDDINGS))
    for call, table in tables:
        if name in table:
            with pytest.raises(openai.BadRequestError) as caught:
                call(client, **{name: {"not": "neutral"}})
            assert caught.value.param == name and name in caught.value.message


def embed(client, **settings):
    return client.post("/embeddings", body={"model": MODEL, "input": "a", **settings}, cast_to=object)


@pytest.mark.parametrize(
    "settings, param, code",
    [
        ({"temperature": 300}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": [5] * 5000}, "prompt", "context_length_exceeded"),
        ({"cache_salt": "x"}, "cache_salt", "unsupported_parameter"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            "invalid_value",
        ),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options", "unknown_parameter"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"suffix": "x", "prompt": [5]}, "suffix", "invalid_value"),
        ({"suffix": "x", "echo": True}, "suffix", "invalid_value"),
    ],
    ids=str,
)
def test_errors_have_the_codes_of_openai(client, settings, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **settings)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    if code == "context_length_exceeded":
        # Clients (litellm, say) tell this error by these words.
        assert "this model's maximum context length is 1024 tokens" in caught.value.message


def test_a_wrong_key_and_model_have_the_codes_of_openai(llm, client):
    with serve(llm, api_key="secret") as guarded, pytest.raises(openai.AuthenticationError) as caught:
        guarded.client("other").models.list()
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="gpt-5")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_a_prompt_is_cut_from_its_beginning(client, llm):
    ids = llm.encode(PROMPT)
    expected = complete(client, prompt=ids[-3:])
    for prompt in (PROMPT, ids):
        answer = complete(client, prompt=prompt, truncate_prompt_tokens=3)
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    echoed = complete(client, truncate_prompt_tokens=3, echo=True)["choices"][0]["text"]
    assert echoed == llm.tokenizer.decode(ids[-3:]) + expected["choices"][0]["text"]
    longest = llm.engine.longest
    cut = complete(client, prompt=[5] * 5000, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == longest - 6
    assert chat(client, truncate_prompt_tokens=4)["usage"]["prompt_tokens"] == 4


def test_what_the_client_has_parsed_may_go_back(client):
    """The message of `client.chat.completions.parse` goes back as it is: its prompt is that of the message alone."""

    def tokens(**parsed):
        function = {"name": "f", "arguments": '{"x": 1}'}
        calls = [{"id": "call_1", "type": "function", "function": function | parsed}]
        said = {"role": "assistant", "content": '{"y": 2}', "tool_calls": calls}
        said |= {"parsed": {"y": 2}} if parsed else {}
        history = [*MESSAGES, said, {"role": "tool", "tool_call_id": "call_1", "content": "3"}]
        return chat(client, messages=history)["usage"]["prompt_tokens"]

    assert tokens(parsed_arguments={"x": 1}) == tokens()


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_with_an_answer(client, llm, stream):
    body = {"prompt": [PROMPT, "x = "], "return_token_ids": True}
    expected = [greedy(llm, prompt) for prompt in body["prompt"]]
    if stream:
        found = {}
        for chunk in chunks(client, "/completions", body):
            (choice,) = chunk["choices"]
            one = found.setdefault(choice["index"], {"token_ids": []})
            one |= {"prompt_token_ids": choice.get("prompt_token_ids") or one["prompt_token_ids"]}
            one["token_ids"] += choice.get("token_ids") or []
        choices = [found[0], found[1]]
    else:
        choices = complete(client, **body)["choices"]
    for choice, output in zip(choices, expected, strict=True):
        assert choice["prompt_token_ids"] == list(output.prompt_token_ids)
        assert choice["token_ids"] == list(output.token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_with_a_chat(client, llm, stream):
    prompt = llm.tokenizer.apply_chat_template(MESSAGES)
    expected = greedy(llm, prompt)
    if stream:
        parts = chunks(client, "/chat/completions", {"messages": MESSAGES, "return_token_ids": True})
        assert [part.get("prompt_token_ids") for part in parts[1:]] == [None] * (len(parts) - 1)
        answer, ids = parts[0], [id for part in parts for id in part["choices"][0].get("token_ids", ())]
    else:
        answer = chat(client, return_token_ids=True)
        ids = answer["choices"][0]["token_ids"]
    assert answer["prompt_token_ids"] == prompt and ids == list(expected.token_ids)


def test_tokens_may_be_named_by_their_ids(client, llm):
    expected = greedy(llm, PROMPT).token_ids
    names = [f"token_id:{token}" for token in expected]
    body = {"return_tokens_as_token_ids": True}
    logprobs = complete(client, logprobs=2, **body)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == names
    assert all(name in top for name, top in zip(names, logprobs["top_logprobs"], strict=True))
    assert all(
        len(top) == 2 and all(key.startswith("token_id:") for key in top) for top in logprobs["top_logprobs"]
    )
    content = chat(client, logprobs=True, top_logprobs=1, **body)["choices"][0]["logprobs"]["content"]
    assert all(entry["token"] == entry["top_logprobs"][0]["token"] for entry in content)
    assert all(entry["token"].startswith("token_id:") for entry in content)


@pytest.mark.parametrize(
    "path, body", [("/completions", {"prompt": PROMPT}), ("/chat/completions", {"messages": MESSAGES})]
)
def test_each_chunk_may_count_the_tokens_so_far(client, path, body):
    whole = client.post(
        path, body={"model": MODEL, "temperature": 0, "max_tokens": 6, **body}, cast_to=object
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(client, path, {**body, "stream_options": options})
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == whole["usage"]["completion_tokens"]
    assert {part["usage"]["prompt_tokens"] for part in parts} == {whole["usage"]["prompt_tokens"]}
    assert parts[-1]["choices"] == [] and all(part["choices"] for part in parts[:-1])
    only = chunks(client, path, {**body, "stream_options": {"continuous_usage_stats": True}})
    assert all(part["choices"] and part["usage"] for part in only)


def infilling(folder, names):
    """Copy the shipped model; its last three tokens become those that say what is to be filled in."""
    shutil.copytree(pymllm.LLM(progress=False).path, folder)
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    vocabulary, by_id = made["model"]["vocab"], {}
    for text, token in vocabulary.items():
        by_id[token] = text
    for token, name in zip(range(4093, 4096), names, strict=True):
        del vocabulary[by_id[token]]
        vocabulary[name] = token
        special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        made["added_tokens"].append({"id": token, "content": name, **special, "special": True})
    gone = {by_id[token] for token in range(4093, 4096)}
    pairs = made["model"]["merges"]
    made["model"]["merges"] = [
        p for p in pairs if "".join(p if isinstance(p, list) else p.split(" ")) not in gone
    ]
    file.write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("sign", ["<|fim_{}|>", "<fim_{}>"])
def test_a_suffix_fills_in_where_the_tokenizer_knows_how(tmp_path, sign):
    begin, hole, end = (sign.format(name) for name in ("prefix", "suffix", "middle"))
    llm = pymllm.LLM(infilling(tmp_path / "model", (begin, hole, end)), progress=False)
    encode = lambda text: llm.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    with serve(llm) as served:
        answer = complete(served.client(), suffix="\n    return lines", return_token_ids=True)["choices"][0]
    expected = [4093, *encode(PROMPT), 4094, *encode("\n    return lines"), 4095]
    assert answer["prompt_token_ids"] == expected
    assert answer["text"] == greedy(llm, expected).text
