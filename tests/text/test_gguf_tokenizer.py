"""Byte-level tokenizers of GGUF files: token ids are llama.cpp's."""

import json
from pathlib import Path

import pytest

from pymllm.errors import CheckpointError
from pymllm.text.gguf_tokenizer import GGUFTokenizer

from .gguf_vocabulary import STRINGS, TOKENS, metadata

EXPECTED = json.loads((Path(__file__).parent / "token_ids.json").read_text())


def tokenizer(pre, **changes):
    return GGUFTokenizer(Path("m.gguf"), metadata(pre) | changes)


@pytest.mark.parametrize("pre", EXPECTED)
def test_token_ids_are_llama_cpps(pre):
    ours = tokenizer(pre)
    for text, expected in zip(STRINGS, EXPECTED[pre], strict=True):
        assert ours.encode(text) == expected, text
        own = ours.encode(text, add_special_tokens=False)
        assert ours.decode(own, skip_special_tokens=False) == text


def test_splits_are_not_the_same_thing():
    """Otherwise the test above could not fail."""
    assert len({json.dumps([ids[-12:] for ids in EXPECTED[pre]]) for pre in EXPECTED}) >= 8


@pytest.mark.parametrize("kind", ("bert", "t5", "rwkv", "gemma4", "plamo2", "none", ""))
def test_another_kind_of_tokenizer_is_refused_by_its_name(kind):
    refused = tokenizer("smollm", **{"tokenizer.ggml.model": kind})
    assert not refused.available
    with pytest.raises(CheckpointError) as caught:
        refused.encode("a")
    assert caught.value.code == "tokenizer-unknown" and repr(kind) in str(caught.value)


def test_a_file_that_names_no_split_has_llama_cpps_default_one():
    named = metadata("default")
    del named["tokenizer.ggml.pre"]
    ours = GGUFTokenizer(Path("m.gguf"), named)
    assert [ours.encode(text) for text in STRINGS] == EXPECTED["default"]


SPM = [
    "<unk>",
    "<s>",
    "</s>",
    "<|end|>",
    "<|endoftext|>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "\u2581",
    "a",
]


def sentencepiece(architecture, **changes):
    kinds = [2, 3, 3, 3, 3, *[6] * 256, 1, 1]
    return GGUFTokenizer(
        Path("m.gguf"),
        {
            "general.architecture": architecture,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": SPM,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [0.0] * len(SPM),
        }
        | changes,
    )


def test_sentencepiece_has_its_usual_ids_where_a_file_names_none():
    assert sentencepiece("llama").encode("a") == [1, 261, 262]
    assert sentencepiece("llama", **{"tokenizer.ggml.add_eos_token": True}).encode("a") == [1, 261, 262, 2]


def test_phi_3s_own_tokens_take_the_spaces_that_follow():
    text = "a<|end|>  \n a<s>  a<|endoftext|> a"
    spaces = [261, 261, 261]
    newline = SPM.index("<0x0A>")
    taken = [1, 261, 262, 3, 261, 262, 1, *spaces, 262, 4, 261, 261, 262]
    kept = [1, 261, 262, 3, *spaces, newline, 261, 262, 1, *spaces, 262, 4, 261, 261, 262]
    assert sentencepiece("phi3").encode(text) == taken
    assert sentencepiece("llama").encode(text) == kept


def test_every_token_of_the_vocabulary_is_its_own():
    ours = tokenizer("gpt-2")
    assert len(set(TOKENS)) == len(TOKENS) and ours.encoder is not None
