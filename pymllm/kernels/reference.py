"""The reference kernels: always last, run everything, right before fast.

Dequantise to the activation dtype, then multiply with float32 accumulation. Weights stay packed (two int4 codes a
byte); a few rows are dequantised at a time, so that memory does not grow with the layer.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import (
    E4M3_MAX,
    CanonicalWeight,
    CodebookType,
    CodebookWeight,
    DenseType,
    DenseWeight,
    Fp8Type,
    Fp8Weight,
    IntType,
    IntWeight,
)
from pymllm.kernels.registry import LinearProblem, Packed

CHUNK_ELEMENTS = 1 << 21  # weights dequantised at a time: 8 MB as float32


def pack_nibbles(codes: Tensor) -> Tensor:
    """[O, I] uint8 codes 0..15 → [O, I/2] bytes, the even column in the low nibble.  I is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[O, I/2] bytes → [O, I] uint8 codes 0..15, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _pack(weight: CanonicalWeight) -> dict[str, Tensor]:
    packed = weight.tensors()
    four_bits = isinstance(weight, CodebookWeight) or (isinstance(weight, IntWeight) and weight.bits <= 4)
    if four_bits and weight.shape[1] % 2 == 0:
        packed["codes"] = pack_nibbles(packed["codes"])
    return packed


def _unpack(packed: Packed, problem: LinearProblem, rows: slice | Tensor | None = None) -> CanonicalWeight:
    """The canonical weight again; `rows`: only those outputs."""
    kind = problem.weight

    def cut(name: str) -> Tensor | None:
        tensor = packed.get(name)
        if tensor is None or rows is None:
            return tensor
        if tensor.dtype.itemsize == 1 and isinstance(rows, Tensor):  # torch gathers no rows of fp8
            return tensor.view(torch.uint8)[rows].view(tensor.dtype)
        return tensor[rows]

    if isinstance(kind, DenseType):
        return DenseWeight(_needed(cut("weight")))
    if isinstance(kind, Fp8Type):
        scales, block = packed["scales"], kind.block
        if rows is not None and block[0] != 0:
            index = torch.arange(problem.out_features, device=scales.device)[rows] // block[0]
            scales, block = scales[index], (1, block[1])
        return Fp8Weight(_needed(cut("weight")), scales, block, kind.activations, packed.get("input_scales"))
    codes = _needed(cut("codes"))
    if codes.shape[1] != problem.in_features:
        codes = unpack_nibbles(codes)
    scales, static = _needed(cut("scales")), packed.get("input_scales")
    if isinstance(kind, CodebookType):
        return CodebookWeight(
            codes,
            packed["table"],
            scales,
            kind.codebook,
            kind.group_size,
            cut("row_scales"),
            kind.activations,
            static,
        )
    return IntWeight(
        codes,
        scales,
        cut("zeros"),
        kind.bits,
        kind.group_size,
        offsets=cut("offsets"),
        group_index=packed.get("group_index"),
        activations=kind.activations,
        input_scales=static,
    )


def _needed(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


class ReferenceLinear:
    """Dequantise a chunk of rows, multiply, repeat."""

    name = "reference"
    layout = "reference"

    def why_not(self, problem: LinearProblem) -> str | None:
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if _quantises_activations(problem):
            kind: Any = problem.weight
            element = {"fp8": "fp8", "int": "int8", "codebook": "fp4"}[kind.family]
            return f"activations rounded to {element} ({kind.activations}), float32 accumulation"
        return "weights dequantised exactly, float32 accumulation"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return _pack(weight)

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return _unpack(packed, problem)

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        if _quantises_activations(problem):
            x = quantise_activations(x, problem.weight, packed.get("input_scales"))  # type: ignore[arg-type]
        out_features, in_features = problem.out_features, problem.in_features
        step = max(1, CHUNK_ELEMENTS // max(in_features, 1))
        result = x.new_empty((*x.shape[:-1], out_features))
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            weight = _unpack(packed, problem, rows).dequantize(problem.dtype)
            result[..., rows] = F.linear(x, weight)
        return result if bias is None else result + bias


def _quantises_activations(problem: LinearProblem) -> bool:
    return problem.compute == "checkpoint" and getattr(problem.weight, "activations", "float") != "float"


def quantise_activations(
    x: Tensor, kind: Fp8Type | IntType | CodebookType, input_scales: Tensor | None
) -> Tensor:
    """x as its codes would say it, in x's own dtype.  x: [*, I].

    "token": a scale for each row; "group": for each group of inputs of a row; "tensor": for all of x; "static": the
    checkpoint's (the largest of the parts' scales, which overflows in none of them).

    All of it in x's dtype, as compressed-tensors does it: in bfloat16 a scale in float32 moves so many codes that the
    logits end up twice as far from those of the checkpoint's writer.
    """
    if isinstance(kind, CodebookType):
        return quantise_to_fp4(x, kind.group_size, input_scales)
    largest = E4M3_MAX if kind.family == "fp8" else 127.5  # of int8 codes, halfway between -128 and 127
    side = (kind.block[1] if isinstance(kind, Fp8Type) else kind.group_size) or x.shape[-1]
    if kind.activations == "static":
        scale = _needed(input_scales).max().to(x.dtype)
    elif kind.activations == "tensor":
        scale = x.abs().amax() / largest if x.numel() else x.new_ones(())
    elif kind.activations == "group":
        padded = F.pad(x, (0, -x.shape[-1] % side)).unflatten(-1, (-1, side))
        scale = (padded.abs().amax(-1) / largest).repeat_interleave(side, dim=-1)[..., : x.shape[-1]]
    else:
        scale = x.abs().amax(-1, keepdim=True) / largest
    scale = scale.clamp(min=torch.finfo(x.dtype).smallest_normal)
    if kind.family == "fp8":
        codes = (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    else:
        codes = (x / scale).round().clamp(-128, 127)
    return codes * scale


def quantise_to_fp4(x: Tensor, group_size: int, global_scales: Tensor | None) -> Tensor:
    """x rounded to e2m1 in groups.  x: [*, I].

    global_scales: [P], nvfp4's: a group's scale is e4m3 over a global one (the smallest of the parts', which overflows
    in none of them). None: mxfp4's powers of two, the next one up where the largest value would round past 6.
    """
    groups = F.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    peak = groups.abs().amax(-1, keepdim=True)
    if global_scales is not None:
        over = global_scales.min()
        stored = ((peak / 6).float() * over).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        scale = torch.where(stored == 0, 0.125, stored) / over
    else:
        mantissa, exponent = torch.frexp(peak.float())  # peak = mantissa * 2**exponent, mantissa in [0.5, 1)
        exponent = exponent - 1 + (mantissa >= 0.875).int() - 2
        scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-126, 127))
    rounded = nearest_e2m1(groups.float() / scale) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def nearest_e2m1(values: Tensor) -> Tensor:
    """Each value rounded to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even codes."""
    size = values.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, values)


class ReferenceEmbedding:
    """Gather packed rows, then dequantise just those."""

    name = "reference"
    layout = "reference"

    def why_not(self, problem: LinearProblem) -> str | None:
        return None

    def numerics(self, problem: LinearProblem) -> str:
        return "rows dequantised exactly"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return _pack(weight)

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return _unpack(packed, problem)

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:
        rows = _unpack(packed, problem, ids.reshape(-1))
        return rows.dequantize(problem.dtype).view(*ids.shape, problem.in_features)
