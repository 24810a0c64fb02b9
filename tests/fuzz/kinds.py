"""Every kind of input, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .adapters import Adapters
from .bindings import Bindings
from .bodies import Bodies
from .headers import Headers
from .inputs import Kind
from .rules import Rules
from .schemas import Schemas
from .templates import Templates
from .tokenizers import Tokenizers

KINDS: dict[str, Callable[[], Kind]] = {
    "adapters": Adapters,
    "bindings": Bindings,
    "bodies": Bodies,
    "headers": Headers,
    "rules": Rules,
    "schemas": Schemas,
    "templates": Templates,
    "tokenizers": Tokenizers,
}
