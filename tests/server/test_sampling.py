"""Sampling parameters over the socket: each is honoured, as `LLM` honours it, or refused by its name."""

from __future__ import annotations

import json
import re

import openai
import pytest

import pymllm

from .conftest import serve

MODEL = "shipped"
PROMPT = "def read_lines(path):\n"
MESSAGES = [{"role": "user", "content": "Write a function."}]


def greedy(llm, prompt=PROMPT, **settings):
    return llm.generate(prompt, llm.default_params(**{"temperature": 0.0, "max_tokens": 12, **settings}))[0]


def complete(client, **settings):
    extra = {
        name: settings.pop(name) for name in list(settings) if name not in ("n", "seed", "stop", "stream")
    }
    return client.completions.create(model=MODEL, prompt=PROMPT, **settings, extra_body=extra)


def test_n_answers_come_in_order_and_the_prompt_counts_once(client, llm):
    settings = {"temperature": 1.2, "max_tokens": 8}
    prompts = [PROMPT, "import os\n"]
    # In the same steps, as sums of bfloat16 depend on what is beside them.
    answers = llm.generate(prompts, llm.default_params(**settings, seed=5, n=3))
    expected = [output for answer in answers for output in answer.outputs]
    assert len({output.token_ids for output in expected}) > 3
    answer = client.completions.create(model=MODEL, prompt=prompts, n=3, seed=5, best_of=3, **settings)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [output.text for output in expected]
    assert answer.usage.prompt_tokens == sum(len(llm.encode(prompt)) for prompt in prompts)
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in expected)
    texts = [""] * 6
    usage = {"stream_options": {"include_usage": True}}
    for chunk in client.completions.create(
        model=MODEL, prompt=prompts, n=3, seed=5, stream=True, **usage, **settings
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        used = chunk.usage
    assert texts == [output.text for output in expected] and used == answer.usage
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, seed=1, **settings)
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert chat.choices[0].message.content != chat.choices[1].message.content


def test_min_tokens_ignore_eos_and_stop_tokens(client, llm):
    ids = greedy(llm).token_ids
    short = complete(client, temperature=0, max_tokens=12, stop_token_ids=[ids[2]])
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "stop"
    longer = complete(client, temperature=0, max_tokens=12, stop_token_ids=[ids[2]], min_tokens=6)
    assert 6 <= longer.usage.completion_tokens <= 12
    forced = {
        "logit_bias": {str(token): 100 for token in llm.engine.end_tokens},
        "temperature": 0,
        "max_tokens": 4,
    }
    assert complete(client, **forced).usage.completion_tokens == 1
    assert complete(client, **forced, ignore_eos=True).usage.completion_tokens == 4


def test_bad_words_and_typical_p_are_those_of_the_library(client, llm):
    word = next(word for word in greedy(llm, max_tokens=30).text.split() if word.isalpha())
    for settings in (
        {"bad_words": [word], "temperature": 0},
        {"typical_p": 0.4, "temperature": 1.0, "seed": 4},
    ):
        expected = llm.generate(PROMPT, llm.default_params(max_tokens=30, **settings))[0].text
        assert complete(client, max_tokens=30, **settings).choices[0].text == expected


def test_log_probabilities_of_the_prompt(client, llm):
    settings = {"temperature": 0, "max_tokens": 2}
    expected = greedy(llm, max_tokens=2, prompt_logprobs=2).prompt_logprobs
    choice = complete(client, **settings, prompt_logprobs=2).choices[0].model_dump()
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(expected)
    for entry, written in zip(expected[1:], choice["prompt_logprobs"][1:], strict=True):
        assert written[str(entry.token_id)]["logprob"] == pytest.approx(entry.logprob)
        assert written[str(entry.top[0][0])]["rank"] == 1
        assert {int(token) for token in written} == {entry.token_id, *(token for token, _ in entry.top)}
    both = complete(client, **settings, n=2, prompt_logprobs=2).choices
    assert [one.model_dump()["prompt_logprobs"] == choice["prompt_logprobs"] for one in both] == [True, True]
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.model_dump()["prompt_logprobs"]) == chat.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, stream=True, prompt_logprobs=1)
    assert caught.value.param == "prompt_logprobs"


def test_bytes_of_tokens_that_are_a_part_of_a_character(client, llm):
    text = "\N{GRINNING FACE}"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 1 and all(llm.tokenizer.decode([token]) == "\ufffd" for token in ids)
    # All of them are as likely as can be, and more likely than all others.
    forced = {"logit_bias": {str(token): 100 for token in ids}, "temperature": 0, "max_tokens": 6}
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=5, extra_body=forced
    )
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.bytes) == 1 and bytes(entry.bytes) in text.encode()
    answer = complete(client, **forced, logprobs=3)
    listed = answer.choices[0].logprobs
    assert all(token.startswith("bytes:\\x") for token in listed.tokens)
    assert all(len(top) == 3 for top in listed.top_logprobs)


