"""Errors as OpenAI clients know them: a status, and an object that names the parameter."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from pymllm.errors import PymllmError, RankError, RequestError

# Errors that are not RequestErrors, and yet no fault of the server's: this model cannot take such a request.
CLIENT_CODES = (
    "chat-template-missing",
    "tokenizer-missing",
    "pooling-missing",
    "embedding-module",
    "grammar",
)

# Errors that say that the server cannot answer now, whatever the request.
UNAVAILABLE_CODES = ("shutting-down", "adapter-gone", "out-of-memory")

# What OpenAI's clients know by another code than ours.
OPENAI_CODES = {
    "prompt-too-long": "context_length_exceeded",
    "parameter": "invalid_value",
    "token-id": "invalid_value",
    "prompt-empty": "invalid_value",
    "prompt": "invalid_type",
    "text": "invalid_value",
}


class NoSuchModel(RequestError):
    """A request for a model that is not here, which clients know as 404."""


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Make the error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def words_of(error: PymllmError) -> str:
    """Return an error's text without the folders of this machine, which are no business of a client."""
    text, file = str(error), error.file
    if not file:
        return text
    text = text.removeprefix(f"{file}: ").removeprefix(f"{file}, ")
    return text.replace(file, PurePath(file).name)


def refusal_of(error: PymllmError) -> tuple[int, dict[str, Any]]:
    """Return the status and the body that tell a client of an error."""
    if isinstance(error, RankError) or error.code in UNAVAILABLE_CODES:
        return 503, error_body(503, words_of(error), code=error.code)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, NoSuchModel) else 400
        code = OPENAI_CODES.get(error.code, error.code)
        return status, error_body(status, words_of(error), param=error.param, code=code)
    # Ranks that are lost come back: the client may try again.
    status = 503 if isinstance(error, RankError) else 400 if error.code in CLIENT_CODES else 500
    return status, error_body(status, words_of(error), code=error.code)
