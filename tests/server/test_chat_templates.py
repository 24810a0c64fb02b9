"""Chat templates and long texts, as clients of the server see them."""

from __future__ import annotations

import functools
import threading

import openai
import pytest

from pymllm.errors import CheckpointError
from pymllm.text import chat_template as rendering
from pymllm.text.chat_template import LARGE_REQUEST, ChatTemplate
from tests.processes import SECONDS
from tests.server.conftest import MODEL

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def use(llm, monkeypatch):
    """Lets the model use another template, for one test."""
    return lambda source: monkeypatch.setattr(
        llm.tokenizer, "chat_templates", {"default": ChatTemplate(source, "/some/folder/chat_template.jinja")}
    )


def chat(client, messages=HI, **settings):
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, **settings)


def test_a_chat_goes_through_the_template_that_was_given(llm, client, use):
    use("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    ids = llm.tokenizer.encode("<hi>", add_special_tokens=False)
    assert chat(client).usage.prompt_tokens == len(ids)


def test_what_a_template_rejects_is_the_clients_to_mend(client, use):
    use("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles must alternate") as caught:
        chat(client)
    assert (caught.value.param, "/some/folder" in str(caught.value)) == ("messages", False)


@pytest.mark.parametrize(("text", "many"), [("hi", 40), ("hi" * LARGE_REQUEST, 12)], ids=["small", "large"])
def test_many_slow_conversations_hold_up_no_prompt_and_large_ones_no_small_one(
    llm, client, monkeypatch, text, many
):
    done, begun, write = threading.Event(), threading.Event(), llm.tokenizer.apply_chat_template

    def slow(messages, **settings):
        if messages[0]["content"] == text:
            begun.set()
            assert done.wait(SECONDS)
        return write([{"role": "user", "content": "x"}], **settings)

    monkeypatch.setattr(llm.tokenizer, "apply_chat_template", slow)
    ask = functools.partial(chat, client, [{"role": "user", "content": text}])
    threads = [threading.Thread(target=ask) for _ in range(many)]
    for thread in threads:
        thread.start()
    assert begun.wait(SECONDS)
    try:
        assert client.completions.create(model=MODEL, prompt="def", max_tokens=1).choices
        assert text == "hi" or chat(client).choices
        assert all(thread.is_alive() for thread in threads)
    finally:
        done.set()
        for thread in threads:
            thread.join(SECONDS)


def test_a_template_that_takes_too_long_holds_up_nobody(client, use, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.5)
    use(
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    )
    failed = []

    def ask():
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client)
        failed.append(caught.value.code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert client.completions.create(model=MODEL, prompt="def", max_tokens=1).choices
    assert client.models.list().data
    for thread in threads:
        thread.join()
    assert failed == ["chat-template-refused"] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_megabytes_is_refused_without_being_encoded(llm, client, monkeypatch, stream):
    text, own = "x" * 3_900_000, llm.tokenizer.encoder.encode

    def encode(given, *settings):
        assert len(given) < 100_000, "it was encoded"
        return own(given, *settings)

    monkeypatch.setattr(llm.tokenizer.encoder, "encode", encode)
    with pytest.raises(openai.BadRequestError, match="at least") as caught:
        client.completions.create(model=MODEL, prompt=text, stream=stream)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="at least") as caught:
        chat(client, [{"role": "user", "content": text}], stream=stream)
    assert caught.value.param == "messages"


def test_a_prompt_just_within_the_bound_is_encoded_and_counted(llm, client):
    """The longest token says nothing about other texts: what the bound lets through, its tokens refuse."""
    text = "x y " * llm.engine.longest
    assert llm.tokenizer.encoder.bound.fewest_tokens(text) <= llm.engine.longest
    with pytest.raises(openai.BadRequestError, match="room for an answer"):
        client.completions.create(model=MODEL, prompt=text)


def test_a_template_without_the_users_words_answers_nothing(client, use):
    use("always the same")
    with pytest.raises(openai.InternalServerError, match="leaves out what a user writes"):
        chat(client)


def test_a_model_keeps_its_own_template_for_others(llm):
    with pytest.raises(CheckpointError):
        ChatTemplate("{{ 'a'|center(2000000000) }}", "x").render(HI, {})
    assert "hi" in llm.tokenizer.render_chat(HI)
