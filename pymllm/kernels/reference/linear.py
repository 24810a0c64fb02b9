"""The reference kernels for linear layers and embeddings: always last, run everything, correct rather than fast.

They dequantise to the activations' dtype, then multiply with float32 accumulation. Weights stay packed (two int4 codes
a byte); a few rows are dequantised at a time, so that memory does not grow with the layer.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.errors import IndicesError
from pymllm.kernels.activations import integer_product, quantise_activations
from pymllm.kernels.canonical import (
    CanonicalWeight,
    CodebookType,
    CodebookWeight,
    DenseType,
    DenseWeight,
    Fp8Type,
    Fp8Weight,
    IntWeight,
)
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.native.addresses import check_memory, describe_tensor
from pymllm.kernels.registry import Packed

CHUNK_ELEMENTS = 1 << 21  # weights dequantised at a time: 8 MB as float32


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack [O, I] uint8 codes 0..15 in [O, I/2] bytes, the even column in the low nibble.  I is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack [O, I/2] bytes to [O, I] uint8 codes 0..15, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _pack(weight: CanonicalWeight) -> dict[str, Tensor]:
    packed = weight.tensors()
    four_bits = isinstance(weight, CodebookWeight) or (isinstance(weight, IntWeight) and weight.bits <= 4)
    if four_bits and weight.shape[1] % 2 == 0:
        packed["codes"] = pack_nibbles(packed["codes"])
    return packed


def _unpack(packed: Packed, problem: LinearProblem, rows: slice | Tensor | None = None) -> CanonicalWeight:
    """Rebuild the canonical weight.  rows: the outputs that it shall have; None: all."""
    kind = problem.weight

    def cut(name: str) -> Tensor | None:
        tensor = packed.get(name)
        if tensor is None or rows is None:
            return tensor
        # torch gathers no rows of fp8, but of bytes.
        if tensor.dtype.itemsize == 1 and isinstance(rows, Tensor):
            return tensor.view(torch.uint8).index_select(0, rows).view(tensor.dtype)
        # Unlike brackets, this takes no row below 0 for one from the end.
        return tensor.index_select(0, rows) if isinstance(rows, Tensor) else tensor[rows]

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
        input_zeros=packed.get("input_zeros"),
    )


def _needed(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


class ReferenceLinear:
    """The reference for linear layers: it dequantises some rows, multiplies, and goes on."""

    name = "reference"
    layout = "reference"

    def why_not(self, problem: LinearProblem) -> str | None:
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if _quantises_activations(problem):
            kind: Any = problem.weight
            element = {"fp8": "fp8", "int": "int8", "codebook": "fp4"}[kind.family]
            if kind.activations.endswith(" fp8") or kind.activations == "group mx":
                element = "fp8"
            return f"inputs rounded to {element} ({kind.activations}), sums in float32"
        return "weights dequantised exactly, sums in float32"

    def tolerance(self, problem: LinearProblem) -> float:
        """Return the relative error that `verify` allows: the dtype's, and twice what rounded activations explain."""
        rounding = {"int8": 1.2e-2, "fp8": 5e-2, "fp4": 2.5e-1}
        said = self.numerics(problem)
        rounded = (error for name, error in rounding.items() if name in said)
        return TOLERANCES[problem.dtype] + next(rounded, 0.0)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return _pack(weight)

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return _unpack(packed, problem)

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        check_memory("x", x)
        kind: Any = problem.weight
        rounds = _quantises_activations(problem)
        product = rounds and "product" in kind.activations
        if rounds and not product:
            x = quantise_activations(x, kind, packed.get("input_scales"), packed.get("input_zeros"))
        step = max(1, CHUNK_ELEMENTS // max(problem.in_features, 1))
        result = x.new_empty((*x.shape[:-1], problem.out_features))
        for start in range(0, problem.out_features, step):
            rows = slice(start, min(start + step, problem.out_features))
            weight = _unpack(packed, problem, rows)
            if product:
                assert isinstance(weight, IntWeight)
                result[..., rows] = integer_product(x, weight)
            else:
                result[..., rows] = F.linear(x, weight.dequantize(problem.dtype))
        return result if bias is None else result + bias


def _quantises_activations(problem: LinearProblem) -> bool:
    return problem.compute == "checkpoint" and getattr(problem.weight, "activations", "float") != "float"


class ReferenceEmbedding:
    """The reference for embeddings: it gathers packed rows, then dequantises just those."""

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
        check_memory("ids", ids)  # torch gathers without a look
        try:
            rows = _unpack(packed, problem, ids.reshape(-1))
        except (IndexError, RuntimeError) as error:
            raise IndicesError(
                f"an embedding cannot look these ids up: {error}",
                code="embedding-ids",
                expected=f"int64 or int32 from 0 to {problem.out_features - 1}",
                found=describe_tensor(ids),
            ) from error
        return rows.dequantize(problem.dtype).view(*ids.shape, problem.in_features)
