"""Multiplying by weights of few bits, the activations left as they are: the kernels that all such formats share.

A format brings how a code becomes a number (`decode`), and where scales and zero points lie. One row (`multiply_one`)
takes no matrix unit: reading the weights is all it waits for. Up to a few hundred (`multiply_tile`), weights are
expanded in registers, as the left operand, and the inner dimension is divided over blocks whose sums
`add_splits` adds in order. Above that they are expanded once (`expand`), and torch multiplies.
"""

# T tokens, O out_features, I in_features, W words a row, N codes a word, G inputs of a group, S splits

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device
from pymllm.kernels.triton.launch import Inline, inline, interpreting, kernel
from pymllm.kernels.triton.tuning import Tile, architecture_of, bucket, divide, tuned

if TYPE_CHECKING:
    import triton.language as tl

FAMILY = "weight_only"
EXPAND_BYTES = 64 << 20  # of weights expanded at a time


@dataclass(frozen=True)
class Coding:
    """How a format's words become numbers.

    decode: (words, n) -> code n of each, as float32 plus `offset`.  bits: of a code.  span: see `words.py`.
    group: inputs that share a scale.  rows: outputs that do.  scale_kind: "float", "e8m0" or "e4m3" (bytes).
    zero: the zero point where none is stored.
    """

    decode: Inline
    bits: int
    span: int
    group: int
    rows: int = 1
    offset: float = 0.0
    zero: float = 0.0
    scale_kind: str = "float"

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def constants(self) -> dict[str, Any]:
        return {
            "DECODE": self.decode,
            "N": self.per_word,
            "SPAN_WORDS": self.span // self.per_word,
            "GROUP_WORDS": self.group // self.per_word,
            "GROUP_ROWS": self.rows,
            "OFFSET": self.offset,
            "ZERO": self.zero,
            "SCALE_KIND": self.scale_kind,
        }


