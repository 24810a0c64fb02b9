"""How bodies are read: strictly, whole, and with an error that names the parameter that is to blame."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pymllm.errors import RequestError
from pymllm.server.protocol.neutral import GENERATING, Neutral

# How pydantic's names of what is wrong end, and OpenAI's codes.
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "_type": "invalid_type",
    "_parsing": "invalid_type",
}


# How deeply objects and lists of a parameter may lie in each other: what reads them calls itself for each.
MAX_DEPTH = 256

# How many objects and lists a parameter may have, and a body: nobody else is answered while they are made and read.
MAX_OBJECTS, MAX_OF_BODY = 1 << 15, 1 << 17

# How many values and keys a body may have: those of 300,000 token ids, which OpenAI takes at a time, and more.
MAX_VALUES = 1 << 19

# How many keys a body may have itself, and an object in it: each that is not known is an error of its own; and how many
# all of its objects may have: keys take ten times the time of other values.
MAX_PARAMETERS, MAX_KEYS, MAX_ALL_KEYS = 1 << 10, 1 << 12, 1 << 16

# Bodies of more bytes are read one at a time: nobody else has a turn while the parser has its own.
LARGE_BODY = 1 << 16
_one_at_a_time = threading.Lock()

# How much of a name that a client has chosen an error shows.
MAX_SHOWN = 140

# The names by which pydantic calls the forms that a value may have.
FORMS = ("str", "int", "float", "bool", "dict", "none")


T = TypeVar("T")

# A list that is read up to what is wrong: there may be a million of it, and one is told of.
Many = Annotated[list[T], Field(fail_fast=True)]


class StrictModel(BaseModel):
    """An object of a body, with no field but its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class BodyRequest(StrictModel):
    """A body that asks for something.

    NEUTRAL: the parameters that this kind does not have, each with the values that ask for nothing.
    """

    NEUTRAL: ClassVar[Neutral] = GENERATING

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
    with _one_at_a_time if len(body) > LARGE_BODY else contextlib.nullcontext():
        return _read(kind, dict(body) if isinstance(body, Mapping) else parse_json(body))


def _read(kind: type[R], raw: Any) -> R:
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object", code="json", found=type(raw).__name__)
    if len(raw) > MAX_PARAMETERS:
        most, found = f"at most {MAX_PARAMETERS}", str(len(raw))
        raise RequestError("the body has too many parameters", code="json", expected=most, found=found)
    for name, value in raw.items():
        if len(name) > MAX_SHOWN:
            refuse(name[:MAX_SHOWN], "... is not supported by this server", code="unsupported_parameter")
        _check_size(name, value)
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
        code = next((code for ends, code in CODES.items() if first["type"].endswith(ends)), "invalid_value")
        if name in ("prompt", "input") and name in raw:
            refuse(name, f"must be text, token ids, or a list of such {name}s", code="invalid_type")
        detail = first["msg"][0].lower() + first["msg"][1:]
        refuse(name, detail if where == name else f"{detail} (at {where[:MAX_SHOWN]})", code=code)
    request.check()
    return request


def _check_size(name: str, value: Any) -> None:
    """Refuse a parameter that is nested too deeply, or has too many objects and lists."""
    level, found = [value] if isinstance(value, (dict, list)) else [], 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        found += len(level)
        if found > MAX_OBJECTS:
            refuse(name, f"has too many objects and lists: expected at most {MAX_OBJECTS}")
        if any(len(one) > MAX_KEYS for one in level if isinstance(one, dict)):
            refuse(name, f"has an object of too many keys: expected at most {MAX_KEYS}")
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for ones in inner for one in ones if isinstance(one, (dict, list))]
    if level:
        refuse(name, f"is nested too deeply: expected at most {MAX_DEPTH} levels")


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
    if len(body) > LARGE_BODY:
        _check_counts(body)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        # Half a surrogate pair is no text: it cannot be encoded again.
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError.
        raise RequestError(f"the body is not valid JSON: {error}", code="json") from None


def _check_counts(body: bytes) -> None:
    """Refuse with a RequestError, unparsed, a body of more objects, lists, values or keys than any may have."""
    counted = (
        ("objects and lists", (b"[", b"{"), MAX_OF_BODY),
        ("values", (b",",), MAX_VALUES),
        ("keys", (b":",), MAX_ALL_KEYS),
    )
    bare: bytes | None = None
    for what, signs, most in counted:
        if sum(map(body.count, signs)) > most:
            # They may stand in texts.
            bare = _without_texts(body) if bare is None else bare
            if sum(map(bare.count, signs)) > most:
                raise RequestError(f"the body has too many {what}", code="json", expected=f"at most {most}")


def _without_texts(body: bytes) -> bytes:
    """Leave the strings of a JSON text out, a part at a time, so that other threads have their turn."""
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare, inside = [], 0
    for begin in range(0, len(body), LARGE_BODY):
        parts = body[begin : begin + LARGE_BODY].split(b'"')
        bare.append(b"".join(parts[inside::2]))
        inside = (inside + len(parts) - 1) % 2
    return b"".join(bare)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, none of whose fields may come twice: one of them would be ignored."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {twice[:80]!r} twice")
    return made


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
