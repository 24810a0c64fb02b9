"""`pymllm rm`: remove models from the hub's cache, and packed weights, once the user agrees."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pymllm.cli.options import add_common_options
from pymllm.cli.output import readable_size, say, show

if TYPE_CHECKING:
    from pymllm.loading.packed_list import KeptWeights

EPILOG = """examples:
  pymllm rm org/name
  pymllm rm org/name-GGUF:Q4_K_M --yes
  pymllm rm --packed             the packed weights of all models, and no model

A folder or .gguf file of your own is never removed: for its name, the packed weights that were kept of it are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="as `pymllm list` shows it: org/name with all its revisions, or one GGUF model org/name:TAG",
    )
    parser.add_argument(
        "--packed", action="store_true", help="only the packed weights: of NAME, or of all models without one"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask; needed without a terminal")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    from pymllm.loading.packed_cache import cache_folder
    from pymllm.loading.packed_list import kept_weights, remove_kept
    from pymllm.weights.hub_cache import plan_removal

    if not args.names and not args.packed:
        args.parser.error("name the models to remove, as `pymllm list` shows them")
    kept = kept_weights(cache_folder())
    # A local model's name, or a damaged file's, is that of packed weights alone.
    local = {name: _kept_of([Path(name)], kept) for name in args.names}
    removal = plan_removal([name for name in args.names if not local[name]])
    packed = [one for found in local.values() for one in found]
    packed += _kept_of([*removal.folders, *removal.opened], kept) if args.names else kept
    packed = list({one.path: one for one in packed}.values())
    if args.packed:
        size, what = 0, f"the packed weights of {', '.join(args.names) or 'all models'}"
    else:
        size, what = removal.size, ", ".join(args.names)
        if packed:
            what += " and packed weights" if removal.names else ": packed weights"
    size += sum(one.size for one in packed)
    if args.packed and not packed:
        say(f"There are no packed weights in {cache_folder()} to remove.")
        return 0
    what += f" ({readable_size(size)})"
    if not args.yes:
        if not sys.stdin.isatty():
            args.parser.error(f"this would remove {what}: say so with --yes")
        print(f"Remove {what}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("Nothing is removed.")
            return 1
    if not args.packed:
        removal.execute()
    remove_kept(packed)
    show(f"removed {what}")
    return 0


def _kept_of(places: Sequence[Path], kept: Sequence[KeptWeights]) -> list[KeptWeights]:
    """Find the packed weights of models at these places, or within them; a place may be the packed file itself."""
    whole = {Path(os.path.abspath(place)) for place in places}
    return [
        one
        for one in kept
        if one.path in whole
        or (one.model is not None and not {one.model, *one.model.parents}.isdisjoint(whole))
    ]
