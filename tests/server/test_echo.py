"""Prompts before their answers, and several answers in one stream: /v1/completions as OpenAI's clients know it."""

from __future__ import annotations

import openai
import pytest

from pymllm import SamplingParams
from tests.server.conftest import MODEL

PROMPT = "def read_lines(path):\n"


def complete(client, **settings):
    stream = settings.pop("stream", False)
    settings = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, **settings}
    if not stream:
        return client.completions.create(**settings).choices
    joined = {}
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            known = joined.setdefault(choice.index, choice)
            if known is not choice:
                known.text += choice.text
                known.finish_reason = choice.finish_reason or known.finish_reason
                if choice.logprobs is not None:
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                        getattr(known.logprobs, name).extend(getattr(choice.logprobs, name))
    return [joined[index] for index in sorted(joined)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_comes_before_its_answer(client, llm, stream):
    (plain,) = complete(client)
    (choice,) = complete(client, echo=True, stream=stream)
    assert choice.text == PROMPT + plain.text and choice.logprobs is None
    ids = llm.encode(PROMPT)
    first, second = complete(client, prompt=[ids, llm.encode("x = ")], echo=True, stream=stream)
    assert first.text == PROMPT + plain.text and second.text.startswith("x = ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_log_probabilities_of_an_echoed_prompt_come_first(client, llm, stream, n):
    ids = llm.encode(PROMPT)
    choices = complete(client, echo=True, logprobs=2, n=n, stream=stream, temperature=0.5, seed=3)
    scored = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=2))[0].prompt_logprobs
    answers = complete(client, logprobs=2, n=n, temperature=0.5, seed=3)
    assert len(choices) == len(answers) == n
    for choice, answer in zip(choices, answers, strict=True):
        logprobs = choice.logprobs
        assert choice.text == PROMPT + answer.text and choice.finish_reason == answer.finish_reason
        assert "".join(logprobs.tokens[: len(ids)]) == PROMPT
        assert logprobs.tokens[len(ids) :] == answer.logprobs.tokens
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(
            [entry.logprob for entry in scored[1:]], abs=1e-3
        )
        assert all(len(top) == 2 for top in logprobs.top_logprobs[1:])
        assert logprobs.token_logprobs[len(ids) :] == pytest.approx(answer.logprobs.token_logprobs, abs=1e-3)
        assert logprobs.text_offset == [
            sum(map(len, logprobs.tokens[:place])) for place in range(len(logprobs.tokens))
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_without_an_answer_is_a_score(client, llm, stream):
    text = PROMPT + "    return path"
    (choice,) = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=0, stream=stream)
    assert choice.text == text and choice.finish_reason == "length"
    (score,) = llm.score(text)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(score.logprobs, abs=1e-3)
    assert len(choice.logprobs.tokens) == score.num_tokens + 1
    (single,) = complete(client, prompt=[5], max_tokens=0, echo=True, logprobs=1, stream=stream)
    assert single.logprobs.token_logprobs == [None]
    (bare,) = complete(client, prompt=text, max_tokens=0, echo=True, stream=stream)
    assert (bare.text, bare.logprobs, bare.finish_reason) == (text, None, "length")


def test_usage_counts_an_echo_as_a_prompt_alone(client, llm):
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, extra_body={"min_tokens": 0}
    )
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == len(llm.encode(PROMPT))
    details = answer.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)


def test_n_answers_stream_by_their_index(client):
    settings = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    whole = complete(client, **settings)
    streamed = complete(client, **settings, stream=True)
    assert [choice.text for choice in streamed] == [choice.text for choice in whole]
    assert len({choice.text for choice in whole}) == 3
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], **settings}
    texts = {}
    for chunk in client.chat.completions.create(**chat, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    answers = client.chat.completions.create(**chat).choices
    assert [texts[index] for index in range(3)] == [choice.message.content for choice in answers]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"echo": 1}, "echo"),
    ],
    ids=str,
)
def test_what_does_not_go_with_an_echo_is_named(client, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=settings)
    assert caught.value.param == param