@dataclass(frozen=True)
class Operands:
    """One weight as its kernel reads it.

    words: [O, W] int32.  scales: [I/G, ceil(O/rows)].  zeros: [I/G, O] uint8.  row_scales: [O] float32.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    row_scales: Tensor | None = None


def multiply(x: Tensor, weight: Operands, bias: Tensor | None, coding: Coding, device: Device) -> Tensor:
    """x: [*, I] float16 or bfloat16.  Returns [*, O]."""
    out_features, words = weight.words.shape
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    tokens = rows.shape[0]
    y = x.new_empty((tokens, out_features))
    if tokens:
        tile = choose_tile(device, tokens, out_features, words, coding)
        if tile is None:
            _expand_and_multiply(rows, weight, bias, y, coding)
        else:
            _multiply_tiled(rows, weight, bias, y, coding, tile)
    return y.view(*x.shape[:-1], out_features)


def choose_tile(device: Device, tokens: int, out_features: int, words: int, coding: Coding) -> Tile | None:
    """The tile for a shape: as tuned, or by rule.  None: expand the weights, and let torch multiply."""
    size = bucket(tokens)
    shape = f"t{size} o{out_features} w{words} b{coding.bits} g{coding.group}"
    return tuned(device, FAMILY, shape) or default_tile(device, size, out_features, words, coding.per_word)


def default_tile(device: Device, size: int, out_features: int, words: int, per_word: int) -> Tile | None:
    """size: a bucket of tokens.  Blocks enough to fill every processor several times, each with enough of a row."""
    processors, shared = device.processors, architecture_of(device).shared_bytes
    if size == 1:
        tile = Tile(outputs=16, tokens=1, depth=64, warps=4, stages=1)
        blocks = divide(out_features, tile.outputs)
        splits = _splits(words, 4 * tile.depth, 8 * processors, blocks)
        return Tile(tile.outputs, 1, tile.depth, splits, tile.warps, tile.stages)
    if size <= 64:
        tokens = max(size, 16)
        blocks = divide(out_features, 64)
        splits = _splits(words, 4 * 32, 2 * processors, blocks)
        return Tile(64, tokens, 32, splits, warps=4, stages=_stages(64, tokens, 32, per_word, shared))
    if size < 512:
        blocks = divide(out_features, 128) * (size // 64)
        splits = _splits(words, 8 * 32, processors, blocks)
        return Tile(128, 64, 32, splits, warps=8, stages=_stages(128, 64, 32, per_word, shared))
    return None


def _stages(outputs: int, tokens: int, depth: int, per_word: int, shared: int) -> int:
    """How many steps ahead a block may load into shared memory: 1 to 3."""
    step = depth * (4 * outputs + 2 * per_word * tokens)
    return max(1, min(3, (shared - 2048) // step))


def _splits(words: int, least: int, wanted: int, blocks: int) -> int:
    """A power of two: as many parts as fill the device, none shorter than `least` words."""
    splits = 1
    while splits * blocks < wanted and words // (2 * splits) >= least and splits < 16:
        splits *= 2
    return splits


def _multiply_tiled(
    x: Tensor, weight: Operands, bias: Tensor | None, y: Tensor, coding: Coding, tile: Tile
) -> None:
    tokens, out_features = y.shape
    words = weight.words.shape[1]
    chunk = divide(divide(words, tile.splits), tile.depth) * tile.depth  # words of one split
    splits = divide(words, chunk)
    # The only workspace: its size follows from shapes alone, so a graph captures it.
    sums = y if splits == 1 else y.new_empty((splits, tokens, out_features), dtype=torch.float32)
    whole = splits == 1
    common = {
        **coding.constants(),
        "EVEN": words % tile.depth == 0,
        "BLOCK_O": tile.outputs,
        "BLOCK_W": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    operands = (
        weight.words,
        weight.scales,
        weight.zeros,
        weight.row_scales if whole else None,
        bias if whole else None,
    )
    blocks = divide(out_features, tile.outputs)
    if tile.tokens == 1:
        multiply_one.launch((blocks, splits), x, *operands, sums, out_features, words, chunk, **common)
    else:
        grid = (blocks, divide(tokens, tile.tokens), splits)
        multiply_tile.launch(
            grid,
            x,
            *operands,
            sums,
            tokens,
            out_features,
            words,
            chunk,
            x.stride(0),
            BLOCK_T=tile.tokens,
            UPCAST=interpreting(),
            **common,
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


def _expand_and_multiply(x: Tensor, weight: Operands, bias: Tensor | None, y: Tensor, coding: Coding) -> None:
    """Some rows of the weight at a time, so that the expanded copy stays small."""
    out_features, words = weight.words.shape
    in_features = words * coding.per_word
    step = max(64, EXPAND_BYTES // (in_features * x.element_size()) // 64 * 64)
    dense = x.new_empty((min(step, out_features), in_features))
    for start in range(0, out_features, step):
        count = min(step, out_features - start)
        expand_rows(weight, dense[:count], start, coding)
        torch.mm(x, dense[:count].t(), out=y[:, start : start + count])
    if bias is not None:
        y += bias


def expand_rows(weight: Operands, dense: Tensor, start: int, coding: Coding) -> None:
    """Write the numbers of weight rows start, start + 1, ... to `dense`, [rows, I] in any float dtype."""
    words = weight.words.shape[1]
    expand.launch(
        (divide(dense.shape[0], 32), divide(words, 64)),
        weight.words,
        weight.scales,
        weight.zeros,
        weight.row_scales,
        dense,
        start,
        dense.shape[0],
        weight.words.shape[0],
        words,
        BLOCK_O=32,
        BLOCK_W=64,
        num_warps=4,
        **coding.constants(),
    )


@inline
def scale_value(stored, KIND: tl.constexpr):
    """A stored scale as float32."""
    if KIND == "e8m0":  # 2^(byte - 127); byte 0 is 2^-127, which only a subnormal holds
        exponent = stored.to(tl.int32)
        return tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        return e4m3_value(stored.to(tl.int32))
    else:
        return stored.to(tl.float32)


@inline
def e4m3_value(byte):
    """float8_e4m3fn from its byte, in int32: its fields moved to those of float32, and the exponents' bases evened."""
    size = byte & 0x7F
    value = ((size << 20) | ((byte & 0x80) << 24)).to(
        tl.float32, bitcast=True
    ) * 1.329227995784916e36  # 2^120
    return tl.where(size == 0x7F, float("nan"), value)


