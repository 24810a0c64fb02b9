"""/v1/embeddings to OpenAI's own client, of an encoder and of a model that also generates."""

from __future__ import annotations

import base64
import concurrent.futures
import struct

import openai
import pytest
import torch

import pymllm
from pymllm.server.protocol.embeddings import MAX_CHARACTERS
from tests.embedding.encoders import TEXTS, ids_of, make_model, write
from tests.server.by_hand import post

from .conftest import MODEL, serve


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    modules = {"Pooling": {"pooling_mode": "mean"}, "Normalize": {}}
    prompts = {"prompts": {"query": "query : "}}
    folder = tmp_path_factory.mktemp("encoder") / "m"
    write(folder, make_model("bert"), modules, config_sentence_transformers=prompts)
    with serve(pymllm.LLM(folder, device="cpu"), max_running=2, max_waiting=1) as served:
        yield served


def vectors_of(answer) -> torch.Tensor:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return torch.tensor([entry.embedding for entry in answer.data])


def test_texts_and_token_ids_in_both_encodings(encoder):
    client, expected = encoder.client(), encoder.llm.embed(TEXTS)
    ids = [ids_of(text) for text in TEXTS]
    for given in (list(TEXTS), ids):
        for encoding in ("float", "base64", None):
            chosen = {} if encoding is None else {"encoding_format": encoding}
            answer = client.embeddings.create(model=MODEL, input=given, **chosen)
            if encoding == "base64":
                found = [struct.unpack("<32f", base64.b64decode(entry.embedding)) for entry in answer.data]
                assert torch.allclose(torch.tensor(found), expected, atol=1e-6)
            else:
                assert torch.allclose(vectors_of(answer), expected, atol=1e-6)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
            assert (answer.object, answer.data[0].object, answer.model) == ("list", "embedding", MODEL)
    for given in (TEXTS[0], ids[0]):
        answer = client.embeddings.create(model=MODEL, input=given)
        assert torch.allclose(vectors_of(answer), expected[:1], atol=1e-6)


def test_dimensions_and_prompts(encoder):
    client = encoder.client()
    short = vectors_of(client.embeddings.create(model=MODEL, input="the cat", dimensions=5))
    assert torch.allclose(short[0], encoder.llm.embed("the cat", dimensions=5), atol=1e-6)
    asked = client.embeddings.create(model=MODEL, input="the cat", extra_body={"prompt_name": "query"})
    assert torch.allclose(vectors_of(asked)[0], encoder.llm.embed("query : the cat"), atol=1e-6)


@pytest.mark.parametrize(
    "body, param, code",
    (
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [""] * 2049}, "input", "invalid_value"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": ["a", 3]}, "input", "invalid_type"),
        ({"input": [1.5]}, "input", "invalid_type"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": [99]}, "input", "invalid_value"),
        ({"input": [5] * 25}, "input", "context_length_exceeded"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 33}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "prompt_name": "passage"}, "prompt_name", "prompt-name"),
        ({"input": "a", "temperature": 1}, "temperature", "unsupported_parameter"),
        ({"input": "a", "stream": True}, "stream", "unsupported_parameter"),
    ),
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_it(encoder, body, param, code):
    with pytest.raises(openai.BadRequestError) as raised:
        encoder.client().post("/embeddings", body=body, cast_to=object)
    assert (raised.value.param, raised.value.code) == (param, code)


def test_what_cannot_be_answered_is_refused_unencoded(encoder, monkeypatch):
    def encode(*_):
        raise AssertionError("it was encoded")

    monkeypatch.setattr(encoder.llm.embedder, "encode", encode)
    long = "a" * (MAX_CHARACTERS + 1)
    for body in ({"input": long}, {"input": ["a", long]}, {"input": "a", "dimensions": 10**6}):
        status, answer, _ = post(encoder, body, "/v1/embeddings")
        assert (status, answer["error"]["param"]) == (400, list(body)[-1])


def test_an_encoder_refuses_to_generate(encoder):
    client = encoder.client()
    message = {"role": "user", "content": "hello"}
    for ask in (
        lambda: client.chat.completions.create(model=MODEL, messages=[message]),
        lambda: client.completions.create(model=MODEL, prompt="hello", stream=True),
    ):
        with pytest.raises(openai.BadRequestError, match=r"encoder.*/v1/embeddings") as raised:
            ask()
        assert raised.value.code == "model_not_generative"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="another", input="hello")


def test_places_in_the_line_are_given_back(encoder):
    """Three places: more than three requests one after the other are all answered, also after refused ones."""
    client = encoder.client()
    for index in range(8):
        if index % 2:
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model=MODEL, input="the cat", dimensions=99)
        else:
            client.embeddings.create(model=MODEL, input="the cat")


def test_a_model_that_generates_embeds_beside_its_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("pymllm.embedding.embedder.BATCH_TOKENS", 8)
    model = make_model("qwen3", "ForCausalLM", tie_word_embeddings=True)
    llm = pymllm.LLM(write(tmp_path / "m", model, None), device="cpu", pooling="lasttoken")
    expected = llm.embed(TEXTS)
    with serve(llm) as served, concurrent.futures.ThreadPoolExecutor(8) as threads:
        client = served.client()

        def generate():
            made = client.completions.create(
                model=MODEL, prompt=[2, 5], max_tokens=40, extra_body={"ignore_eos": True}
            )
            return made.usage.completion_tokens

        def embed():
            return vectors_of(client.embeddings.create(model=MODEL, input=list(TEXTS)))

        answers = [threads.submit(generate) for _ in range(4)]
        vectors = [threads.submit(embed) for _ in range(4)]
        assert [answer.result() for answer in answers] == [40] * 4
        assert all(torch.allclose(made.result(), expected, atol=1e-5) for made in vectors)


def test_a_model_whose_pooling_nobody_knows_is_the_clients_error(tmp_path):
    folder = write(tmp_path / "m", make_model("bert"), None)
    with (
        serve(pymllm.LLM(folder, device="cpu")) as served,
        pytest.raises(openai.BadRequestError, match="--pooling"),
    ):
        served.client().embeddings.create(model=MODEL, input="the cat")
