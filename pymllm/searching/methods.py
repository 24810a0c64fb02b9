"""The methods that a search chooses from, and the bits that each of them takes to store a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import Rule

# What a weight may be left as: the way that the checkpoint stores it.  It needs no rule.
STORED = "stored"

# One for about every half bit.  Groups of 128 do not divide the inputs of every model.
DEFAULT_METHODS = (
    "int2:group_size=64,scale=mse",
    "int2:group_size=32,scale=mse",
    "int3:group_size=128,scale=mse",
    "int3:group_size=64,scale=mse",
    "int3:group_size=32,scale=mse",
    "int4:group_size=128,scale=mse",
    "int4:group_size=64,scale=mse",
    "int4:group_size=32,scale=mse",
    "int5:group_size=64",
    "int6:group_size=64",
    "int8",
    STORED,
)
CODEBOOK_BITS = 4  # of a code: there are sixteen values


@dataclass(frozen=True)
class Method:
    """A method as the right side of a rule.  target: what it makes; None: weights stay as they are stored."""

    text: str
    target: LinearMethodBase | None

    def __str__(self) -> str:
        return self.text


def read_methods(texts: str | Iterable[str] | None, dtype: torch.dtype) -> tuple[Method, ...]:
    """Read methods, `int4:group_size=64,scale=mse` say, each once and in the order given.

    texts: one text of several, which commas separate, or several such texts; None: the default.
    dtype: of the floats that `none` makes.  ConfigError for an unknown method or option, and for none at all.
    """
    given = DEFAULT_METHODS if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
    methods: dict[str, Method] = {}
    for text in (one for several in given for one in split_methods(several)):
        target = None if text == STORED else Rule.parse(f"*={text}").build()
        if isinstance(target, UnquantizedLinearMethod):
            target = replace(target, dtype=dtype)
        methods.setdefault(text, Method(text, target))
    if not methods:
        raise ConfigError(
            "there is no method to choose from",
            code="search-methods",
            expected="methods as on the right side of a rule, or stored",
            found=repr(texts),
            fix="For example: --methods int4:group_size=64,int8,stored.",
        )
    return tuple(methods.values())


def split_methods(text: str) -> list[str]:
    """Split `int4:group_size=64,scale=mse,int8` into its methods: what has an "=" alone is one more option."""
    found: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in piece and ":" not in piece and found:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def stored_bits(weight: CanonicalWeight, parts: int = 1) -> int:
    """Count the bits of all that a weight consists of: codes, scales, zero points, offsets, orders of groups.

    Codes and zero points count by their bits, as a checkpoint packs them; the rest by its dtype.  The table of a
    codebook belongs to the format and does not count; a second level of its scales is one number for each part, which
    kernels have spread over the rows.
    parts: how many weights of the checkpoint it is.
    """
    narrow: dict[str, int] = {}
    spread = 0
    if isinstance(weight, IntWeight):
        narrow = {"codes": weight.bits, "zeros": weight.bits}
    elif isinstance(weight, CodebookWeight):
        narrow = {"codes": CODEBOOK_BITS, "table": 0, "row_scales": 0}
        spread = 0 if weight.row_scales is None else parts * 8 * weight.row_scales.dtype.itemsize
    return spread + sum(
        tensor.numel() * narrow.get(name, 8 * tensor.dtype.itemsize)
        for name, tensor in weight.tensors().items()
    )
