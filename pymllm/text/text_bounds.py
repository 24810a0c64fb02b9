"""How few tokens a text can become, from its length alone: what is far too long for a model is refused unencoded.

Every token stands for so many characters at most, if no character can vanish on the way: that is so for byte-level BPE,
and for BPE with a token for each byte. For other tokenizers (WordPiece, unigrams, those that remove accents) no bound
is known: WordPiece makes one token of a word of any length. What has far more characters than any text of a model's
length is refused there (`most_characters`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A character in NFC stands for four characters in NFD at most (U+1F82 for one), and no text is longer than its NFD.
COMPOSED_OF = 4
CHUNK = 1 << 16

# Where no bound is known: characters of a prompt for each token that the model takes, ten times those of any language,
# and how many a prompt may have in any case.
CHARACTERS_A_TOKEN, FREE_CHARACTERS = 64, 1 << 14

# The bytes of UTF-8; each character of several has one that continues it.
CONTINUING = range(0x80, 0xC0)
IN_TEXTS = [*range(0xC0), *range(0xC2, 0xF5)]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in IN_TEXTS]
KEEPS = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength")
DROPS_SPACES = ("Whitespace", "WhitespaceSplit")


@dataclass(frozen=True)
class TextBound:
    """The most characters of a text that one token stands for.

    spaces_vanish: whether white space may be part of none.  vanishing: other characters that are part of none.
    """

    characters: int
    spaces_vanish: bool
    vanishing: str = ""

    def fewest_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least."""
        size = 0
        # By chunks, so that other threads have their turn.
        for start in range(0, len(text), CHUNK):
            chunk = text[start : start + CHUNK]
            if self.spaces_vanish:
                chunk = "".join(chunk.split())
            size += len(chunk) - sum(map(chunk.count, self.vanishing))
        return math.ceil(size / self.characters)


def most_characters(tokens: int) -> int:
    """Return how long a prompt for so many tokens may be where nobody knows how few tokens it becomes."""
    return max(tokens * CHARACTERS_A_TOKEN, FREE_CHARACTERS)


class _Unbounded(Exception):
    """A tokenizer of which no bound is known."""


def bound_of(tokenizer: Any) -> TextBound | None:
    """Read the bound of a tokenizer of the `tokenizers` library; None: there is none.

    A run of white space that an added token takes with it counts as nothing.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    spaces_vanish = any(token.lstrip or token.rstrip for token in added)
    try:
        _check_processor(_state(tokenizer.post_processor))
        shrinks, strips = _normalizer(_state(tokenizer.normalizer))
        bytes_before, drops = _pre_tokenizer(_state(tokenizer.pre_tokenizer))
        bytes_first = bytes_before or "ByteLevel" in _kinds(_state(tokenizer.normalizer), "normalizers")
        vanishing = _vanishing(tokenizer, vocabulary, bytes_first)
        if vanishing and _state(tokenizer.normalizer)["type"] not in (None, "ByteLevel", "Prepend"):
            # Others may become characters that vanish.
            raise _Unbounded
    except _Unbounded:
        return None
    longest = max(map(len, vocabulary), default=0)
    return TextBound(longest * shrinks, spaces_vanish or strips or drops, vanishing) if longest else None


def _state(step: Any) -> Mapping[str, Any]:
    return {"type": None} if step is None else json.loads(step.__getstate__())


def _kinds(state: Mapping[str, Any], several: str) -> list[str]:
    return [state["type"], *(kind for one in state.get(several, ()) for kind in _kinds(one, several))]


def _normalizer(state: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how many characters may become one, and whether white space may vanish."""
    kind = state["type"]
    if kind == "Sequence":
        found = [_normalizer(one) for one in state["normalizers"]]
        return math.prod(shrinks for shrinks, _ in found), any(strips for _, strips in found)
    if kind in (None, "NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"):
        return 1, False
    if kind in ("NFC", "NFKC"):
        return COMPOSED_OF, False
    if kind == "Strip":
        return 1, True
    if kind == "Replace" and "String" in state["pattern"] and state["content"]:
        pattern, content = state["pattern"]["String"], state["content"]
        # What becomes white space may vanish with it.
        if content.strip() or not pattern.strip():
            return math.ceil(len(pattern) / len(content)) or 1, False
    raise _Unbounded


def _pre_tokenizer(state: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether what is left is spelled bytes, and whether white space may vanish."""
    kind = state["type"]
    if kind == "Sequence":
        found = [_pre_tokenizer(one) for one in state["pretokenizers"]]
        return any(spelled for spelled, _ in found), any(drops for _, drops in found)
    if kind is None or kind in KEEPS:
        return kind == "ByteLevel", False
    if kind in ("Split", "Punctuation") and state["behavior"] != "Removed":
        return False, False
    if kind in DROPS_SPACES:
        return False, True
    raise _Unbounded


def _check_processor(state: Mapping[str, Any]) -> None:
    """Raise _Unbounded for a template of special tokens that leaves the text out."""
    for step in state.get("processors", (state,)):
        if "processors" in step:
            _check_processor(step)
        elif step["type"] == "TemplateProcessing" and not any(
            "Sequence" in piece for piece in step["single"]
        ):
            raise _Unbounded


def _vanishing(tokenizer: Any, vocabulary: Mapping[str, int], bytes_first: bool) -> str:
    """Return the characters that the model leaves out.

    Raises _Unbounded if these may be any, or if it makes one token of any number of characters.
    """
    model = tokenizer.model
    if type(model).__name__ != "BPE":
        raise _Unbounded
    letters = _letters()
    if bytes_first and all(letters[byte] in vocabulary for byte in CONTINUING):
        # Of a character of several bytes one is left at least; control characters have no token in some vocabularies.
        return "".join(chr(byte) for byte in range(0x80) if letters[byte] not in vocabulary)
    each_byte = model.byte_fallback and all(token in vocabulary for token in BYTE_TOKENS)
    if each_byte or (model.unk_token in vocabulary and not model.fuse_unk):
        return ""
    raise _Unbounded


def _letters() -> dict[int, str]:
    """Map the 256 bytes to the letters by which byte-level vocabularies spell them."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in prints)
    return {byte: chr(byte) for byte in prints} | {byte: chr(256 + at) for at, byte in enumerate(others)}
