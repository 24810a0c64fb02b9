"""How bodies are read: strictly, whole, and with an error that names the parameter that is to blame."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pymllm.errors import RequestError

# Parameters that this server does not have, each with the values that ask for nothing; null is always
# one of them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    # Those of other servers.
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "repeat_penalty": (1, 1.0),
    "priority": (0,),
    "cache_prompt": (True, False),
}


# The names by which pydantic calls the forms that a value may have.
FORMS = ("str", "int", "float", "bool", "dict", "none")


class StrictModel(BaseModel):
    """An object of a body, with no field but its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class BodyRequest(StrictModel):
    """A body that asks for something.

    NEUTRAL: the parameters that this kind does not have, each with the values that ask for nothing.
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the body as it is validated: clients spell some things in several ways."""
        return raw

    def check(self) -> None:
        """Refuse with a RequestError parameters that do not go together."""


R = TypeVar("R", bound=BodyRequest)


def read_request(kind: type[R], body: bytes | Mapping[str, Any]) -> R:
    """Read a request of this kind from a body.  RequestError, with the parameter's name if one is to blame.

    body: JSON, or what `parse_json` made of it.
    """
    raw = dict(body) if isinstance(body, Mapping) else parse_json(body)
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object", code="json", found=type(raw).__name__)
    for name, neutral in kind.NEUTRAL.items():
        if name in kind.model_fields:
            continue
        if raw.get(name) is not None and not any(_same(raw[name], value) for value in neutral):
            refuse(name, "is not supported by this server", code="unsupported_parameter")
        raw.pop(name, None)
    raw = kind.prepare({key: value for key, value in raw.items() if value is not None})
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = _most_telling(error)
        name, where = str(first["loc"][0]), ".".join(map(str, filter(_is_place, first["loc"])))
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            refuse(name, "is not supported by this server", code="unsupported_parameter")
        if name in ("prompt", "input") and name in raw:
            refuse(name, f"must be text, token ids, or a list of such {name}s")
        detail = first["msg"][0].lower() + first["msg"][1:]
        refuse(name, detail if where == name else f"{detail} (at {where})")
    request.check()
    return request


def _most_telling(error: ValidationError) -> Any:
    """Choose the error to tell of: where a value may have several forms, of the form that it is nearest to."""
    errors = error.errors(include_url=False, include_context=False)
    return max(
        (one for one in errors if one["loc"][0] == errors[0]["loc"][0]), key=lambda one: len(one["loc"])
    )


def _is_place(step: str | int) -> bool:
    """Tell whether a step towards an error is one in the body, and not the name of one of several forms."""
    return isinstance(step, int) or (
        step.replace("_", "").islower() and step.isidentifier() and step not in FORMS
    )


def parse_json(body: bytes) -> Any:
    """Parse a JSON text strictly: UTF-8, finite numbers, whole characters.  RequestError if it is none."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        # Half a surrogate pair is no text: it cannot be encoded again.
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError.
        raise RequestError(f"the body is not valid JSON: {error}", code="json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Compare values and their types: 1 equals True, but is not the same."""
    return type(value) is type(neutral) and value == neutral


def refuse(param: str, message: str, *, code: str = "parameter") -> NoReturn:
    """Raise the RequestError for a parameter; `message` goes on from its name."""
    raise RequestError(f"{param} {message}", code=code, tensor=param)
