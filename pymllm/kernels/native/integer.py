"""The base of the native kernels over integer codes: `kernels/integer.h` has the layout and says how it is fast.

Activations become int8 codes with a scale for every token and group, except where that is forbidden or would save no
time: up to `exact_tokens` tokens, reading the weights takes longer than multiplying them several times.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.errors import ConfigError, counted
from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.canonical import CanonicalWeight, CodebookType, CodebookWeight, IntType, IntWeight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.native.addresses import (
    CODE,
    address,
    check_memory,
    checked_address,
    contiguous,
    fits,
    unfit,
)
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import bias_of, why_not_here, wrong_input
from pymllm.kernels.native.packed_memory import empty_packed
from pymllm.kernels.registry import Packed

BLOCK_ROWS = 16
BLOCK_GROUPS = (128, 64, 32, 16)  # inputs of one packed block
LONG_ROW = 1024  # from here on, a group that is a whole row is filled up to blocks of 128
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType in kernels/float_linear.h
# Scales in kernels/integer.h
SCALES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e8m0fnu: 4,
}
DEMANDS = {"float": 0, "token": 1, "tensor": 2, "group": 3, "static": 4}  # Demand there
CODE_NIBBLES, CODE_BYTES = 0, 1
ZERO_SAME, ZERO_EACH, ZERO_OFFSETS = 0, 1, 2
# Results in 16 bits are rounded by 4e-3 or 5e-4, so two slices (2e-5) are exact enough for them; float32 takes three.
EXACT_SLICES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Blocks:
    """The packed form of a weight: Format and Weights in kernels/integer.h.

    shape: [ceil(O/16), ceil(I/group), bytes of a block].  in_features: those of the blocks, filled up.
    zeros: ZERO_SAME, ZERO_EACH or ZERO_OFFSETS.  stored_group: the checkpoint's group size.
    arguments: in_features, group, format and zero point, as every function of the extension takes them.
    size: the bytes of all blocks.
    """

    shape: tuple[int, int, int]
    size: int
    in_features: int
    zeros: int
    stored_group: int
    arguments: tuple[int, int, int, int]


@functools.cache
def _int_blocks(
    bits: int,
    group_size: int,
    symmetric: bool,
    offsets: bool,
    scales: torch.dtype,
    out_features: int,
    in_features: int,
) -> Blocks:
    codes = CODE_NIBBLES if bits <= 4 else CODE_BYTES
    zeros = ZERO_OFFSETS if offsets else ZERO_SAME if symmetric else ZERO_EACH
    if zeros == ZERO_SAME and codes == CODE_NIBBLES and scales.itemsize == 2:
        zeros = ZERO_EACH  # Format::fused
    return _blocks(codes, zeros, 0, 1 << (bits - 1), scales, group_size, out_features, in_features)


@functools.cache
def _codebook_blocks(
    codebook: str, group_size: int, scales: torch.dtype, out_features: int, in_features: int
) -> Blocks:
    table = INTEGER_CODEBOOKS[codebook]
    return _blocks(
        CODE_NIBBLES, ZERO_SAME, table.number, table.zero, scales, group_size, out_features, in_features
    )


def _blocks(
    codes: int,
    zeros: int,
    table: int,
    zero: int,
    scales: torch.dtype,
    group_size: int,
    out_features: int,
    in_features: int,
) -> Blocks:
    filled = in_features
    # A group that is the whole row is filled up; activations are 0 there.
    if group_size >= in_features:
        side = 128 if in_features >= LONG_ROW and in_features % 64 else 32
        filled = -(-in_features // side) * side
    divided = filled if filled != in_features else group_size
    group = next(size for size in BLOCK_GROUPS if divided % size == 0)
    header = BLOCK_ROWS * (scales.itemsize + (0, 1, 4)[zeros])
    fused = codes == CODE_NIBBLES and zeros == ZERO_EACH and table == 0 and scales.itemsize == 2
    if codes == CODE_BYTES or fused:
        header = -(-header // 64) * 64
    size = header + group * BLOCK_ROWS // (2 if codes == CODE_NIBBLES else 1)
    shape = (-(-out_features // BLOCK_ROWS), filled // group, size)
    return Blocks(
        shape=shape,
        size=math.prod(shape),
        in_features=filled,
        zeros=zeros,
        stored_group=min(group_size, in_features),
        arguments=(filled, group, codes | SCALES[scales] << 4 | zeros << 8 | table << 12, zero),
    )


def blocks_of(problem: LinearProblem) -> Blocks:
    """Return the packed form of the problem's weight."""
    kind, outputs, inputs = problem.weight, problem.out_features, problem.in_features
    if isinstance(kind, IntType):
        return _int_blocks(
            kind.bits, kind.group_size, kind.symmetric, kind.offsets, kind.scales, outputs, inputs
        )
    assert isinstance(kind, CodebookType)
    return _codebook_blocks(kind.codebook, kind.group_size, kind.scales, outputs, inputs)


