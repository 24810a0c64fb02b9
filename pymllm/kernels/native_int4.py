"""Group-wise int4 linear on the CPU, in C++: `kernels/int4.h` has the layout and says how it is fast.

Activations become int8 codes with a scale for every token and group, except where that would save no time: up to
`EXACT_TOKENS` tokens, reading the weights takes longer than multiplying them three times.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, IntType, IntWeight
from pymllm.kernels.cpu import native_missing_reason
from pymllm.kernels.registry import TOLERANCES, LinearProblem, Packed

EXACT_TOKENS = 2
BLOCK_ROWS = 16
BLOCK_GROUPS = (128, 64, 32)  # inputs of one packed block
HEADER_BYTES = 64
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Dtype in kernels/int4.h
# A 16-bit float is rounded to 4e-3 or 5e-4 on the way out: two slices (2e-5) are exact enough, float32 takes three.
EXACT_SLICES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


@functools.cache
def _native() -> Any:
    from pymllm import _native

    return _native


@functools.cache
def _isa_code(name: str | None) -> int:
    return _native().isa_code(name or "")


@functools.cache
def _block_group(group_size: int) -> int:
    """Inputs of a packed block: larger groups repeat their scale and zero in several blocks."""
    return next(size for size in BLOCK_GROUPS if group_size % size == 0)


@functools.cache
def _blocks_shape(out_features: int, in_features: int, group: int) -> tuple[int, int, int]:
    """[ceil(O/16), I/G, bytes of a block]; group: of a block."""
    return -(-out_features // BLOCK_ROWS), in_features // group, HEADER_BYTES + group * BLOCK_ROWS // 2


class NativeInt4:
    """int8 (or, exactly, several int8) × int4 products; scales in float16."""

    name = "native_int4"
    layout = "native_int4 16-row blocks"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits != 4:
            return f"multiplies 4-bit integers only, the weight is {kind}"
        if not kind.plain:
            return f"takes integer zero points in groups that lie in order, the weight is {kind}"
        if problem.compute == "checkpoint" and kind.activations != "float":
            return "quantises activations in its own way, which compute=checkpoint forbids"
        if problem.device.type != "cpu":
            return "runs on the CPU only"
        if problem.dtype not in DTYPES:
            return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
        if kind.scales not in (torch.float16, torch.bfloat16):
            return (
                f"keeps scales in float16, which does not hold {str(kind.scales).removeprefix('torch.')} ones"
            )
        if kind.group_size <= 0 or kind.group_size % BLOCK_GROUPS[-1]:
            return f"takes groups of a multiple of {BLOCK_GROUPS[-1]}, the weight has {kind.group_size}"
        if problem.in_features <= 0 or problem.in_features % kind.group_size or problem.out_features <= 0:
            return f"takes whole groups, not {problem.in_features} inputs in groups of {kind.group_size}"
        return native_missing_reason()

    def numerics(self, problem: LinearProblem) -> str:
        exact = "float-exact activations"
        if problem.compute != "auto":
            return f"{exact}, float32 accumulation"
        return (
            f"{exact} for up to {EXACT_TOKENS} tokens, above that int8 activations per group "
            "(relative error about 6e-3), float32 accumulation"
        )

    def tolerance(self, problem: LinearProblem) -> float:
        """Relative error that `verify` allows: twice what rounding activations to int8 explains, or the dtype's."""
        return TOLERANCES[problem.dtype] + (1.2e-2 if problem.compute == "auto" else 0.0)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, IntWeight)
        # What float16 may not hold, for `unpack`.
        scales, kept = weight.scales, {}
        if scales.dtype is torch.bfloat16:
            kept = {"scales": scales, "factor": torch.empty(1, device=scales.device)}
            if not scales.is_meta:
                scales, kept["factor"] = _as_float16(scales)
        group = _block_group(weight.group_size)
        shape = _blocks_shape(problem.out_features, problem.in_features, group)
        blocks = torch.empty(shape, dtype=torch.uint8, device=weight.codes.device)
        if blocks.is_meta:
            return {"blocks": blocks, **kept}
        dtypes = {weight.codes.dtype} | ({weight.zeros.dtype} if weight.zeros is not None else set())
        if dtypes != {torch.uint8}:
            raise TypeError("codes and zeros are uint8 in the canonical layout")
        if not all(tensor.is_cpu for tensor in weight.tensors().values()):
            raise ValueError("the weight is not on the CPU")
        codes, scales = weight.codes.contiguous(), scales.contiguous()
        zeros = None if weight.zeros is None else weight.zeros.contiguous()
        stored = (problem.out_features, problem.in_features // weight.group_size)
        if codes.shape != weight.shape or codes.shape != (problem.out_features, problem.in_features):
            raise ValueError(
                f"codes are {tuple(codes.shape)}, the layer is {problem.out_features}×{problem.in_features}"
            )
        if scales.shape != stored or (zeros is not None and zeros.shape != stored):
            raise ValueError(f"scales and zeros must be {stored}, the scales are {tuple(scales.shape)}")
        _native().int4_pack(
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            blocks.data_ptr(),
            problem.out_features,
            problem.in_features,
            weight.group_size,
            group,
            torch.get_num_threads(),
        )
        return {"blocks": blocks, **kept}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        blocks, group = packed["blocks"], _block_group(kind.group_size)
        stored = (problem.out_features, problem.in_features // kind.group_size)
        codes = blocks.new_empty((problem.out_features, problem.in_features))
        scales = blocks.new_empty(stored, dtype=torch.float16)
        zeros = None if kind.symmetric else blocks.new_empty(stored)
        if not blocks.is_meta:
            _check_blocks(blocks, _blocks_shape(problem.out_features, problem.in_features, group))
            _native().int4_unpack(
                blocks.data_ptr(),
                codes.data_ptr(),
                scales.data_ptr(),
                0 if zeros is None else zeros.data_ptr(),
                problem.out_features,
                problem.in_features,
                kind.group_size,
                group,
                torch.get_num_threads(),
            )
        scales = packed.get("scales", scales)
        return IntWeight(codes, scales, zeros, kind.bits, kind.group_size, activations=kind.activations)

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        # About 3 us a call: every line here counts (test_dispatch_costs_few_microseconds).
        blocks, dtype = packed["blocks"], problem.dtype
        in_features, out_features = problem.in_features, problem.out_features
        shape = x.shape
        if x.dtype is not dtype or not x.is_cpu or shape[-1] != in_features:
            raise ValueError(
                f"x must be [*, {in_features}] {dtype} on the CPU, not {tuple(shape)} {x.dtype} on {x.device}"
            )
        if "factor" in packed:  # the moved scales' products may leave float16's range: float32 in between
            moved = self.run({"blocks": blocks}, replace(problem, dtype=torch.float32), x.float(), None)
            y = moved * packed["factor"]
            return (y if bias is None else y + bias).to(dtype)
        group = _block_group(problem.weight.group_size)  # type: ignore[union-attr]
        _check_blocks(blocks, _blocks_shape(out_features, in_features, group))
        x = x.contiguous()
        tokens = x.numel() // in_features
        bias_address = 0
        if bias is not None:
            bias = bias.to(dtype).contiguous()
            if bias.shape != (out_features,) or not bias.is_cpu:
                raise ValueError(
                    f"bias must be [{out_features}] on the CPU, not {tuple(bias.shape)} on {bias.device}"
                )
            bias_address = bias.data_ptr()
        y = x.new_empty((*shape[:-1], out_features))
        exact = tokens <= EXACT_TOKENS or problem.compute != "auto"
        _native().int4_linear(
            blocks.data_ptr(),
            x.data_ptr(),
            bias_address,
            y.data_ptr(),
            tokens,
            out_features,
            in_features,
            group,
            DTYPES[dtype],
            EXACT_SLICES[dtype] if exact else 1,
            torch.get_num_threads(),
            _isa_code(problem.device.isa),
        )
        return y


def _check_blocks(blocks: Tensor, shape: tuple[int, int, int]) -> None:
    """The kernel reads as many bytes as the shape needs, without looking."""
    fits = blocks.shape == shape and blocks.dtype is torch.uint8 and blocks.is_contiguous() and blocks.is_cpu
    if not fits:
        raise ValueError(
            f"packed blocks must be {shape} uint8 on the CPU, not {tuple(blocks.shape)} {blocks.dtype}"
        )


def _as_float16(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as float16, and the factor by which products are to be multiplied for it.

    bfloat16 reaches further than float16, but not more finely: a power of two moves the largest scale to 2^15, and
    every scale down to 2^-17 of float16's own unit, 2^32 below the largest, is then held exactly.
    """
    largest = float(scales.abs().max()) if scales.numel() else 1.0
    exponent = 15 - math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0
    return (scales.float() * 2.0**exponent).half(), torch.tensor([2.0**-exponent])
