"""A tiny byte-level vocabulary whose merges cross every place where splits differ, and strings to encode with it.

`token_ids.json` has what llama.cpp's server (xllamacpp 2026.10) made of the strings with a GGUF file of this
vocabulary, by `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from typing import Any

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2's alphabet: printable bytes are themselves, the others follow from 256 on.
ALPHABET = {byte: chr(byte) for byte in PRINTABLE}
ALPHABET |= {byte: chr(256 + at) for at, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}


def piece(text: str) -> str:
    """Spell a text in that alphabet."""
    return "".join(ALPHABET[byte] for byte in text.encode())


PAIRS = [
    (" ", " "),
    (" ", "a"),
    ("a", "b"),
    ("ab", "c"),
    ("1", "2"),
    ("12", "3"),
    ("123", "4"),
    (" ", "1"),
    ("\n", "\n"),
]
PAIRS += [
    ("'", "t"),
    ("n", "'t"),
    ("!", "!"),
    (" ", "é"),
    (".", "."),
    ("A", "b"),
    ("b", "A"),
    ("/", "/"),
    ("!", "\n"),
]
PAIRS += [
    (" ", "!"),
    (" ", "\n"),
    ("\r", "\n"),
    ("(", "a"),
    ("\t", "\t"),
    ("_", "_"),
    ("a", "1"),
    ("1", "a"),
    ("=", "="),
]
PAIRS += [
    (" ", "."),
    ("a", " "),
    ("中", "中"),
    ("  ", "  "),
    ("'", "T"),
    ("n", "'T"),
    ("a", "'t"),
    (" ", "_"),
    ("a", "!"),
]
MERGES = [
    (piece(left[:1]) if len(left) == 1 and len(left.encode()) > 1 else piece(left), piece(right))
    for left, right in PAIRS
]
# The two bytes of é, and the three of 中, are merged first.
BYTES = [
    (ALPHABET[0xC3], ALPHABET[0xA9]),
    (ALPHABET[0xE4], ALPHABET[0xB8]),
    (ALPHABET[0xE4] + ALPHABET[0xB8], ALPHABET[0xAD]),
]
MERGES = [*BYTES, *MERGES]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET.values()]
TOKENS += [token for token in dict.fromkeys(left + right for left, right in MERGES) if token not in TOKENS]
TYPES = [3, 3, 3, *[1] * (len(TOKENS) - 3)]

STRINGS = [
    "",
    " a  abc   a    ",
    "12345 1234 1 a1a",
    "1234\u0663\u0661 \u0662 a",
    "don't DON'T an't a't 't",
    "a\n\nb \n\n \r\nab!\n!!\n",
    "\t\tabc\t a\u00a0 a\u3000a",
    "é éé x\u0301 \u0301b",
    "AbAb abAbc ABab",
    "a__ __a a//b a == b ...(ab).. .",
    "中中 a中1中",
    "<|im_start|>a <|im_end|> \n<|im_end|><|im_start",
    "\x00a\x01 \x7f\x85a\u200b \u200da",
    "👍🏽 a👨\u200d👩 !",
    "a" * 40 + "12" * 20 + " " * 9 + "\n",
]


def metadata(pre: str) -> dict[str, Any]:
    """Return a file's metadata as far as it is the tokenizer's."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
