"""The reference kernels: always last, run everything, right before fast.

Dequantise to the activation dtype, then multiply with float32 accumulation. Weights stay packed (two int4 codes a
byte); a few rows are dequantised at a time, so that memory does not grow with the layer.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX, CanonicalWeight, DenseWeight, Fp8Type, Fp8Weight, IntType, IntWeight
from pymllm.kernels.registry import AttentionProblem, LinearProblem, Packed

CHUNK_ELEMENTS = 1 << 21  # weights dequantised at a time: 8 MB as float32


def pack_nibbles(codes: Tensor) -> Tensor:
    """[O, I] uint8 codes 0..15 → [O, I/2] bytes, the even column in the low nibble.  I is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[O, I/2] bytes → [O, I] uint8 codes 0..15, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _pack(weight: CanonicalWeight) -> dict[str, Tensor]:
    packed = weight.tensors()
    if isinstance(weight, IntWeight) and weight.bits <= 4 and weight.codes.shape[1] % 2 == 0:
        packed["codes"] = pack_nibbles(weight.codes)
    return packed


def _unpack(packed: Packed, problem: LinearProblem, rows: slice | Tensor | None = None) -> CanonicalWeight:
    """The canonical weight again; `rows`: only those outputs."""
    kind = problem.weight

    def cut(name: str) -> Tensor:
        return packed[name] if rows is None else packed[name][rows]

    if isinstance(kind, IntType):
        codes = cut("codes")
        if codes.shape[1] != problem.in_features:
            codes = unpack_nibbles(codes)
        return IntWeight(codes, cut("scales"), None if kind.symmetric else cut("zeros"), kind.bits, kind.group_size)
    if isinstance(kind, Fp8Type):
        weight, scales, block = cut("weight"), packed["scales"], kind.block
        if rows is not None and block[0] != 0:
            side = block[0]
            index = torch.arange(problem.out_features, device=scales.device)[rows] // side
            scales, block = scales[index], (1, block[1])
        return Fp8Weight(weight, scales, block, kind.activations, packed.get("input_scales"))
    return DenseWeight(cut("weight"))


class ReferenceLinear:
    """Dequantise a chunk of rows, multiply, repeat."""

    name = "reference"
    layout = "reference"

    def why_not(self, problem: LinearProblem) -> str | None:
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if _quantises_activations(problem):
            return f"activations rounded to fp8 ({problem.weight.activations}), float32 accumulation"  # type: ignore[union-attr]
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
    return (
        problem.compute == "checkpoint" and isinstance(problem.weight, Fp8Type) and problem.weight.activations != "float"
    )


def quantise_activations(x: Tensor, kind: Fp8Type, input_scales: Tensor | None) -> Tensor:
    """x as its fp8 codes would say it, in x's own dtype.  x: [*, I].

    "token": a scale for each row; "group": for each 128 inputs of a row; "tensor": for all of x; "static": the
    checkpoint's (the largest of the parts' scales, which overflows in none of them).
    """
    values = x.float()
    if kind.activations == "static":
        assert input_scales is not None
        scale = input_scales.max()
    elif kind.activations == "tensor":
        scale = values.abs().amax() / E4M3_MAX if values.numel() else values.new_ones(())
    elif kind.activations == "group":
        side = kind.block[1] or x.shape[-1]
        padded = F.pad(values, (0, -x.shape[-1] % side)).unflatten(-1, (-1, side))
        scale = (padded.abs().amax(-1) / E4M3_MAX).repeat_interleave(side, dim=-1)[..., : x.shape[-1]]
    else:
        scale = values.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
    codes = (values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


class ReferenceEmbedding:
    """Gather packed rows, then dequantise just those."""

    name = "reference"
    layout = "reference"

    def why_not(self, problem: LinearProblem) -> str | None:
        return None

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return _pack(weight)

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return _unpack(packed, problem)

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:
        rows = _unpack(packed, problem, ids.reshape(-1))
        return rows.dequantize(problem.dtype).view(*ids.shape, problem.in_features)


class ReferenceAttention:
    """softmax(q kᵀ · scale) v in float32, written out."""

    name = "reference"

    def why_not(self, problem: AttentionProblem) -> str | None:
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
        """One request.  q: [Tq, H, D], the last Tq of Tk positions; k, v: [Tk, Hkv, D].  Returns [Tq, H, D]."""
        repeats = q.shape[1] // k.shape[1]
        keys, values = (t.float().repeat_interleave(repeats, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
        scores = scores.masked_fill(~causal_mask(q.shape[0], k.shape[0], sliding_window, q.device), -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)


def causal_mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys the last `queries` of `keys` positions may see."""
    query_position = torch.arange(keys - queries, keys, device=device)[:, None]
    key_position = torch.arange(keys, device=device)[None, :]
    seen = key_position <= query_position
    if sliding_window is not None:
        seen &= key_position > query_position - sliding_window
    return seen
