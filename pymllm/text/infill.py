"""Prompts with a gap, which code models were trained to fill: tokens of their own say where it is."""

from __future__ import annotations

from pymllm.errors import RequestError
from pymllm.text.tokenizer import Tokenizer

# By family: how a prompt is written. Every word in angle brackets must be one token of the vocabulary.
# Sources: the models' own pages: Qwen2.5-Coder and CodeGemma; StarCoder and Granite; SantaCoder; DeepSeek-Coder.
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


def infill(tokenizer: Tokenizer, before: str, after: str) -> str:
    """Write the prompt for what stands between two texts.  RequestError where the tokenizer has no tokens for it."""
    if tokenizer.available:
        for begin, hole, end in SPELLINGS:
            if all(_is_token(tokenizer, one) for one in (begin, hole, end)):
                return f"{begin}{before}{hole}{after}{end}"
    raise RequestError(
        "suffix is not supported by this model: its tokenizer has no tokens for what is to be filled in",
        code="unsupported_parameter",
        tensor="suffix",
        expected=" or ".join(names[0] for names in SPELLINGS),
    )


def _is_token(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.encoder.piece(ids[0]) == text
