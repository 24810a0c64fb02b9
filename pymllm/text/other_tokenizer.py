"""A tokenizer in place of the checkpoint's own: found by its path or hub id, and held against the model."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Container
from pathlib import Path

from pymllm.errors import CheckpointError, ConfigError
from pymllm.text.gguf_tokenizer import GGUFTokenizer
from pymllm.text.tokenizer import VOCABULARIES, Tokenizer
from pymllm.weights.folder import is_gguf
from pymllm.weights.gguf_file import GGUFFile

logger = logging.getLogger("pymllm")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZER = "tokenizer.json"
DOWNLOADED = [
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("config.json", "*.jinja", "chat_template.json"),
    *VOCABULARIES,
]


def find_tokenizer(given: str | Path) -> Tokenizer:
    """Open a tokenizer by a folder, its tokenizer.json, a .gguf file or a hub id, of which its files are downloaded.

    CheckpointError for what is none of these, or holds no tokenizer that can be read.
    """
    path = Path(given)
    if path.is_dir() and given != "":
        tokenizer = Tokenizer(path)
    elif is_gguf(path) and os.path.lexists(path):
        with GGUFFile.open(path) as file:
            tokenizer = GGUFTokenizer(path, file.metadata)
    elif path.name == TOKENIZER and os.path.lexists(path):
        tokenizer = Tokenizer(path.parent)
    elif isinstance(given, str) and HUB_ID.fullmatch(given) and not os.path.lexists(path):
        tokenizer = Tokenizer(_download(given))
    else:
        raise CheckpointError(
            f"there is no tokenizer {str(given)!r}",
            code="tokenizer-missing",
            expected=f'a folder with {TOKENIZER}, that file, a .gguf file, or a hub id "org/name"',
            fix="Check the spelling and the working directory.",
        )
    tokenizer.encode("")  # read now, so that what is wrong with it shows before weights are read
    return tokenizer


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    failures: tuple[type[BaseException], ...] = (OSError, EntryNotFoundError, HFValidationError)
    failures += HfHubHTTPError.__bases__
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=DOWNLOADED))
    except failures as error:
        raise CheckpointError(
            f"the hub did not give the tokenizer {name!r}: {' '.join(str(error).split())[:200]}",
            code="tokenizer-missing",
            fix="Check the id, the access rights and the network, or give a folder.",
        ) from error


def check_tokenizer(
    tokenizer: Tokenizer, given: str | Path, own: Tokenizer, vocabulary: int, ends: Container[int]
) -> None:
    """Hold a tokenizer, found as `given`, against the model whose place it takes in.

    own: the checkpoint's own.  vocabulary: how many tokens the model's embedding has.  ends: those that end answers.
    ConfigError for one with tokens that the model does not have. A smaller one is right: embeddings are often padded.
    What makes nonsense of texts but could be meant is a warning: other ids than the checkpoint's own tokenizer has, or
    an end of texts that does not end answers.
    """
    ids = tokenizer.encoder.vocabulary()
    largest = max(ids.values(), default=-1)
    if largest >= vocabulary:
        token = next(token for token, number in ids.items() if number == largest)
        raise ConfigError(
            "the tokenizer has tokens that the model does not have",
            code="tokenizer-vocabulary",
            file=str(given),
            expected=f"ids up to {vocabulary - 1}, as the model's embedding has {vocabulary} rows",
            found=f"{token!r} with the id {largest}",
            fix="Give the tokenizer that the model was trained with.",
        )
    theirs: dict[str, int] = {}
    if own.available:
        with contextlib.suppress(CheckpointError):  # one that cannot be read is a reason to give another
            theirs = own.encoder.vocabulary()
    moved = [token for token, number in theirs.items() if ids.get(token) != number]
    if moved:
        logger.warning(
            "%s: %d of the %d tokens of the checkpoint's own tokenizer have another id or none, %r the first: "
            "the model reads other texts than are written",
            *(given, len(moved), len(theirs), moved[0]),
        )
    named = tokenizer.special_tokens.get("eos_token")
    if named in ids and ids[named] not in ends:
        logger.warning(
            "%s: its end of texts, %r, is the token %d, which ends no answer of this model (generation_config.json)",
            *(given, named, ids[named]),
        )
