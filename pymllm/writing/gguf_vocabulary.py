"""A folder's tokenizer as a GGUF file's metadata: `text/gguf_tokenizer.py` the other way round.

Byte-level BPE becomes the kind "gpt2", with its merges and the name of its way to split text; sentencepiece's BPE
becomes "llama", with scores that put its merges in their order. What was written is read again at once, and must give
the same tokens for some texts; what cannot be written so is refused before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pymllm.errors import CheckpointError, ConfigError
from pymllm.text.gguf_tokenizer import (
    COMPOSED,
    CONTROL,
    GPT2,
    SPACE,
    SPLITS,
    UNKNOWN,
    USER_DEFINED,
    WHOLE_TOKENS_FIRST,
    GGUFTokenizer,
)
from pymllm.text.tokenizer import AutoEncoder, FastEncoder, Tokenizer, read_json

NORMAL, UNUSED, BYTE = 1, 5, 6  # further values of tokenizer.ggml.token_type
# Splits that several names stand for are written under the first of these.
USUAL = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2", "tekken", "gpt-4o", "deepseek-v3")
DIGIT = r"\p{N}"  # as Digits splits, one by one
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
SPECIAL = {"bos": "bos_token", "unknown": "unk_token", "padding": "pad_token"}
SAMPLES = (
    "Hello, world! It's 2024 - we've paid $1,234.50 (100%).",
    "def f(x):\n    return x ** 2  # \u00fcber\n\n\tif not x:\r\n        pass   ",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f44d\U0001f3fd e\u0301 \u00e9",
    "  two  spaces   three \u00a0nbsp\u2003em I'LL CAN'T camelCase HTTPServer 3.14159 1234567890",
    "",
    "a",
)


def write_vocabulary(tokenizer: Tokenizer, size: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the entries of a folder's tokenizer.

    size: rows of the embedding, each of which gets a token.  config: config.json.
    ConfigError for a tokenizer that GGUF has no kind for; a folder without one gives a file without one.
    """
    if not tokenizer.available:
        return {"tokenizer.ggml.model": "none"}
    data = json.loads(_library_tokenizer(tokenizer).to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise _cannot(tokenizer, f"its model is {model.get('type')}", "BPE, byte-level or sentencepiece's")
    tokens, types = _tokens(data, size, tokenizer)
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    written: dict[str, Any] = {}
    if _is_byte_level(data):
        written["model"], written["pre"] = "gpt2", _name_of_split(data, tokenizer)
        written["merges"] = [" ".join(merge) for merge in merges]
    elif model.get("byte_fallback"):
        written["model"], written["pre"] = "llama", "default"
        written["scores"] = _scores(tokens, merges)
        written["add_space_prefix"] = _adds_space(data)
        for index, token in enumerate(tokens):
            if types[index] == NORMAL and token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                types[index] = BYTE
            elif types[index] in (NORMAL, CONTROL) and token == model.get("unk_token"):
                types[index] = UNKNOWN
    else:
        raise _cannot(
            tokenizer,
            "its BPE is neither byte-level nor falls back to bytes",
            "a ByteLevel decoder, or byte_fallback",
        )
    written["tokens"], written["token_type"] = tokens, np.array(types, "<i4")
    written |= _special(tokenizer, tokens, config)
    written |= _added_by_itself(tokenizer, written)
    entries = {f"tokenizer.ggml.{key}": value for key, value in written.items()}
    template = tokenizer.chat_template
    if template is not None:
        entries["tokenizer.chat_template"] = template.source
    _check(tokenizer, entries, [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return entries


def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of the `tokenizers` library that the folder's becomes."""
    encoder = tokenizer.encoder
    if isinstance(encoder, FastEncoder):
        return encoder.tokenizer
    backend = encoder.tokenizer if isinstance(encoder, AutoEncoder) else None
    found = getattr(backend, "backend_tokenizer", None)
    if found is None:
        raise _cannot(tokenizer, f"it is a {type(backend).__name__}", "a tokenizer.json")
    return found


def _cannot(tokenizer: Tokenizer, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "GGUF has no kind for this tokenizer",
        code="tokenizer-unknown",
        file=str(tokenizer.folder),
        expected=expected,
        found=found,
        fix="Write another format: --format compressed-tensors.",
    )


def _tokens(data: Mapping[str, Any], size: int, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """List the token of each row of the embedding, and its type; rows without one are padding."""
    known = {index: token for token, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(known, NORMAL)
    for added in data.get("added_tokens") or ():
        known[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if known and max(known) >= size:
        raise _cannot(tokenizer, f"a token of the id {max(known)}", f"ids below {size}, the embedding's rows")
    tokens = [known.get(index, f"[PAD{index}]") for index in range(size)]
    return tokens, [types.get(index, UNUSED) for index in range(size)]


def _steps(step: Any, within: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder.  within: the key of those of a Sequence."""
    if step is None:
        return
    if step.get("type") == "Sequence":
        for one in step[within]:
            yield from _steps(one, within)
    else:
        yield step


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(data.get("decoder"), "decoders"))


def _name_of_split(data: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Name the way in which a byte-level BPE splits text, as `tokenizer.ggml.pre` does."""
    patterns: list[str] = []
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Digits":
            patterns.append(DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "Split":
            pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
            patterns.append(DIGIT if pattern in (DIGIT, r"\d") else pattern)
        elif step["type"] == "ByteLevel":
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            raise _cannot(tokenizer, f"text is split by {step['type']}", "Split, Digits or ByteLevel")
    normal = [step["type"] for step in _steps(data.get("normalizer"), "normalizers")]
    whole = bool(data["model"].get("ignore_merges"))

    def fits(name: str) -> bool:
        composed = ["NFC"] if name in COMPOSED else []
        return (tuple(patterns), normal, whole) == (SPLITS[name], composed, name in WHOLE_TOKENS_FIRST)

    names = [name for name in (*USUAL, *SPLITS) if fits(name)]
    if not names:
        what = f"text split by {patterns}, normalised by {normal}, whole tokens first: {whole}"
        raise _cannot(tokenizer, what, "one of the splits " + ", ".join(dict.fromkeys([*USUAL, *SPLITS])))
    return names[0]


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Give each token the rank, from 0 down, of the first merge that makes it; those that none makes follow."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return np.array([-float(ranks.get(token, len(merges))) for token in tokens], "<f4")


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Tell whether a sentencepiece tokenizer puts a space before a text."""
    prepends = any(
        step["type"] == "Prepend" and step.get("prepend") == SPACE
        for step in _steps(data.get("normalizer"), "normalizers")
    )
    schemes = [
        step.get("prepend_scheme", "always")
        for step in _steps(data.get("pre_tokenizer"), "pretokenizers")
        if step["type"] == "Metaspace"
    ]
    return prepends or any(scheme != "never" for scheme in schemes)


def _special(tokenizer: Tokenizer, tokens: list[str], config: Mapping[str, Any]) -> dict[str, int]:
    """Find the ids of special tokens: as tokenizer_config.json says, then config.json, then generation_config.json."""
    ids = {token: index for index, token in enumerate(tokens)}

    def named(setting: str) -> int | None:
        given = tokenizer.settings.get(setting)
        return ids.get(str(given["content"] if isinstance(given, Mapping) else given))

    found: dict[str, int] = {}
    for key, setting in SPECIAL.items():
        index = named(setting)
        index = config.get(f"{setting}_id") if index is None else index
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[f"{key}_token_id"] = index
    ends: list[Any] = [named("eos_token")]
    for settings in (config, read_json(tokenizer.folder / "generation_config.json")):
        given = settings.get("eos_token_id")
        ends += given if isinstance(given, list) else [given]
    usable = dict.fromkeys(end for end in ends if isinstance(end, int) and 0 <= end < len(tokens))
    return found | dict(zip(END_KEYS, usable, strict=False))


def _added_by_itself(tokenizer: Tokenizer, written: Mapping[str, Any]) -> dict[str, bool]:
    """Find which special tokens the tokenizer puts around every text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    before, after = ([], []) if start is None else (whole[:start], whole[start + len(plain) :])
    bos, eos = ([[], [written.get(f"{name}_token_id")]] for name in ("bos", "eos"))
    if start is None or before not in bos or after not in eos:
        raise _cannot(
            tokenizer, f"it makes {whole} of a text that is {plain}", "bos before a text, eos after it"
        )
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _check(tokenizer: Tokenizer, entries: Mapping[str, Any], special: Sequence[str]) -> None:
    """Read the entries as a tokenizer, and compare it with the folder's on some texts."""
    back = GGUFTokenizer(tokenizer.folder, entries)
    for text in (*SAMPLES, "".join(f"x {token} y" for token in special[:8])):
        try:
            ours = back.encode(text)
        except CheckpointError as error:
            raise _cannot(tokenizer, str(error), "a tokenizer that can be read again") from None
        theirs = tokenizer.encode(text)
        if ours != theirs:
            raise _cannot(
                tokenizer,
                f"{theirs[:12]} for {text[:30]!r}, where a GGUF file's would give {ours[:12]}",
                "the same tokens from the file as from the folder",
            )
