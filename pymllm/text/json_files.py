"""Small JSON files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.errors import CheckpointError


@names_files
def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; {} if there is none.  CheckpointError if the file cannot be read."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(
            "the file cannot be read: it is nested too deeply", code="tokenizer", file=str(file)
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the file cannot be read: {error}", code="tokenizer", file=str(file)) from None
    return settings if isinstance(settings, dict) else {}
