"""The head of a GGUF file, as the format's description has it: read, and written again whatever it says."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass
class Head:
    """What stands before the data.  entries: (key, type, value).  tensors: [name, sizes, type, offset]."""

    version: int = 3
    entries: list[list[Any]] = field(default_factory=list)
    tensors: list[list[Any]] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0, 0])  # what the announced numbers are wrong by
    magic: bytes = b"GGUF"

    @classmethod
    def read(cls, data: bytes) -> tuple[Head, int]:
        """Read a good file.  Returns its head, and where the data begins."""
        at = 0

        def take(kind: str) -> Any:
            nonlocal at
            (value,) = struct.unpack_from(f"<{kind}", data, at)
            at += struct.calcsize(kind)
            return value

        def text() -> str:
            nonlocal at
            length = take("Q")
            at += length
            return data[at - length : at].decode()

        def value_of(kind: int) -> Any:
            if kind == STRING:
                return text()
            if kind == ARRAY:
                inner, count = take("I"), take("Q")
                return [inner, [value_of(inner) for _ in range(count)]]
            return take(SCALARS[kind])

        head = cls()
        at = 4
        head.version = take("I")
        tensors, entries = take("Q"), take("Q")
        for _ in range(entries):
            key, kind = text(), take("I")
            head.entries.append([key, kind, value_of(kind)])
        for _ in range(tensors):
            name, rank = text(), take("I")
            head.tensors.append([name, [take("Q") for _ in range(rank)], take("I"), take("Q")])
        return head, -(-at // 32) * 32

    def written(self, alignment: int = 32) -> bytes:
        """Write it, whatever it says."""
        out = bytearray(self.magic + struct.pack("<I", self.version % 2**32))

        def text(value: str) -> None:
            raw = value.encode("utf-8", "surrogatepass")
            out.extend(struct.pack("<Q", len(raw)) + raw)

        def put(kind: int, value: Any) -> None:
            if kind == STRING:
                text(str(value))
            elif kind == ARRAY:
                inner, values = value
                out.extend(struct.pack("<IQ", inner, len(values)))
                for each in values:
                    put(inner, each)
            elif kind in SCALARS:
                letter = SCALARS[kind]
                out.extend(_packed(letter, value))

        counts = (len(self.tensors) + self.counts[0], len(self.entries) + self.counts[1])
        out.extend(struct.pack("<QQ", *(count % 2**64 for count in counts)))
        for key, kind, value in self.entries:
            text(key)
            out.extend(struct.pack("<I", kind % 2**32))
            put(kind, value)
        for name, sizes, kind, offset in self.tensors:
            text(name)
            out.extend(
                struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", size % 2**64) for size in sizes)
            )
            out.extend(struct.pack("<IQ", kind % 2**32, offset % 2**64))
        return bytes(out) + bytes(-len(out) % alignment)


def _packed(letter: str, value: Any) -> bytes:
    """Pack a number as a type that it may not fit."""
    if letter in "fd":
        number = float(value) if isinstance(value, (int, float)) else 0.0
        try:
            return struct.pack(f"<{letter}", number)
        except OverflowError:
            return struct.pack(f"<{letter}", float("inf"))
    size = struct.calcsize(letter)
    number = int(value) if isinstance(value, int) or (isinstance(value, float) and abs(value) < 1e18) else 0
    return (number % 256**size).to_bytes(size, "little")
