"""The official client over a real socket: what it asks for is what `LLM` answers."""

from __future__ import annotations

import openai
import pytest

MODEL = "shipped"
PROMPT = "def read_lines(path):\n"
MESSAGES = [{"role": "user", "content": "Write a function."}]


def greedy(llm, prompt, **settings):
    return llm.generate(prompt, llm.default_params(**{"temperature": 0.0, "max_tokens": 12, **settings}))[0]


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_what_the_model_generates(client, llm):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12)
    expected = greedy(llm, PROMPT)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(llm.encode(PROMPT))
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_completion_adds_up_to_the_whole_one(client, llm):
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    expected = greedy(llm, PROMPT)
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert len(texts) > 1
    assert "".join(texts) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_goes_through_the_chat_template(client, llm):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
    ids = llm.tokenizer.apply_chat_template(MESSAGES)
    expected = greedy(llm, ids)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(ids)


def test_a_streamed_chat_adds_up_to_the_whole_one(client, llm):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12, stream=True
        )
    )
    expected = greedy(llm, llm.tokenizer.apply_chat_template(MESSAGES))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_text_parts_and_an_earlier_answer_sent_back_are_understood(client):
    lines = [{"role": "user", "content": "Write a\nfunction."}]
    first = client.chat.completions.create(model=MODEL, messages=lines, temperature=0, max_tokens=4)
    parts = [{"type": "text", "text": "Write a"}, {"type": "text", "text": "function."}]
    again = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=4
    )
    assert again.choices[0].message.content == first.choices[0].message.content
    history = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "More."}]
    longer = client.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
    assert longer.usage.prompt_tokens > first.usage.prompt_tokens


def test_token_ids_and_several_prompts(client, llm):
    ids = llm.encode(PROMPT)
    other = "import os\n"
    answer = client.completions.create(model=MODEL, prompt=[PROMPT, other], temperature=0, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [greedy(llm, p).text for p in (PROMPT, other)]
    answer = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=12)
    assert answer.choices[0].text == greedy(llm, PROMPT).text
    stream = client.completions.create(
        model=MODEL, prompt=[ids, llm.encode(other)], temperature=0, max_tokens=12, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [greedy(llm, p).text for p in (PROMPT, other)]


def test_a_stop_string_ends_the_answer_and_is_left_out(client, llm):
    text = greedy(llm, PROMPT, max_tokens=40).text
    stop = text[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40, stop=[stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_max_tokens_bounds_the_answer_and_completions_default_to_16(client):
    def length(**settings):
        settings = {"model": MODEL, "prompt": PROMPT, "temperature": 0, **settings}
        return client.completions.create(**settings, extra_body={"logit_bias": {"0": -100, "2": -100}}).usage

    assert length(max_tokens=3).completion_tokens == 3
    assert length().completion_tokens == 16
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=2)
    assert chat.usage.completion_tokens <= 2


def test_equal_seeds_give_equal_answers(client):
    def sample(seed):
        return (
            client.completions.create(
                model=MODEL,
                prompt=PROMPT,
                temperature=1.5,
                max_tokens=24,
                seed=seed,
                extra_body={"top_k": 500},
            )
            .choices[0]
            .text
        )

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_logit_bias_forces_a_token(client, llm):
    token = llm.encode("x")[-1]
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        temperature=0,
        max_tokens=3,
        logit_bias={str(token): 100},
        extra_body={"repetition_penalty": 1.0},
    )
    assert answer.choices[0].text == llm.tokenizer.decode([token] * 3)


def test_log_probabilities_of_completions_and_chats(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2)
    choice = answer.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [
        sum(map(len, choice.logprobs.tokens[:n])) for n in range(len(choice.logprobs.tokens))
    ]
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    for stream in (False, True):
        chat = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_tokens=4,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
        )
        choices = [chunk.choices[0] for chunk in chat] if stream else chat.choices
        entries = [entry for c in choices if c.logprobs is not None for entry in c.logprobs.content]
        assert 1 <= len(entries) <= 4
        for entry in entries:
            assert entry.logprob <= entry.top_logprobs[0].logprob
            assert len(entry.top_logprobs) == 3
            assert bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize(
    ("endpoint", "parameter", "value"),
    [
        ("completions", "best_of", 3),
        ("chat", "echo", True),
        ("completions", "suffix", "end"),
        ("chat", "functions", [{"name": "f", "parameters": {}}]),
        ("chat", "documents", [{"text": "One."}]),
        ("chat", "reasoning_effort", "low"),
    ],
)
def test_an_unsupported_parameter_is_refused_by_its_name(client, endpoint, parameter, value):
    with pytest.raises(openai.BadRequestError) as caught:
        if endpoint == "chat":
            client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={parameter: value})
        else:
            client.completions.create(model=MODEL, prompt=PROMPT, extra_body={parameter: value})
    assert caught.value.param == parameter
    assert parameter in caught.value.message
    assert caught.value.code == "unsupported_parameter"


def test_parameters_at_their_neutral_values_are_accepted(client):
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stream": False,
        "user": "me",
        "stop": None,
    }
    client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=1,
        extra_body={**neutral, "best_of": 1, "echo": False, "suffix": None, "logprobs": False},
    )
    elsewhere = {
        "min_tokens": 0,
        "ignore_eos": False,
        "stop_token_ids": [],
        "bad_words": [],
        "typical_p": 1,
        "top_k": -1,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "priority": 0,
        "request_id": "mine",
        "cache_prompt": True,
        "repeat_penalty": 1,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "guided_json": None,
        "structured_outputs": None,
    }
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, extra_body=elsewhere)
    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=elsewhere)
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=1,
        extra_body={
            **neutral,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logprobs": None,
        },
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused_before_the_stream(client, llm, stream):
    ids = [5] * (llm.engine.max_length + 1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=ids, stream=stream)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        content = "word " * 2 * llm.engine.max_length
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], stream=stream
        )
    assert caught.value.param == "messages"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="another", prompt=PROMPT)
    assert caught.value.param == "model"


def test_usage_counts_the_tokens_of_the_prompt_that_were_not_read_again(client, llm):
    prompt = [7 + index % 40 for index in range(50)]
    for cached in (0, 48):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=2)
        assert answer.usage.prompt_tokens_details.cached_tokens == cached
    *_, last = client.completions.create(
        model=MODEL,
        prompt=[prompt, prompt],
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.usage.prompt_tokens_details.cached_tokens == 96
