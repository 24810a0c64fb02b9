"""Every kind of input, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .bindings import Bindings
from .headers import Headers
from .inputs import Kind

KINDS: dict[str, Callable[[], Kind]] = {
    "headers": Headers,
    "bindings": Bindings,
}
