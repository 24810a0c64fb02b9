"""The formats, one file each.  Every module of this package is a format, so that a new file is a new format."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def load_formats() -> None:
    """Import every format file once; each registers its format."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
