"""Every kind of input, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .configs import Configs
from .gguf_models import Models
from .headers import Headers
from .index import Index
from .inputs import Kind
from .tensors import Tensors

KINDS: dict[str, Callable[[], Kind]] = {
    kind.name: kind for kind in (Headers, Index, Configs, Tensors, Models)
}
