"""Every kind of input, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .adapters import Adapters
from .bindings import Bindings
from .bodies import Bodies
from .configs import Configs
from .gguf_models import Models
from .headers import Headers
from .index import Index
from .inputs import Kind
from .rules import Rules
from .schemas import Schemas
from .templates import Templates
from .tensors import Tensors
from .tokenizers import Tokenizers

FILES = Headers, Index, Configs, Tensors, Models, Tokenizers, Templates, Adapters
ASKED = Bodies, Schemas, Rules, Bindings

KINDS: dict[str, Callable[[], Kind]] = {kind.name: kind for kind in (*FILES, *ASKED)}
