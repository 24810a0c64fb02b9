"""Copies between the host and a device within a step: all of them, so that they are few, and can be counted.

A copy from pinned memory runs beside the host, in the order of its stream. What is pinned must therefore stay as it is
until it has been read: `Staged` waits for that, and of what `upload` pins torch's allocator takes care.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8  # bytes, of each tensor in a region

Kind = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and dtype


def is_separate(device: torch.device) -> bool:
    """Tell whether a device has memory of its own."""
    return device.type != "cpu"


def make_pinned(size: int, device: torch.device) -> Tensor:
    """Make `size` bytes of the host's memory, which a GPU can read beside the host."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send(there: Tensor, here: Tensor) -> None:
    """Copy pinned memory to a device, beside the host."""
    there.copy_(here, non_blocking=True)


def receive(values: Tensor) -> Any:
    """Wait for a tensor of a device, and return its numbers as nested lists."""
    return values.tolist()


def make_event() -> Any:
    """Make what notes a place in the current stream (`record`) and waits until it is reached (`synchronize`)."""
    return torch.cuda.Event()


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of the host to a device, all in one copy.  On a CPU they are returned as they are."""
    if not is_separate(device):
        return list(tensors)
    kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    image = make_pinned(_room(kinds), device)
    for part, tensor in zip(_divide(image, kinds), tensors, strict=True):
        part.copy_(tensor)
    there = torch.empty_like(image, device=device)
    send(there, image)
    return _divide(there, kinds)


class Staged:
    """Tensors that stay at one place of a device, and their image on the host, which is sent in one copy.

    parts: the shape and dtype of each.  there: the device's tensors.  here: the image's, as NumPy has them.
    On a CPU both are the same memory, and nothing is sent.
    """

    def __init__(self, parts: Sequence[Kind], device: torch.device) -> None:
        size, self._separate = _room(parts), is_separate(device)
        self._image = make_pinned(size, device) if self._separate else torch.zeros(size, dtype=torch.uint8)
        self.region = torch.zeros_like(self._image, device=device) if self._separate else self._image
        self.there, here = (_divide(region, parts) for region in (self.region, self._image))
        self.here = [part.numpy() for part in here]
        self.nbytes = size
        self._sent: Any = None

    def open(self) -> None:
        """Wait until the device has read the image, which may then be written to."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, rows: range | None = None) -> None:
        """Copy the image to the device.  rows: those of the one part that there is; None: everything."""
        if not self._separate:
            return
        span = slice(None)
        if rows is not None:
            (part,) = self.here
            width = part.nbytes // len(part)
            span = slice(rows.start * width, rows.stop * width)
        send(self.region[span], self._image[span])
        self._sent = self._sent or make_event()
        self._sent.record()


def _bytes(kind: Kind) -> tuple[int, int]:
    """Return what a tensor takes, and what it takes with the bytes behind it that nobody uses."""
    shape, dtype = kind
    size = math.prod(shape) * dtype.itemsize
    return size, -(-size // ALIGNMENT) * ALIGNMENT


def _room(kinds: Sequence[Kind]) -> int:
    return sum(_bytes(kind)[1] for kind in kinds)


def _divide(region: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """Return the tensors that lie in a region of bytes, one behind the other."""
    parts, start = [], 0
    for kind in kinds:
        size, taken = _bytes(kind)
        parts.append(region[start : start + size].view(kind[1]).view(kind[0]))
        start += taken
    return parts
