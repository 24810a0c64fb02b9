"""Text that grows token by token: what it adds up to, what is held back, and how much is decoded again."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import pymllm
from pymllm.text.tokenizer import FastEncoder, TextStream, Tokenizer


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(pymllm.api.shipped_model())


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """Sentencepiece's way: words with a mark for spaces, and bytes for what is no word."""
    words = ["<unk>", "\u2581", "\u2581the", "the", "a", "\u2581a", "\ufffd"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(tmp_path_factory.mktemp("no_files"))
    tokenizer.encoder = FastEncoder(backend)
    return tokenizer


class Counted:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **settings):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **settings)


def streamed(tokenizer, ids, **settings):
    stream = TextStream(tokenizer, **settings)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream.text


TEXTS = [
    "plain text\n",
    "na\xefve \N{GRINNING FACE}\N{GRINNING FACE} \u4f60\u597d",
    "\ufffd x \ufffd\ufffd",
    "\N{FAMILY}" * 30,
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_pieces_add_up_to_the_text(byte_level, text):
    assert streamed(byte_level, byte_level.encode(text)) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("undecodable", [b"\x80", b"\xf0\x9f", b"\xff\xc3"])
def test_what_is_no_text_costs_the_same_however_long_it_is(kind, undecodable, request):
    tokenizer = request.getfixturevalue(kind)
    encode = (lambda byte: 7 + byte) if kind == "byte_fallback" else id_of_byte(tokenizer)
    costs = []
    for length in (200, 400):
        counted = Counted(tokenizer)
        ids = [encode(byte) for byte in undecodable * (length // len(undecodable))]
        text = streamed(counted, ids)
        assert set(text) == {"\ufffd"}
        costs.append(counted.decoded / length)
    assert costs[1] < costs[0] * 1.1 and costs[1] < 64


def id_of_byte(tokenizer):
    ids = {tokenizer.token_bytes(token): token for token in range(4096)}
    return lambda byte: ids[bytes([byte])]


def test_tokens_without_text_cost_the_same_however_many_they_are(byte_level):
    end = byte_level.encoder.tokenizer.token_to_id(byte_level.settings["eos_token"])
    costs = []
    for length in (200, 400):
        counted = Counted(byte_level)
        assert streamed(counted, [end] * length + byte_level.encode("def")) == "def"
        costs.append(counted.decoded / length)
    assert costs[1] < costs[0] * 1.1


def test_text_between_undecodable_bytes_is_kept(byte_level):
    byte, generator = id_of_byte(byte_level), random.Random(3)
    for _ in range(30):
        parts = [
            bytes([0x80]) * generator.randint(0, 60),
            "\N{GRINNING FACE}".encode(),
            b"word ",
            "\xef".encode(),
        ]
        content = b"".join(generator.choices(parts, k=8)) + b"."
        expected = content.decode("utf-8", errors="replace")
        assert streamed(byte_level, [byte(value) for value in content]) == expected


def test_bytes_and_texts_of_tokens(byte_level, byte_fallback):
    for text in TEXTS:
        ids = byte_level.encode(text)
        assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    assert [byte_fallback.token_text(token) for token in (2, 3, 1)] == [" the", "the", " "]
    assert byte_fallback.token_bytes(7 + 0xE4) == b"\xe4"
    assert byte_fallback.token_bytes(7 + ord("x")) == b"x"
    assert byte_fallback.token_bytes(6) == "\ufffd".encode()


def test_stops_are_not_looked_for_before_min_tokens(byte_level):
    ids = byte_level.encode("abc abc abc")
    assert streamed(byte_level, ids, stop=["abc"]) == ""
    assert streamed(byte_level, ids, stop=["abc"], min_tokens=len(ids) + 1) == "abc abc abc"
    half = len(byte_level.encode("abc")) + 1
    assert streamed(byte_level, ids, stop=["abc"], min_tokens=half) == "abc "


def test_words_are_spelled_at_the_start_and_after_a_space(byte_level):
    spelled = byte_level.spellings(["return", " return"])
    assert [byte_level.decode(ids) for ids in spelled] == ["return", " return"]
    assert byte_level.spellings([]) == ()
