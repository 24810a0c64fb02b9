"""Every kind of input, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .bodies import Bodies
from .headers import Headers
from .inputs import Kind
from .templates import Templates

KINDS: dict[str, Callable[[], Kind]] = {"bodies": Bodies, "headers": Headers, "templates": Templates}
