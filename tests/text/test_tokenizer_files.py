"""Tokenizers of foreign files: those that crash their library, and texts that are too long for any of their tokens."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pymllm.errors import CheckpointError, RequestError
from pymllm.text import tokenizer_files
from pymllm.text.encoders import LONG_TEXT, PART, AutoEncoder, FastEncoder
from pymllm.text.gguf_tokenizer import GGUFTokenizer
from pymllm.text.text_bounds import BYTE_TOKENS, COMPOSED_OF, bound_of
from pymllm.text.tokenizer import Tokenizer

SHIPPED = tokenizer_files.SHIPPED


def shipped_settings():
    return json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))


def write(tmp_path, settings):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    return Tokenizer(tmp_path)


def with_prefix(prefix):
    """Merges whose halves do not begin with the prefix that continues a word: the library cuts it off all the same."""
    settings = shipped_settings()
    settings["model"]["continuing_subword_prefix"] = prefix
    return settings


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[1]",
        "[" * 100_000,
        {"model": 5},
        {**shipped_settings(), "model": {"type": "Unheard"}},
        {
            **shipped_settings(),
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
        },
        with_prefix("a long one"),
        with_prefix("1"),
    ],
    ids=["cut", "list", "deep", "no model", "kind", "pattern", "panics", "aborts"],
)
def test_a_tokenizer_that_cannot_be_read_is_one_error(tmp_path, settings):
    tokenizer = write(tmp_path, settings)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the tokenizer cannot be read") as caught:
            tokenizer.encode("abc")
        assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_a_file_is_tried_once_until_it_changes(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(tokenizer_files, "_check", lambda asked, file: tried.append(file))
    for _ in range(2):
        assert write_once(tmp_path).encode("abc")
    assert len(tried) == 1
    write(tmp_path, {**shipped_settings(), "truncation": None, "padding": None, "version": "1.0"}).encode(
        "abc"
    )
    assert len(tried) == 2
    Tokenizer(SHIPPED).encode("abc")
    assert len(tried) == 2


def write_once(tmp_path):
    return (
        Tokenizer(tmp_path) if (tmp_path / "tokenizer.json").exists() else write(tmp_path, shipped_settings())
    )


def test_a_tokenizer_inside_a_gguf_file_is_tried_too(tmp_path):
    metadata = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2"}
    text = json.dumps(with_prefix("1"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFTokenizer(tmp_path / "x.gguf", {**metadata, "tokenizer.huggingface.json": text}).encode("abc")


def test_a_panic_while_encoding_is_our_error():
    class PanicException(BaseException):
        """As the library's own is called."""

    class Panicking:
        def encode(self, *given, **named):
            raise PanicException("index out of range")

    with pytest.raises(CheckpointError, match="the tokenizer failed: index out of range"):
        FastEncoder(Panicking()).encode("a", True)


def test_a_panic_while_transformers_reads_a_folder_is_our_error(tmp_path, monkeypatch):
    def panic(*given, **named):
        raise type("PanicException", (BaseException,), {})("index out of range")

    monkeypatch.setattr("pymllm.text.encoders.auto_tokenizer_from_pretrained", panic)
    with pytest.raises(CheckpointError, match="the tokenizer failed: index out of range") as caught:
        AutoEncoder(tmp_path)
    assert caught.value.file == str(tmp_path)


