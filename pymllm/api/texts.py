"""What an `LLM` knows of texts before it has its weights: its tokenizer, its ends, how answers are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymllm.engine.sampling import SamplingParams, recommended_settings
from pymllm.engine.strategies import refused_settings
from pymllm.errors import RequestError
from pymllm.loading.prepare import Prepared
from pymllm.text.end_tokens import end_tokens_of
from pymllm.text.gguf_tokenizer import open_tokenizer
from pymllm.text.other_tokenizer import check_tokenizer, find_tokenizer
from pymllm.text.prompts import Prompt, token_ids_of
from pymllm.text.tokenizer import Tokenizer, read_json


def choose_tokenizer(
    prepared: Prepared, given: str | Path | None = None, chat_template: str | Path | None = None
) -> Tokenizer:
    """Open the tokenizer of a model: `given`, or else the checkpoint's own; see `LLM` for both arguments.

    A tokenizer that has no chat template gets the checkpoint's.
    Raises what `find_tokenizer` and `check_tokenizer` raise; the checkpoint's own is read on first use.
    """
    own = open_tokenizer(prepared.checkpoint, chat_template)
    if given is None:
        return own
    tokenizer = find_tokenizer(given)
    check_tokenizer(tokenizer, given, own, prepared.config.size("vocab_size"), end_tokens(prepared))
    if chat_template is not None or not tokenizer.chat_templates:
        tokenizer.chat_templates = own.chat_templates
    return tokenizer


def generation_config(prepared: Prepared) -> dict[str, Any]:
    """Read the checkpoint's generation_config.json; {} without one."""
    return read_json(prepared.checkpoint.path / "generation_config.json")


def end_tokens(prepared: Prepared) -> frozenset[int]:
    """Return the tokens that end answers."""
    checkpoint = prepared.checkpoint
    return end_tokens_of(checkpoint.config_file, generation_config(prepared), prepared.config.raw)


def default_params(
    prepared: Prepared, generation: Mapping[str, Any] | None = None, /, **overrides: Any
) -> SamplingParams:
    """Make the sampling parameters that the checkpoint recommends, but for `overrides`.

    generation: its generation_config.json; None: as the file is now.

    RequestError for what no request may have; ConfigError for what the checkpoint may not recommend.
    """
    file = str(prepared.checkpoint.path / "generation_config.json")
    refused = refused_settings(prepared.model.strategy.name)
    found = generation_config(prepared) if generation is None else dict(generation)
    return SamplingParams(**{**recommended_settings(found, refused, file), **overrides})


def encode(tokenizer: Tokenizer, prompt: Prompt, vocabulary: int) -> list[int]:
    """Turn a prompt into token ids; a prompt of ids is checked against the vocabulary.

    RequestError for an id outside of it, or a prompt that is neither text nor ids.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids_of(prompt)
    bad = next((token for token in ids if not 0 <= token < vocabulary), None)
    if bad is not None:
        raise RequestError(
            "a token id lies outside the vocabulary",
            code="token-id",
            tensor="prompt",
            expected=f"0 to {vocabulary - 1}",
            found=str(bad),
        )
    return ids