def group_reason(kind: IntType | CodebookType, in_features: int, out_features: int) -> str | None:
    """Return why groups do not fit into blocks; None: they do."""
    smallest = BLOCK_GROUPS[-1]
    if in_features <= 0 or out_features <= 0:
        return f"takes weights that are not empty, this one is {out_features}×{in_features}"
    if kind.group_size >= in_features:
        return None
    if kind.group_size <= 0 or kind.group_size % smallest:
        return f"takes groups of a multiple of {smallest}, the weight has {kind.group_size}"
    if in_features % kind.group_size:
        return f"takes whole groups, not {counted(in_features, 'input')} in groups of {kind.group_size}"
    return None


def blocks_address(blocks: Tensor, shape: tuple[int, ...], size: int) -> int:
    """Return where packed blocks lie, `size` bytes.  Raises ConfigError for others than `shape` says."""
    if not fits(blocks, shape, torch.uint8):
        raise unfit("packed blocks", blocks, shape, torch.uint8)
    return address("packed blocks", blocks, size)


def factors_address(factors: Tensor | None, shape: tuple[int, ...]) -> int:
    """Return where the factors of a weight's rows lie; 0: there are none."""
    return 0 if factors is None else checked_address("the factors of rows", factors, shape, torch.float32)


def device_reason(problem: LinearProblem) -> str | None:
    """Return why the problem cannot run here: another device, another dtype, or no native kernels; None: it can."""
    return why_not_here(problem) or native_missing_reason()


def integer_reason(problem: LinearProblem) -> str | None:
    """Return why a native kernel cannot take this weight of integers, whose bits it does take; None: it can."""
    kind = problem.weight
    assert isinstance(kind, IntType)
    if kind.indexed:
        return f"takes groups that lie in order, the weight is {kind}"
    if kind.scales not in SCALES:
        return f"takes scales in float16, bfloat16 or float32, the weight has {kind.scales}"
    if problem.compute == "checkpoint" and kind.activations != "float":
        if "product" in kind.activations:
            return f"rounds its inputs before it multiplies, the checkpoint wants {kind.activations}"
        # W8A8 logits: with exact weights 3.6e-2 from the writer's, with rounded ones 3.1e-2.
        if problem.dtype is not torch.float32:
            return f"keeps weights exact, which writers that quantise inputs round to {problem.dtype}"
    return group_reason(kind, problem.in_features, problem.out_features) or device_reason(problem)