def test_a_text_outside_of_a_vocabulary_without_bytes_is_our_error(tmp_path):
    Backend(models.WordLevel({"a": 0}, unk_token="none")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(CheckpointError, match="the tokenizer failed"):
        tokenizer.encode("b")


def test_what_does_not_print_is_escaped_in_an_error(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, with_prefix("\x1b[31m")).encode("abc")
    assert str(caught.value).isprintable()


# --- How few tokens a text can become ---


def byte_level(normalizer=None, added=(), merges=(), split=True):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    steps = [pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated")] if split else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return backend


def without(letters, normalizer=None):
    words = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    backend = Backend(models.BPE({word: index for index, word in enumerate([*words, "bbbb"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def sentencepiece(fuse, letters="ab"):
    words = ["<unk>", *BYTE_TOKENS, "\u2581", *letters, "ab", "\u2581ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("a", "b"), ("\u2581", "ab")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=fuse, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.ByteFallback()
    return backend


SPACES = [("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120"), ("a", "b")]
BOUNDED = {
    "byte level": (byte_level(merges=SPACES), 4, False),
    "composed": (byte_level(normalizers.NFC(), merges=SPACES), 4 * COMPOSED_OF, False),
    "shortened": (byte_level(normalizers.Replace("abc", "a"), merges=SPACES), 12, False),
    "stripped": (byte_level(normalizers.Strip(), merges=SPACES), 4, True),
    "a long token": (byte_level(added=["<|a long token|>"]), 16, False),
    "a token that takes spaces": (
        byte_level(added=[AddedToken("<|x|>", rstrip=True)], merges=SPACES),
        5,
        True,
    ),
    "bytes": (sentencepiece(True), 6, False),
    # Of the first byte of an emoji, and of the letter a.
    "left out": (without("\u00f0a"), 4, False),
}


def texts():
    made = random.Random(5)
    pool = "ab  \t\n\u00e9\u1f82\ufb03\u1100\u1161\u11a8\u0301\u0345\u4e2d\U0001f600<|x|>abc"
    pool = [*pool, "abc", "    ", "<|x|>    ", "<|a long token|>", unicodedata.normalize("NFD", "\u1f82")]
    yield from ("", " " * 999, "a" * 999, "<|x|>" + " " * 999, "\u0301" * 99, "abc" * 99)
    yield from (unicodedata.normalize("NFD", "\u1f82" * 99), "<|a long token|>" * 50)
    for _ in range(60):
        yield "".join(made.choices(pool, k=made.randint(1, 300)))


@pytest.mark.parametrize(("backend", "characters", "vanish"), BOUNDED.values(), ids=BOUNDED.keys())
def test_no_text_becomes_fewer_tokens_than_the_bound(backend, characters, vanish):
    bound = bound_of(backend)
    assert (bound.characters, bound.spaces_vanish) == (characters, vanish)
    for text in texts():
        assert bound.fewest_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids), text


def test_characters_that_a_vocabulary_leaves_out_count_as_nothing():
    bound = bound_of(without("a!"))
    assert bound.vanishing == "!a"
    assert bound.fewest_tokens("a!" * 99_999) == 0 == len(without("a!").encode("a!" * 99).ids)
    assert bound.fewest_tokens("xa!" * 4) == 1


def test_the_bound_is_reached_by_the_longest_token():
    backend = byte_level(merges=SPACES)
    assert bound_of(backend).fewest_tokens(" " * 400) == 100 == len(backend.encode(" " * 400).ids)


def test_a_composed_character_stands_for_four_at_most():
    composed = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert max(len(unicodedata.normalize("NFD", letter)) for letter in composed) == COMPOSED_OF


def words(**settings):
    return Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]", **settings))


@pytest.mark.parametrize(
    "backend",
    [
        words(),
        byte_level(normalizers.StripAccents()),
        byte_level(normalizers.Replace(Regex(" +"), " ")),
        byte_level(normalizers.Replace("a", "")),
        byte_level(normalizers.Replace("a", " "), added=[AddedToken("<|x|>", rstrip=True)]),
        without("k", normalizers.NFC()),
        without([byte_level().pre_tokenizer.pre_tokenize_str("\u00c0")[0][0][1]]),
        Backend(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True)),
        Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)),
    ],
    ids=[
        "words",
        "accents",
        "runs",
        "removed",
        "made spaces",
        "made another",
        "a byte is missing",
        "fused",
        "unigram",
    ],
)
def test_where_characters_can_vanish_there_is_no_bound(backend):
    assert bound_of(backend) is None


def test_a_prompt_that_is_too_long_is_refused_before_it_is_encoded(tmp_path):
    tokenizer = Tokenizer(SHIPPED)
    encoded = tokenizer.encoder.encode
    longest = max(map(len, tokenizer.encoder.tokenizer.get_vocab()))
    tokenizer.longest_prompt = 10
    for text in ("", "short", "x" * 10 * longest):
        tokenizer.check_length(text)
    with pytest.raises(RequestError) as caught:
        tokenizer.check_length("x" * (10 * longest + 1))
    assert (caught.value.code, caught.value.param) == ("prompt-too-long", "prompt")
    tokenizer.encoder.encode = lambda *given: pytest.fail("it was encoded")
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x" * 100_000}])
    assert (caught.value.code, caught.value.param) == ("prompt-too-long", "messages")
    tokenizer.encoder.encode = encoded
    tokenizer.longest_prompt = None
    tokenizer.check_length("x" * 100_000)


def test_where_no_bound_is_known_a_prompt_of_far_too_many_characters_is_refused_unencoded():
    """WordPiece: a word of any length is one token, and to say so takes as long as the word is."""
    tokenizer = Tokenizer(SHIPPED)
    words = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.encoder = FastEncoder(words)
    tokenizer.longest_prompt = 1000
    tokenizer.check_length("a" * 64_000)
    tokenizer.encoder.encode = lambda *given: pytest.fail("it was encoded")
    with pytest.raises(RequestError, match="64000 that are encoded") as caught:
        tokenizer.check_length("a" * 64_001)
    assert (caught.value.code, caught.value.param) == ("prompt-too-long", "prompt")
    # Of a few tokens any text of some pages may be tried.
    tokenizer.longest_prompt = 4
    tokenizer.check_length("a" * 16_000)


def test_a_long_text_becomes_the_ids_that_it_becomes_alone():
    """It goes another way through the library, on which other threads go on."""
    tokenizer = Tokenizer(SHIPPED)
    text = "def f(x):\n    return x\n\n" * (LONG_TEXT // 20)
    assert tokenizer.encode(text) == tokenizer.encoder.tokenizer.encode(text).ids
    longer = "\x00\x01" * PART
    assert len(tokenizer.encode(longer)) > PART
    assert tokenizer.encode(longer) == tokenizer.encoder.tokenizer.encode(longer).ids
    assert tokenizer.encode_cut(text, 50) == tokenizer.encode(text)[:50]
