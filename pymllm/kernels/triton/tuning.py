"""The sizes of kernels' tiles: by rule, or as `pymllm kernels tune` measured them on this very device.

Tuned choices are data: `configs/<device>.json` beside this file maps a shape to a configuration. No kernel tunes
itself while it runs, so the same call does the same everywhere.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pymllm.disk import write_whole, writing
from pymllm.errors import ConfigError
from pymllm.kernels.hardware import Architecture, Device

FOLDER = Path(__file__).parent / "configs"
LARGEST_BUCKET = 8192


@dataclass(frozen=True)
class Tile:
    """The tile of one block, and how its kernel is launched.

    outputs, tokens, depth: of the tile; depth is in stored columns (words, bytes, keys).
    splits: parts of the sum that blocks work on at once; they are added in order, so results do not vary.
    warps, stages: Triton's num_warps and num_stages.
    """

    outputs: int
    tokens: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 2


def bucket(tokens: int) -> int:
    """Return the power of two that covers `tokens`, at most LARGEST_BUCKET: shapes within one share a configuration."""
    return min(next_power(tokens), LARGEST_BUCKET)


def divide(length: int, by: int) -> int:
    """Divide, and round up."""
    return -(-length // by)


def next_power(size: int) -> int:
    """Return the least power of two that covers `size`."""
    return 1 << max(size - 1, 0).bit_length()


def architecture_of(device: Device) -> Architecture:
    """Return the device's architecture.  That there is one is ours to assert: kernels ask `why_not` first."""
    assert device.architecture is not None
    return device.architecture


def multiplies_from_registers(architecture: Architecture) -> bool:
    """Tell whether both operands of a matrix product must be in registers.

    They must on all GPUs of NVIDIA but Hopper and the large Blackwells.
    """
    return architecture.is_nvidia and architecture.capability[0] not in (9, 10)


def tuned(device: Device, shape: str) -> Tile | None:
    """Return the tile that was measured to be best for a shape on this device, or None if none was.

    shape: "family and sizes", as the device's file names it.
    """
    return _tiles_of(device, FOLDER).get(shape)


@functools.cache
def _tiles_of(device: Device, folder: Path) -> dict[str, Tile]:
    return _read(device_file(device, folder))


def device_file(device: Device, folder: Path | None = None) -> Path:
    """Name the file of a device's configurations, by the device, or by its architecture if that alone is known.

    folder: where it is; None: in FOLDER.
    """
    name = device.name if device.present else architecture_of(device).name
    return (folder or FOLDER) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@functools.cache
def _read(path: Path) -> dict[str, Tile]:
    if not path.exists():
        return {}
    try:
        return {key: Tile(**value) for key, value in json.loads(path.read_text())["tiles"].items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the tuned configurations cannot be read: {error}",
            code="tuned-config",
            file=str(path),
            expected='{"tiles": {"family shape": {"outputs": ..., "tokens": ..., ...}}}',
            fix="Delete the file, or make it again with: pymllm kernels tune.",
        ) from None


def write_tuned(path: Path, tiles: dict[str, Tile], device: Device) -> None:
    """Add measured configurations to a file, and use them from now on."""
    kept = {**_read(path), **tiles}
    entries = {key: vars(kept[key]) for key in sorted(kept)}
    raw = (json.dumps({"device": device.name, "tiles": entries}, indent=1) + "\n").encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [raw], len(raw))
    _read.cache_clear()
    _tiles_of.cache_clear()