class NativeIntegerLinear:
    """The base of the kernels for integer codes × activations in int8 (or, exactly, in several int8 slices)."""

    device_type = "cpu"
    name: ClassVar[str]
    layout: ClassVar[str] = "native_integer 16-row blocks"
    by_rows: ClassVar[tuple[str, ...]] = ("row_scales", "row_factors")  # packed beside the blocks, [O]
    # By the dtype of the activations, how many tokens are multiplied float-exactly at no cost.
    exact_tokens: ClassVar[dict[torch.dtype, int]] = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 2}

    def numerics(self, problem: LinearProblem) -> str:
        kind: Any = problem.weight
        if problem.compute == "checkpoint" and kind.activations != "float":
            element = "fp8" if kind.activations.endswith(" fp8") else "int8"
            return f"inputs rounded to {element} ({kind.activations}), products summed exactly, scales in float32"
        if problem.compute != "auto":
            return "inputs as they are, sums in float32"
        return (
            f"inputs as they are for up to {counted(self.exact_tokens[problem.dtype], 'token')} at a time, for more "
            "rounded to int8 in groups (relative error about 6e-3), sums in float32"
        )

    def tolerance(self, problem: LinearProblem) -> float:
        """Return the relative error that `verify` allows: the dtype's, and twice what rounded activations explain."""
        said = self.numerics(problem)
        rounds = 5e-2 if "fp8" in said else 1.2e-2 if problem.compute == "auto" or "int8" in said else 0.0
        return TOLERANCES[problem.dtype] + rounds

    def pack(self, weight: CanonicalWeight, problem: LinearProblem, blocks: Tensor | None = None) -> Packed:
        """Pack a weight.  blocks: those of its rows within a larger weight's, to be filled; None: its own."""
        assert isinstance(weight, IntWeight | CodebookWeight)
        kept = {name: t for name, t in weight.tensors().items() if name in ("input_scales", "input_zeros")}
        zeros = None
        if isinstance(weight, IntWeight):
            zeros = weight.zeros if weight.offsets is None else weight.offsets.float()
            if weight.offsets is not None and weight.offsets.dtype is not torch.float32:
                kept["offsets"] = weight.offsets.new_empty(0)  # tells `unpack` their dtype
        return {"blocks": pack_blocks(weight.codes, weight.scales, zeros, problem, blocks), **kept}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        codes, scales, zeros = unpack_blocks(packed["blocks"], kind.scales, kind.symmetric, problem)
        if zeros is not None and "offsets" in packed:
            zeros = zeros.to(packed["offsets"].dtype)
        return IntWeight(
            codes,
            scales,
            None if kind.offsets else zeros,
            kind.bits,
            kind.group_size,
            offsets=zeros if kind.offsets else None,
            activations=kind.activations,
            input_scales=packed.get("input_scales"),
            input_zeros=packed.get("input_zeros"),
        )

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        # About 3 us a call: every line here counts (benchmarks/cpu_dispatch.py).
        blocks, dtype, compute = packed["blocks"], problem.dtype, problem.compute
        in_features, out_features = problem.in_features, problem.out_features
        shape = x.shape
        if x.dtype is not dtype or not x.is_cpu or not shape or shape[-1] != in_features or x.is_neg():
            raise wrong_input(x, problem)
        if not x.is_contiguous():
            x = contiguous("x", x)
        plan = blocks_of(problem)
        tokens = x.numel() // in_features
        y = x.new_empty(*shape[:-1], out_features)  # a tuple would cost 0.3 us
        slices, demand, scale = 1, 0, 0.0
        if compute == "checkpoint":
            kind: Any = problem.weight
            demand = DEMANDS.get(kind.activations, 0)
            check_memory("x", x)
            if demand == 0 and kind.activations != "float":
                x = quantise_activations(x, kind, packed.get("input_scales"), packed.get("input_zeros"))
            elif demand == DEMANDS["static"]:  # the largest of the parts' scales, which overflows in no part
                scale = float(packed["input_scales"].max().to(dtype))
        if demand == 0 and (compute != "auto" or tokens <= self.exact_tokens[dtype]):
            slices = EXACT_SLICES[dtype]
        filled, group, form, zero = plan.arguments  # by name: a starred call costs 0.1 us
        if filled != in_features:
            check_memory("x", x)
            x = F.pad(x, (0, filled - in_features))
        if bias is not None:
            bias = bias_of(bias, problem)
        factors = packed.get("row_factors")
        native().integer_linear(
            blocks_address(blocks, plan.shape, plan.size),
            out_features,
            filled,
            group,
            form,
            zero,
            0 if factors is None else factors_address(factors, (out_features,)),
            address("x", x, tokens * filled * dtype.itemsize),
            0 if bias is None else address("the bias", bias, out_features * dtype.itemsize),
            y.data_ptr(),
            tokens,
            DTYPES[dtype],
            slices,
            demand,
            plan.stored_group,
            scale,
            torch.get_num_threads(),
            isa_code(problem.device.isa),
        )
        return y


