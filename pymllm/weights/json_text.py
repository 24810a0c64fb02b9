"""The reader of every JSON text that comes with a checkpoint: strict, and bounded in depth and in its numbers."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from pymllm.errors import CheckpointError
from pymllm.weights.tensor_file import MAX_NAME_LENGTH, fault, read_small_file

MAX_DEPTH = 64  # real configs have some ten levels; what compares or prints values goes a level deep for each
MAX_DIGITS = 40  # of an integer: floats end at 39 digits (float32), sizes at 19
SHORT = 24  # an integer of fewer characters is certainly in bounds
# Keys of a header or index that name no tensor.
STRUCTURE = ("weight_map", "dtype", "shape", "data_offsets")


class _DuplicateKeyError(ValueError):
    pass


def read_json_object(path: Path, limit: int, what: str, *, allow_non_finite: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object, as `parse_json_object`.  CheckpointError above `limit` bytes, too."""
    return parse_json_object(
        read_small_file(path, limit, what), path, what, allow_non_finite=allow_non_finite
    )


def parse_json_object(
    raw: bytes | bytearray, path: Path, what: str, *, allow_non_finite: bool = False
) -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does.  CheckpointError "<what>-json" for any other value, too."""
    parsed = parse_json(raw, path, what, allow_non_finite=allow_non_finite)
    if not isinstance(parsed, dict):
        message = f"the {what} is not a JSON object"
        raise fault(path, f"{what}-json", message, "{...}", type(parsed).__name__)
    return parsed


def parse_json(raw: bytes | bytearray, path: Path, what: str, *, allow_non_finite: bool = False) -> Any:
    """Parse a JSON text, strictly: UTF-8, no key twice at any depth and, unless allowed, no NaN or Infinity.

    Values are nested at most MAX_DEPTH deep; integers have at most MAX_DIGITS digits.  That of a safetensors header or
    index, whose own checks hold its values, is not looked at here: there may be a million.
    what: "header", "index", "config", ...  Raises CheckpointError "<what>-utf8", "<what>-duplicate-key", "<what>-json".
    """
    large = what in ("header", "index")
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=None if allow_non_finite else _refuse_constant,
            parse_int=None if large else _bounded,
        )
    except UnicodeDecodeError as error:
        raise _bad_text(
            path, what, f"the {what} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    except _DuplicateKeyError as error:
        key = error.args[0]
        is_tensor = large and key not in STRUCTURE and len(key) <= MAX_NAME_LENGTH and key.isprintable()
        message = f"the {what} has the key {reprlib.repr(key)} twice"
        raise fault(path, f"{what}-duplicate-key", message, tensor=key if is_tensor else None) from error
    except RecursionError as error:
        raise fault(path, f"{what}-json", f"the {what} is nested too deeply") from error
    except ValueError as error:
        if raw.startswith(b"\xef\xbb\xbf"):
            message = f"the {what} begins with a byte order mark, which JSON does not have"
            raise fault(path, f"{what}-json", message, fix="Save it as UTF-8 without one.") from error
        raise fault(path, f"{what}-json", f"the {what} is not JSON: {error}") from error
    if not large and _is_deep(parsed):
        raise fault(path, f"{what}-json", f"the {what} is nested too deeply", f"at most {MAX_DEPTH} levels")
    return parsed


def _bad_text(path: Path, what: str, message: str) -> CheckpointError:
    return fault(path, f"{what}-utf8", message, fix="Save it as UTF-8, or download it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _bounded(digits: str) -> int:
    if len(digits) > SHORT and len(digits.removeprefix("-")) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, where no setting has more than {MAX_DIGITS}")
    return int(digits)


def _is_deep(value: Any) -> bool:
    """Tell whether lists and objects are nested more than MAX_DEPTH deep, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