@inline
def scales_and_zeros(
    scales,
    zeros,
    rows,
    columns,
    mask,
    out_features,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """For each word of a tile: its scale, and what to subtract from its decoded codes."""
    group = (columns // GROUP_WORDS).to(tl.int64)
    stride = (out_features + GROUP_ROWS - 1) // GROUP_ROWS
    scale = scale_value(
        tl.load(scales + group[None, :] * stride + (rows // GROUP_ROWS)[:, None], mask=mask, other=0),
        SCALE_KIND,
    )
    if zeros is None:
        zero = tl.full(scale.shape, OFFSET + ZERO, tl.float32)
    else:
        stored = tl.load(zeros + group[None, :] * out_features + rows[:, None], mask=mask, other=0)
        zero = stored.to(tl.float32) + OFFSET
    return scale, zero


@kernel
def multiply_one(
    x,
    words,
    scales,
    zeros,
    row_scales,
    bias,
    y,
    out_features,
    row_words,
    chunk,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """x: [I].  y: [O], or [S, O] float32.  Grid: (O / BLOCK_O, S)."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < out_features
    total = tl.zeros((BLOCK_O, BLOCK_W), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, row_words), BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        if EVEN:
            mask = row_mask[:, None]
            inside = tl.full((BLOCK_W,), True, tl.int1)
        else:
            inside = columns < row_words
            mask = row_mask[:, None] & inside[None, :]
        tile = tl.load(
            words + rows.to(tl.int64)[:, None] * row_words + columns[None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
        dot = tl.zeros((BLOCK_O, BLOCK_W), tl.float32)
        seen = tl.zeros((BLOCK_W,), tl.float32)
        for n in tl.static_range(N):
            value = tl.load(x + inputs + n * SPAN_WORDS, mask=inside, other=0.0).to(tl.float32)
            dot += DECODE(tile, n) * value[None, :]
            seen += value
        scale, zero = scales_and_zeros(
            scales,
            zeros,
            rows,
            columns,
            mask,
            out_features,
            GROUP_WORDS,
            GROUP_ROWS,
            OFFSET,
            ZERO,
            SCALE_KIND,
        )
        total += scale * (dot - zero * seen[None, :])
    result = tl.sum(total, axis=1)
    if row_scales is not None:
        result *= tl.load(row_scales + rows, mask=row_mask, other=0.0)
    if bias is not None:
        result += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(y + part * out_features + rows, result.to(y.dtype.element_ty), mask=row_mask)


@kernel
def multiply_tile(
    x,
    words,
    scales,
    zeros,
    row_scales,
    bias,
    y,
    tokens,
    out_features,
    row_words,
    chunk,
    x_stride,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x: [T, I].  y: [T, O], or [S, T, O] float32.  Grid: (O / BLOCK_O, T / BLOCK_T, S).

    UPCAST: multiply in float32, for the interpreter, which has no bfloat16 arithmetic; values are rounded all the same.
    """
    part = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < out_features
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = token < tokens
    total = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, row_words), BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        if EVEN:
            mask = row_mask[:, None]
            x_mask = token_mask[None, :]
        else:
            inside = columns < row_words
            mask = row_mask[:, None] & inside[None, :]
            x_mask = token_mask[None, :] & inside[:, None]
        tile = tl.load(
            words + rows.to(tl.int64)[:, None] * row_words + columns[None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        scale, zero = scales_and_zeros(
            scales,
            zeros,
            rows,
            columns,
            mask,
            out_features,
            GROUP_WORDS,
            GROUP_ROWS,
            OFFSET,
            ZERO,
            SCALE_KIND,
        )
        inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
        for n in tl.static_range(N):
            values = tl.load(
                x + token.to(tl.int64)[None, :] * x_stride + (inputs + n * SPAN_WORDS)[:, None],
                mask=x_mask,
                other=0.0,
            )
            weight = ((DECODE(tile, n) - zero) * scale).to(x.dtype.element_ty)
            if UPCAST:
                weight, values = weight.to(tl.float32), values.to(tl.float32)
            total = tl.dot(weight, values, total)
    if row_scales is not None:
        total *= tl.load(row_scales + rows, mask=row_mask, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    places = (part.to(tl.int64) * tokens + token)[None, :] * out_features + rows[:, None]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@kernel
def add_splits(sums, row_scales, bias, y, tokens, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """sums: [S, T, O] float32.  y: [T, O].  Grid: (O / BLOCK, T)."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < out_features
    result = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        result += tl.load(sums + (part * tokens + token) * out_features + rows, mask=mask, other=0.0)
    if row_scales is not None:
        result *= tl.load(row_scales + rows, mask=mask, other=0.0)
    if bias is not None:
        result += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + token * out_features + rows, result.to(y.dtype.element_ty), mask=mask)


@kernel
def expand(
    words,
    scales,
    zeros,
    row_scales,
    dense,
    first,
    count,
    out_features,
    row_words,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """dense: [count, I], from weight row `first` on.  Grid: (count / BLOCK_O, W / BLOCK_W)."""
    places = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = first + places
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (places < count)[:, None] & (columns < row_words)[None, :]
    tile = tl.load(words + rows.to(tl.int64)[:, None] * row_words + columns[None, :], mask=mask, other=0)
    scale, zero = scales_and_zeros(
        scales, zeros, rows, columns, mask, out_features, GROUP_WORDS, GROUP_ROWS, OFFSET, ZERO, SCALE_KIND
    )
    if row_scales is not None:
        scale *= tl.load(row_scales + rows, mask=places < count, other=0.0)[:, None]
    inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
    target = dense + places.to(tl.int64)[:, None] * (row_words * N) + inputs[None, :]
    for n in tl.static_range(N):
        value = (DECODE(tile, n) - zero) * scale
        tl.store(target + n * SPAN_WORDS, value.to(dense.dtype.element_ty), mask=mask)
