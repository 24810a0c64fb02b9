"""Windows of token ids for a model to run over: from a text file or, without one, random."""

from __future__ import annotations

from pathlib import Path

import torch

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError, counted
from pymllm.text.gguf_tokenizer import open_tokenizer
from pymllm.weights.checkpoint import Checkpoint

# Tokens of a window at least; a text of fewer says nothing of a model.
LEAST_WINDOW = 32

Windows = tuple[tuple[int, ...], ...]


def read_windows(
    checkpoint: Checkpoint, config: ModelConfig, file: Path, tokens: int, window: int
) -> Windows:
    """Read about `tokens` token ids of a text file, in windows at even distances.

    window: the tokens of a window, or fewer where the model or the text is shorter.
    ConfigError for too short a text, or a tokenizer of another model.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text cannot be read: {error}", code="text", file=str(file)) from None
    ids = open_tokenizer(checkpoint).encode(text)
    vocabulary, largest = config.size("vocab_size"), max(ids, default=0)
    if largest >= vocabulary:
        raise ConfigError(
            "the tokenizer makes a token that the model has no row for",
            code="text",
            file=str(checkpoint.path),
            expected=f"ids below vocab_size, {vocabulary}",
            found=str(largest),
            fix="Put the tokenizer that the model was trained with beside its weights.",
        )
    window = min(window, config.size("max_position_embeddings"), len(ids))
    if window < LEAST_WINDOW or tokens < window:
        raise ConfigError(
            "there is too little text",
            code="text",
            file=str(file),
            expected=f"windows of at least {LEAST_WINDOW} tokens, and one of them",
            found=f"{counted(len(ids), 'token')} of text, {tokens} asked for, in windows of {window}",
        )
    count = max(1, min(tokens, len(ids)) // window)
    last = len(ids) - window
    starts = [last * index // max(count - 1, 1) for index in range(count)]
    return tuple(tuple(ids[start : start + window]) for start in starts)


def random_windows(config: ModelConfig, tokens: int, window: int, seed: int = 0) -> Windows:
    """Make about `tokens` random token ids in windows, the same ones for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    window = min(window, config.size("max_position_embeddings"), tokens)
    count = max(1, tokens // window)
    ids = torch.randint(0, config.size("vocab_size"), (count, window), generator=generator)
    return tuple(tuple(row) for row in ids.tolist())
