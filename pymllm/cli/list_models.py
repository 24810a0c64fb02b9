"""`pymllm list`: show the models in the hub's cache, and the packed weights that are kept."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pymllm.cli.options import add_common_options
from pymllm.cli.output import console, print_json, readable_size, say
from pymllm.cli.table import Column, print_table

if TYPE_CHECKING:
    from pymllm.weights.hub_cache import CachedModel

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    from huggingface_hub import constants

    from pymllm.loading.packed_cache import cache_folder
    from pymllm.loading.packed_list import kept_weights
    from pymllm.weights.hub_cache import cached_models

    models, packed = cached_models(), kept_weights(cache_folder())
    if args.json:
        rows = [
            {
                "id": model.id,
                "revision": model.revision,
                "commit": model.commit,
                "format": model.format,
                "bytes": model.size,
                "last_used": model.last_used,
                "complete": model.complete,
                "folder": str(model.folder),
            }
            for model in models
        ]
        kept = [
            {
                "model": None if one.model is None else str(one.model),
                "bytes": one.size,
                "last_used": one.last_used,
                "file": str(one.path),
            }
            for one in packed
        ]
        cache = {"cache": constants.HF_HUB_CACHE, "models": rows}
        print_json(
            {"schema_version": SCHEMA_VERSION, **cache, "packed_cache": str(cache_folder()), "packed": kept}
        )
        return 0
    if not models and not packed:
        say(f"No models in the hub's cache, {constants.HF_HUB_CACHE}: `pymllm run org/name` downloads one.")
        return 0
    columns = [Column(name) for name in ("model", "revision", "format", "size", "last used", "files")]
    cells = [
        [
            model.id,
            model.revision,
            model.format,
            readable_size(model.size),
            _day(model.last_used),
            "all" if model.complete else "some",
        ]
        for model in models
    ]
    for one in packed:
        opened = [model for model in models if one.model is not None and one.model in _opened(model)]
        name, revision = (opened[0].id, opened[0].revision) if opened else (str(one.model or one.path), "")
        cells.append([name, revision, "packed", readable_size(one.size), _day(one.last_used), ""])
    print_table(columns, cells, console())
    return 0


def _opened(model: CachedModel) -> list[Path]:
    """Return what may have been opened as a cached model: its GGUF file, else its folder, or the model's within."""
    if model.first is not None:
        return [Path(os.path.abspath(model.first))]
    folder = Path(os.path.abspath(model.folder))
    return [folder, *(path.parent for path in folder.glob("*/config.json"))]


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
