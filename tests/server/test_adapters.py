"""Clients choose an adapter by the `model` of their request."""

from __future__ import annotations

import json

import openai
import pytest

import pymllm
from pymllm.errors import ConfigError
from pymllm.server.app import create_app

from ..adapters.handwritten import adapter_for_shipped
from .conftest import MODEL, serve

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The shipped model with an adapter that changes its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    llm = pymllm.LLM(progress=False)
    adapter_for_shipped(folder, llm)
    llm.load_adapter("odd", folder)
    return llm, folder


def test_the_model_of_a_request_chooses_its_adapter(adapted):
    llm, _ = adapted
    params = llm.default_params(temperature=0.0, max_tokens=8)
    expected = {name: llm.generate(PROMPT, params, adapter=name)[0].text for name in (None, "odd")}
    assert expected[None] != expected["odd"]
    with serve(llm) as running:
        client = running.client()
        cards = {card.id: card for card in client.models.list()}
        assert list(cards) == [MODEL, "odd"] and cards["odd"].parent == MODEL
        assert client.models.retrieve("odd").id == "odd"
        for name, text in ((MODEL, expected[None]), ("odd", expected["odd"])):
            answer = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=8)
            assert (answer.choices[0].text, answer.model) == (text, name)
            chunks = client.completions.create(
                model=name, prompt=PROMPT, temperature=0, max_tokens=8, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
        with pytest.raises(openai.NotFoundError, match="'shipped' or 'odd'"):
            client.completions.create(model="even", prompt=PROMPT)


def test_an_adapter_cannot_have_the_models_name(adapted):
    with pytest.raises(ConfigError, match="'odd', as the model itself"):
        create_app(adapted[0], model_name="odd")


def test_run_answers_with_the_adapter(adapted, capsys):
    from pymllm.cli import main

    llm, folder = adapted
    expected = llm.generate(PROMPT, llm.default_params(temperature=0.0, max_tokens=8), adapter="odd")[0].text
    arguments = ["run", "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "8", "--json"]
    assert main([*arguments, "--adapter", f"odd={folder}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["adapter"]) == (expected, "odd")


@pytest.mark.parametrize(
    "arguments, code, needle",
    (
        (["run", "x", "--adapter", "nothing"], 2, "NAME=DIR"),
        (["run", "x", "--adapter", "a=/nowhere"], 1, "/nowhere"),
        (["serve", "--adapter", "a=x", "--adapter", "a=y"], 2, "two adapters"),
    ),
)
def test_a_wrong_adapter_is_said_in_one_line(arguments, code, needle, capsys):
    from pymllm.cli import main

    assert main(arguments) == code
    assert needle in capsys.readouterr().err


def test_a_stream_whose_adapter_is_unloaded_ends_with_an_error_and_others_go_on(adapted):
    llm, folder = adapted
    params = llm.default_params(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = {name: llm.generate(PROMPT, params, adapter=name)[0].text for name in (None, "odd")}
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    steps = 0

    def unload_in_the_fifth_step(*_):
        nonlocal steps
        steps += 1
        if steps == 5:
            llm.unload_adapter("odd")

    with serve(llm) as running:
        client = running.client()
        hook = llm.model.model.layers[0].register_forward_pre_hook(unload_in_the_fifth_step)
        try:
            stream = client.completions.create(model="odd", stream=True, **asked)
            text = ""
            with pytest.raises(openai.APIError, match="'odd' was unloaded"):
                for chunk in stream:
                    text += chunk.choices[0].text
            assert alone["odd"].startswith(text) and text != alone["odd"]
            assert client.completions.create(model=MODEL, **asked).choices[0].text == alone[None]
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="odd", **asked)
            # Not streamed, it has a status of its own.
            llm.load_adapter("odd", folder)
            steps = 0
            with pytest.raises(openai.InternalServerError, match="'odd' was unloaded") as caught:
                client.with_options(max_retries=0).completions.create(model="odd", **asked)
            assert caught.value.status_code == 503 and caught.value.code == "adapter-gone"
        finally:
            hook.remove()
        llm.load_adapter("odd", folder)
        assert client.completions.create(model="odd", **asked).choices[0].text == alone["odd"]