def test_tokens_that_are_spelled_alike_are_all_reported(llm, monkeypatch):
    from pymllm.engine.request import TokenLogprobs
    from pymllm.server.answers.completions import CompletionAnswer

    monkeypatch.setattr(llm.tokenizer, "token_text", lambda token: "same")
    monkeypatch.setattr(llm.tokenizer, "token_bytes", lambda token: b"same")
    entry = TokenLogprobs(7, -0.5, ((7, -0.5), (9, -float("inf")), (8, -2.0)))
    described = CompletionAnswer("m", llm.tokenizer)._describe(0, [entry])
    assert described["top_logprobs"] == [{"same": -0.5, "token_id:9": -9999.0, "token_id:8": -2.0}]
    json.dumps(described, allow_nan=False)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("n", 10**9),
        ("n", 0),
        ("n", "2"),
        ("n", 128),  # more than may come at a time, with two prompts
        ("best_of", 2),
        ("min_tokens", 100),
        ("typical_p", 0),
        ("stop_token_ids", [-4]),
        ("stop_token_ids", [10**9]),
        ("stop_token_ids", "x"),
        ("bad_words", [""]),
        ("prompt_logprobs", 99),
        ("ignore_eos", "yes"),
        ("repeat_penalty", 1.1),
        ("skip_special_tokens", "no"),
        ("priority", 3),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client, parameter, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=MODEL, prompt=[PROMPT, PROMPT], max_tokens=5, extra_body={parameter: value}
        )
    assert caught.value.param == parameter and parameter in caught.value.message


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "colour", "strict": True, "schema": {"enum": ["red", "blue"]}},
                }
            },
            '"(red|blue)"',
        ),
        ({"response_format": {"type": "regex", "regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"guided_choice": ["a+b", "c d-e"]}, r"a\+b|c d-e"),
        ({"guided_regex": "[xyz]{3}"}, "[xyz]{3}"),
        ({"guided_json": {"const": 7}}, " ?7"),
        ({"guided_grammar": 'start: "one" | "two"'}, "one|two"),
        ({"response_format": {"type": "text"}}, ".*"),
    ],
)
def test_answers_follow_a_grammar(client, settings, pattern):
    pytest.importorskip("llguidance")
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, extra_body=settings)
    assert re.fullmatch(pattern, chat.choices[0].message.content, re.DOTALL)
    text = (
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, extra_body=settings)
        .choices[0]
        .text
    )
    assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(", "response_format": {"type": "text"}}, "guided_regex"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_json": "["}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_choice": ["x" * 70_000]}, "guided_choice"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"guided_regex": "a", "bad_words": ["a"]}, "bad_words"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "response_format"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_a_400(client, settings, parameter):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=settings)
    assert caught.value.param == parameter


@pytest.fixture(scope="module")
def by_blocks():
    llm = pymllm.LLM(
        dtype="float32", strategy="block_diffusion:block_length=4,mask_token_id=3", progress=False
    )
    with serve(llm) as served:
        yield served.client()


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": True, "response_format": {"type": "text"}}, "guided_json"),
        ({"min_p": 0.5}, "min_p"),
    ],
)
def test_what_a_strategy_cannot_follow_is_named_as_the_client_has_spelled_it(by_blocks, settings, parameter):
    pytest.importorskip("llguidance")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"{parameter} has no use") as caught:
            by_blocks.completions.create(model=MODEL, prompt=PROMPT, stream=stream, extra_body=settings)
        assert caught.value.param == parameter


def test_streams_of_several_tokens_a_step_are_the_whole_answers(by_blocks):
    """A stop string may end within the tokens of one step."""
    settings = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "n": 2, "logprobs": 1}
    settings |= {"temperature": 1.0, "seed": 3}
    text = by_blocks.completions.create(**settings).choices[0].text
    for stop in (None, text[7:9], [text[11:16], text[5:6]]):
        whole = by_blocks.completions.create(**settings, stop=stop)
        found = {choice.index: ["", [], None] for choice in whole.choices}
        for event in by_blocks.completions.create(
            **settings, stop=stop, stream=True, stream_options={"include_usage": True}
        ):
            for choice in event.choices:
                parts = found[choice.index]
                parts[0] += choice.text
                parts[1] += choice.logprobs.tokens if choice.logprobs else []
                parts[2] = choice.finish_reason or parts[2]
        assert found == {
            choice.index: [choice.text, choice.logprobs.tokens, choice.finish_reason]
            for choice in whole.choices
        }
        assert event.usage.completion_tokens == whole.usage.completion_tokens
        assert sum(len(parts[1]) for parts in found.values()) == whole.usage.completion_tokens
