"""A terminal for tests: the one that the casts of docs/casts are recorded with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[3] / "docs" / "casts" / "record.py"


def _load():
    spec = importlib.util.spec_from_file_location("record_casts", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


record = _load()
