"""The second model of draft_model: whether it can draft for the model that it is to draft for."""

from __future__ import annotations

from typing import NoReturn

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError, counted
from pymllm.models.language_model import LanguageModel
from pymllm.text.gguf_tokenizer import open_tokenizer
from pymllm.weights.checkpoint import Checkpoint


def check_drafts(
    checkpoint: Checkpoint, config: ModelConfig, drafting: Checkpoint, model: LanguageModel
) -> None:
    """Refuse with ConfigError a second model that generates no text, or that knows other tokens.

    checkpoint, config: of the model.  drafting: the second one's checkpoint.  model: built from it.
    """
    if model.why_no_text is not None:
        _refuse(drafting, "a model that generates text", model.why_no_text)
    first, second = open_tokenizer(checkpoint), open_tokenizer(drafting)
    sizes = config.size("vocab_size"), model.config.size("vocab_size")
    if not first.available and not second.available:
        if sizes[0] != sizes[1]:
            _refuse(drafting, f"a vocabulary of {counted(sizes[0], 'token')}", str(sizes[1]))
        return
    if not first.available or not second.available:
        _refuse(
            drafting,
            "two checkpoints with the same tokenizer",
            f"no tokenizer in {(drafting if first.available else checkpoint).path}",
        )
    # Models of one family pad the same vocabulary to different sizes.
    for token in range(max(sizes)):
        pieces = first.encoder.piece(token), second.encoder.piece(token)
        if pieces[0] != pieces[1]:
            _refuse(drafting, f"token {token} to be {pieces[0]!r}, as in {checkpoint.path}", repr(pieces[1]))


def _refuse(drafting: Checkpoint, expected: str, found: str) -> NoReturn:
    raise ConfigError(
        "this model cannot draft for the other one: the two must share their vocabulary",
        code="strategy",
        file=str(drafting.path),
        tensor="path",
        expected=expected,
        found=found,
        fix="Name a smaller model of the same family: --strategy draft_model:path=MODEL.",
    )
