"""The request of /v1/embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pymllm.server.protocol.base import BodyRequest, Many, refuse
from pymllm.server.protocol.neutral import EMBEDDINGS, Neutral
from pymllm.server.protocol.sampled import TokenId

# How many texts one request may bring, as OpenAI has it.
MAX_INPUTS = 2048

# How long a text may be: it is encoded whole, before it is cut at what the model takes.
MAX_CHARACTERS = 1 << 20


class EmbeddingRequest(BodyRequest):
    """OpenAI's request, and sentence-transformers' `prompt_name` beside it.

    normalize: whether vectors have length 1; None: as the folder says.
    """

    NEUTRAL: ClassVar[Neutral] = EMBEDDINGS

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    input: str | Many[str] | Many[TokenId] | Many[Many[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    prompt_name: str | None = None
    normalize: bool | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one or several, each a text or token ids."""
        longest = max((len(text) for text in _texts_of(self.input)), default=0)
        if longest > MAX_CHARACTERS:
            refuse(
                "input",
                f"has a text that is too long: expected at most {MAX_CHARACTERS} characters, found {longest}",
            )
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]  # type: ignore[list-item]
        if not 1 <= len(self.input) <= MAX_INPUTS:
            refuse("input", f"expected 1 to {MAX_INPUTS} texts, found {len(self.input)}")
        return self.input  # type: ignore[return-value]


def _texts_of(given: str | list[Any]) -> list[str]:
    return [text for text in ([given] if isinstance(given, str) else given) if isinstance(text, str)]
