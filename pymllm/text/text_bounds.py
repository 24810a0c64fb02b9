"""How few tokens a text can become, from its length alone: what is far too long for a model is refused unencoded.

Every token stands for so many characters at most, if no character can vanish on the way: that is so for byte-level BPE,
and for BPE with a token for each byte. For other tokenizers (WordPiece, unigrams, those that remove accents) no bound
is known, and every text is encoded.
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

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
KEEPS = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength")
DROPS_SPACES = ("Whitespace", "WhitespaceSplit")


@dataclass(frozen=True)
class TextBound:
    """The most characters of a text that one token stands for.  spaces_vanish: white space may be part of none."""

    characters: int
    spaces_vanish: bool

    def fewest_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least."""
        size = len(text)
        if self.spaces_vanish:
            # By chunks, so that other threads have their turn.
            chunks = (text[start : start + CHUNK] for start in range(0, size, CHUNK))
            size = sum(len("".join(chunk.split())) for chunk in chunks)
        return math.ceil(size / self.characters)


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
        shrinks, strips = _normalizer(_state(tokenizer.normalizer))
        bytes_before, drops = _pre_tokenizer(_state(tokenizer.pre_tokenizer))
        bytes_first = bytes_before or "ByteLevel" in _kinds(_state(tokenizer.normalizer), "normalizers")
        _check_model(tokenizer, vocabulary, bytes_first)
    except _Unbounded:
        return None
    longest = max(map(len, vocabulary), default=0)
    return TextBound(longest * shrinks, spaces_vanish or strips or drops) if longest else None


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
        return math.ceil(len(state["pattern"]["String"]) / len(state["content"])) or 1, False
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


def _check_model(tokenizer: Any, vocabulary: Mapping[str, int], bytes_first: bool) -> None:
    """Raise _Unbounded if the model may leave characters out, or make one token of any number of them."""
    model = tokenizer.model
    kind = type(model).__name__
    letters = bytes_first and all(letter in vocabulary for letter in _letters())
    if kind == "BPE":
        each_byte = model.byte_fallback and all(token in vocabulary for token in BYTE_TOKENS)
        one_by_one = model.unk_token in vocabulary and not model.fuse_unk
        if letters or each_byte or one_by_one:
            return
    raise _Unbounded


def _letters() -> str:
    """Return the letters by which byte-level vocabularies spell the 256 bytes."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return "".join(map(chr, [*prints, *range(256, 256 + 256 - len(prints))]))
