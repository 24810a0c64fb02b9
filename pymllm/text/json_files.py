"""Small JSON files beside the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.weights.json_text import read_json_object

MAX_BYTES = 64 << 20  # tokenizer_config.json lists every added token


@names_files
def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint; {} if there is none.  CheckpointError if it cannot be read."""
    if not os.path.lexists(file):
        return {}
    return read_json_object(file, MAX_BYTES, "settings", allow_non_finite=True)
