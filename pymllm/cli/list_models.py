"""`pymllm list`: show the models in the hub's cache."""

from __future__ import annotations

import argparse
import time

from pymllm.cli.options import add_common_options
from pymllm.cli.output import console, print_json, readable_size, say
from pymllm.cli.table import Column, print_table

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    from huggingface_hub import constants

    from pymllm.weights.hub_cache import cached_models

    models = cached_models()
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
        print_json({"schema_version": SCHEMA_VERSION, "cache": constants.HF_HUB_CACHE, "models": rows})
        return 0
    if not models:
        say(f"No models in the hub's cache, {constants.HF_HUB_CACHE}: `pymllm run org/name` downloads one.")
        return 0
    columns = [Column(name) for name in ("model", "revision", "format", "size", "last used", "files")]
    cells = [
        [
            model.id,
            model.revision,
            model.format,
            readable_size(model.size),
            time.strftime("%Y-%m-%d", time.localtime(model.last_used)),
            "all" if model.complete else "some",
        ]
        for model in models
    ]
    print_table(columns, cells, console())
    return 0
