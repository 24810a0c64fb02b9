"""Multiplying by weights of few bits, the activations left as they are: the part that all such formats share.

A format says how a code becomes a number (`decode`), and where scales and zero points lie. For up to `EXPAND_TOKENS`
rows (`multiply_tile`), codes are expanded in registers, as the left operand, to numbers that 16 bits hold exactly; sums
of a group are multiplied by its scale. The inner dimension is divided over blocks whose sums `add_splits` adds in
order. From so many rows on, weights are expanded once (`expand`), in pieces that stay in the GPU's last cache, and
torch multiplies.
"""

# T tokens, O out_features, I in_features, W words a row, N codes a word, G inputs of a group, S splits

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from pymllm.kernels.hardware import Architecture, Device, probe_device
from pymllm.kernels.triton.launch import Inline, interpreting
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.pair_assembly import Assemblies, Assembly, no_assembly
from pymllm.kernels.triton.tuning import (
    Tile,
    architecture_of,
    bucket,
    divide,
    multiplies_from_registers,
    tuned,
)
from pymllm.kernels.triton.weight_only_kernels import add_splits, expand, multiply_tile
from pymllm.kernels.triton.words import Order, span_of

F = TypeVar("F", bound=Callable[..., Any])
FAMILY = "weight_only"
EXPAND_TOKENS = 192  # tiles of 64 rows would expand the weight a fourth time
PIECE_BYTES = 16 << 20  # a smaller piece's two launches cost more than a small cache saves
WHOLE = 1 << 30  # a group as long as any axis: kernels of whole-axis scales do not depend on the axis


@dataclass(frozen=True)
class Coding:
    """The way in which a format's words become numbers.

    decode: (words, n) -> code n of each, as float32 plus `offset`.  bits: of a code.  order: of codes in a row.
    group: inputs that share a scale.  rows: outputs that share one.  scale_kind: "float"; "e8m0" or "e4m3", as bytes;
    "float16 and zero" or "bfloat16 and zero", the low and the high half of an int32.
    zero: the zero point where none is stored.  assemblies: what decodes faster than `decode` on NVIDIA's GPUs.
    """

    decode: Inline
    bits: int
    order: Order
    group: int = WHOLE
    rows: int = 1
    offset: float = 0.0
    zero: float = 0.0
    scale_kind: str = "float"
    assemblies: Assemblies = no_assembly

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def looked_up(self) -> bool:
        """True if codes are looked up in a table, which takes many registers."""
        return self.bits == 4 and self.assemblies is no_assembly

    @property
    def span_words(self) -> int:
        return self.order.span // self.per_word

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "DECODE": self.decode,
            "N": self.per_word,
            "SPAN": self.order.span,
            "PIECE": span_of(math.gcd(self.group, self.order.span)),
            "BESIDE": self.order.beside,
            "GROUP": self.group,
            "GROUP_ROWS": self.rows,
            "OFFSET": self.offset,
            "ZERO": self.zero,
            "SCALE_KIND": self.scale_kind,
        }

    def decoding(self, dtype: torch.dtype, architecture: Architecture | None) -> dict[str, Any]:
        """Return the constants of decoding to this dtype.  architecture: None: any."""
        return _decoding(self, dtype, architecture)


@functools.cache
def _decoding(coding: Coding, dtype: torch.dtype, architecture: Architecture | None) -> dict[str, Any]:
    plain = interpreting() or architecture is None or not architecture.is_nvidia or dtype.itemsize != 2
    assembly = Assembly() if plain else coding.assemblies(dtype)
    return coding.constants | {
        "ASSEMBLY": assembly.text,
        "BIAS": assembly.bias,
        "ADDED": 0 if plain else assembly.added(coding.zero, dtype),
        "FACTOR": assembly.factor,
    }


_coders: dict[str, Callable[..., Coding]] = {}


def coder(family: str) -> Callable[[F], F]:
    """Register the decorated function: `function(*words)` makes the codings called "family word word ..."."""

    def register(function: F) -> F:
        _coders[family] = function
        return function

    return register


@functools.cache
def coding_of(name: str) -> Coding:
    """Return the coding of this name, by which operators know it: their arguments are plain."""
    family, *words = name.split()
    return _coders[family](*words)