def empty_blocks(problem: LinearProblem) -> Tensor:
    """Allocate the packed form of the problem's weight on the CPU, without values."""
    return empty_packed(blocks_of(problem).shape)


def pack_blocks(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    problem: LinearProblem,
    blocks: Tensor | None = None,
) -> Tensor:
    """Pack the problem's weight.  codes: [O, I].  scales, zeros (or offsets): [O, I/G].

    blocks: to be filled; None: new ones.
    Returns [ceil(O/16), ceil(I/G), bytes] uint8; of codes on the meta device, on meta.
    """
    plan = blocks_of(problem)
    if codes.is_meta:
        return torch.empty(plan.shape, dtype=torch.uint8, device="meta")
    zero_dtype = torch.float32 if plan.zeros == ZERO_OFFSETS else torch.uint8
    outputs, inputs = problem.out_features, problem.in_features
    stored = (outputs, -(-inputs // plan.stored_group))
    kind: Any = problem.weight
    wanted = [("codes", codes, (outputs, inputs), torch.uint8), ("scales", scales, stored, kind.scales)]
    if zeros is not None:
        wanted.append(("zeros or offsets", zeros, stored, zero_dtype))
    elif plan.zeros == ZERO_OFFSETS:
        raise unfit("offsets", zeros, stored, zero_dtype)
    if codes.shape != (outputs, inputs):
        raise ConfigError(f"codes are {tuple(codes.shape)}, the layer is {outputs}×{inputs}", code=CODE)
    for name, tensor, shape, dtype in wanted:
        if tensor.dtype is not dtype or not tensor.is_cpu or tensor.shape != shape:
            raise unfit(name, tensor, shape, dtype)
    codes, scales, *rest = (contiguous(name, tensor) for name, tensor, _, _ in wanted)
    zeros = rest[0] if rest else None
    if blocks is None:
        blocks = empty_packed(plan.shape)
    native().integer_pack(
        blocks_address(blocks, plan.shape, plan.size),
        outputs,
        *plan.arguments,
        checked_address("codes", codes, (outputs, inputs), torch.uint8),
        checked_address("scales", scales, stored, kind.scales),
        0 if zeros is None else checked_address("zeros or offsets", zeros, stored, zero_dtype),
        inputs,
        plan.stored_group,
        torch.get_num_threads(),
    )
    return blocks


def unpack_blocks(
    blocks: Tensor, scale_dtype: torch.dtype, symmetric: bool, problem: LinearProblem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `pack_blocks` was given: codes, scales, and zeros or offsets (None for a symmetric weight)."""
    plan, outputs, inputs = blocks_of(problem), problem.out_features, problem.in_features
    stored = (outputs, -(-inputs // plan.stored_group))
    codes = blocks.new_empty((outputs, inputs))
    scales = blocks.new_empty(stored, dtype=scale_dtype)
    zeros = None
    if not symmetric:
        zeros = blocks.new_empty(stored, dtype=torch.float32 if plan.zeros == ZERO_OFFSETS else torch.uint8)
    if not blocks.is_meta:
        native().integer_unpack(
            blocks_address(blocks, plan.shape, plan.size),
            outputs,
            *plan.arguments,
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            inputs,
            plan.stored_group,
            torch.get_num_threads(),
        )
    return codes, scales, zeros
