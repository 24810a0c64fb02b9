"""A tokenizer.json, read once where it can do no harm: one that panics or aborts ends this process and no other.

Runs in a process of its own (program.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import tokenizers

# The greatest id that a token may have: what lists all ids, as saving does, lists those between as well. Vocabularies
# have half a million tokens at most.
MOST_TOKENS = 1 << 22

TEXTS = ("", "a", "Hello, world!\n 1234  \u00e9\u4e2d\U0001f600\u0000")


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load a tokenizer from `file` or from its `text`, and take some texts through it, both ways."""
    try:
        if "file" in request:
            made = tokenizers.Tokenizer.from_file(request["file"])
        else:
            made = tokenizers.Tokenizer.from_str(request["text"])
        greatest = max(made.get_vocab(with_added_tokens=True).values(), default=0)
        if greatest >= MOST_TOKENS:
            return {"invalid": f"a token has the id {greatest}; expected less than {MOST_TOKENS}"}
        made.no_truncation()
        made.no_padding()
        for text in TEXTS:
            # A text may have no ids in a vocabulary without bytes: that is no harm.
            with contextlib.suppress(Exception):
                made.decode(made.encode(text).ids)
        del made
    except MemoryError:
        raise
    except BaseException as error:  # a panic is no Exception
        return {"invalid": str(error)}
    return {"read": True}