@dataclass(frozen=True)
class Operands:
    """One weight as its kernel reads it.

    words: [O, W] int32.  scales: [I/G, ceil(O/rows)].  zeros: [I/G, O] uint8.  row_scales: [O] float32.
    """

    words: Tensor
    scales: Tensor | None
    zeros: Tensor | None = None
    row_scales: Tensor | None = None


@operator(
    "weight_only_linear(Tensor x, Tensor words, Tensor? scales, Tensor? zeros, Tensor? row_scales, Tensor? bias, "
    "str coding, str device) -> Tensor",
    lambda x, words, *rest: x.new_empty((*x.shape[:-1], words.shape[0])),
)
def weight_only_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    row_scales: Tensor | None,
    bias: Tensor | None,
    coding: str,
    device: str,
) -> Tensor:
    """Multiply x by the weight.

    x: [*, I] float16 or bfloat16; the others as in `Operands`.  coding: its name.  Returns [*, O].
    """
    weight = Operands(words, scales, zeros, row_scales)
    return _multiply(x, weight, bias, coding_of(coding), probe_device(device))


def _multiply(x: Tensor, weight: Operands, bias: Tensor | None, coding: Coding, device: Device) -> Tensor:
    out_features, words = weight.words.shape
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    tokens = rows.shape[0]
    y = x.new_empty((tokens, out_features))
    if tokens:
        tile = choose_tile(device, tokens, out_features, words, coding)
        if tile is None:
            _expand_and_multiply(rows, weight, bias, y, coding, device)
        else:
            _multiply_tiled(rows, weight, bias, y, coding, tile, device)
    return y.view(*x.shape[:-1], out_features)


_forced: ContextVar[Tile | None] = ContextVar("forced_tile", default=None)


@contextmanager
def forced_tile(tile: Tile) -> Iterator[None]:
    """Use this tile for every shape, for tuning."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def torch_multiplies(tokens: int) -> bool:
    """Tell whether weights are expanded, and torch multiplies so many rows: then no tile is chosen or tuned."""
    return tokens >= EXPAND_TOKENS


def shape_key(tokens: int, out_features: int, words: int, coding: Coding) -> str:
    """Make the key by which tuned tiles are found."""
    return f"{FAMILY} t{bucket(tokens)} o{out_features} w{words} b{coding.bits} g{coding.group}"


def choose_tile(device: Device, tokens: int, out_features: int, words: int, coding: Coding) -> Tile | None:
    """Choose the tile for a shape, as tuned or by rule.  None: expand the weights, and let torch multiply."""
    if torch_multiplies(tokens):
        return _forced.get()
    found = _forced.get() or tuned(device, shape_key(tokens, out_features, words, coding))
    return found or default_tile(device, bucket(tokens), out_features, words, coding)


@functools.cache
def default_tile(device: Device, size: int, out_features: int, words: int, coding: Coding) -> Tile:
    """Choose the tile by rule: blocks enough to fill every processor several times, each with enough of a row.

    size: a bucket of tokens.
    """
    architecture = architecture_of(device)
    outputs, tokens, depth, warps = tile_shape(architecture, size, coding)
    blocks = divide(out_features, outputs) * divide(size, tokens)
    # As many blocks as registers let run at once, or a few more.
    wanted = {16: 5, 32: 3, 64: 3}.get(tokens, 1) * device.processors
    splits = _splits(words, 512 // coding.per_word, wanted, blocks)
    stages = stages_within(architecture.shared_bytes, outputs, tokens, depth, coding)
    if coding.looked_up:
        stages = min(stages, 2)  # three spill on sm86 and sm89 (benchmarks/results/triton_aot.md)
    return Tile(outputs, tokens, depth, splits, warps=warps, stages=stages)


def tile_shape(architecture: Architecture, size: int, coding: Coding) -> tuple[int, int, int, int]:
    """Return the outputs, tokens and words of a step of a tile for so many rows, and its warps.

    benchmarks/results/gpu_instructions.md shows what they compile to. Each group of four warps has rows of its own:
    with more warps, or fewer rows, several would decode the same weights.
    """
    step, tokens = 128 // coding.per_word, min(max(size, 16), largest_tile(architecture))
    if multiplies_from_registers(architecture):
        # Each warp loads all activations of the tile: with 32 outputs a warp, half as often as with 16. For scales of
        # groups of 16, and codes that are looked up, that takes too many registers.
        return 64 if coding.looked_up or coding.constants["PIECE"] == 16 else 128, tokens, step, 4
    if size > 64 and architecture.is_nvidia and coding.constants["PIECE"] == 128:
        return 128, 128, step, 8
    return 64, tokens, 2 * step if size <= 16 and coding.per_word > 1 else step, 4


def largest_tile(architecture: Architecture) -> int:
    """Return the most tokens of a tile of four warps: as many as registers hold the sums of."""
    return 32 if multiplies_from_registers(architecture) else 64


def stages_within(shared: int, outputs: int, tokens: int, depth: int, coding: Coding) -> int:
    """Return how many steps ahead a block may load into shared memory: 1 to 3."""
    step = depth * (4 * outputs + 2 * coding.per_word * tokens)
    return max(1, min(3, (shared - 2048) // step))


def _splits(words: int, least: int, wanted: int, blocks: int) -> int:
    """Return the number of splits, a power of two: about as many blocks as wanted, none of less than `least` words."""
    splits = 1
    while 2 * splits * blocks <= wanted * 5 // 4 and words // (2 * splits) >= least and splits < 16:
        splits *= 2
    return splits


def _multiply_tiled(
    x: Tensor, weight: Operands, bias: Tensor | None, y: Tensor, coding: Coding, tile: Tile, device: Device
) -> None:
    tokens, out_features = y.shape
    words = weight.words.shape[1]
    depth = max(tile.depth, coding.span_words)
    chunk = divide(divide(words, tile.splits), depth) * depth  # words of one split
    splits = divide(words, chunk)
    # The only workspace: its size follows from shapes alone, so a graph captures it.
    sums = y if splits == 1 else y.new_empty((splits, tokens, out_features), dtype=torch.float32)
    whole = splits == 1
    multiply_tile.launch(
        (divide(out_features, tile.outputs), divide(tokens, tile.tokens), splits),
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        weight.row_scales if whole else None,
        bias if whole else None,
        sums,
        None,
        None,
        tokens,
        out_features,
        words,
        chunk,
        x.stride(0),
        **coding.decoding(x.dtype, device.architecture),
        EVEN=words % depth == 0,
        BLOCK_O=tile.outputs,
        BLOCK_W=depth,
        BLOCK_T=tile.tokens,
        TOP_K=1,
        UPCAST=interpreting(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not whole:
        block = 256
        add_splits.launch(
            (divide(out_features, block), tokens),
            sums,
            weight.row_scales,
            bias,
            y,
            tokens,
            out_features,
            SPLITS=splits,
            BLOCK=block,
            num_warps=2,
        )


def _expand_and_multiply(
    x: Tensor, weight: Operands, bias: Tensor | None, y: Tensor, coding: Coding, device: Device
) -> None:
    """Expand some rows of the weight at a time, into the same memory, and let torch multiply them."""
    out_features, words = weight.words.shape
    in_features = words * coding.per_word
    rows = piece_rows(device, x.shape[0], out_features, in_features * x.element_size())
    piece = x.new_empty((rows, in_features))
    for start in range(0, out_features, rows):
        dense = piece[: min(rows, out_features - start)]
        expand_rows(weight, dense, start, coding)
        torch.mm(x, dense.t(), out=y[:, start : start + dense.shape[0]])
    if bias is not None:
        y += bias


def piece_rows(device: Device, tokens: int, out_features: int, row_bytes: int) -> int:
    """Return how many rows of a weight to expand at a time, all pieces being about as long.

    A piece takes half of the last cache, so that torch reads what was just written, and x, from there. It is no smaller
    than PIECE_BYTES, nor than what gives each multiprocessor a tile of 64 x 64 of the product.
    """
    fitting = max(device.cache_bytes // 2, PIECE_BYTES) // row_bytes
    busy = 64 * divide(device.processors, divide(tokens, 64))
    pieces = divide(out_features, max(fitting, busy, 64))
    return divide(divide(out_features, pieces), 64) * 64


def expand_rows(weight: Operands, dense: Tensor, start: int, coding: Coding) -> None:
    """Write the numbers of weight rows start, start + 1, ... to `dense`, [rows, I] in any float dtype."""
    words = weight.words.shape[1]
    expand.launch(
        (divide(dense.shape[0], 64), words // coding.span_words),
        weight.words,
        weight.scales,
        weight.zeros,
        weight.row_scales,
        dense,
        start,
        dense.shape[0],
        weight.words.shape[0],
        words,
        BLOCK_O=64,
        num_warps=4,
        **coding.decoding(dense.dtype, None),
    )
