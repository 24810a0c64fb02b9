"""8-bit weights and 8-bit activations (W8A8), both with scales of a tensor, a channel, a token, a block or a group.

One kernel quantises activations, to the codes that `activations.quantise_activations` gives. From `TORCH_TOKENS` rows
on, torch multiplies fp8 where it takes such scales (`scaled_mm.py`).
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.canonical import (
    E4M3_MAX,
    SYMMETRIC_ACTIVATIONS,
    TENSOR,
    Activations,
    CanonicalWeight,
    Fp8Type,
    Fp8Weight,
    IntType,
    IntWeight,
)
from pymllm.kernels.hardware import Device, probe_device
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.quantised_rows import QuantisedRows, RowCodes
from pymllm.kernels.registry import Packed
from pymllm.kernels.scaled_mm import SIDE, Scaling, empty_codes, empty_scales, scaled_mm, why_not_scaled_mm
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.eight_bit_kernels import multiply_scaled, quantise_rows
from pymllm.kernels.triton.launch import interpreting
from pymllm.kernels.triton.linear_cases import EVEN, ODD, linear_cases
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import Tile, architecture_of, bucket, divide, next_power, tuned
from pymllm.kernels.triton.weight_only import WHOLE
from pymllm.kernels.triton.weight_only_kernels import add_splits

FAMILY = "eight_bit"
LONGEST_ROW = 1 << 15  # inputs that one block quantises at once
TORCH_TOKENS = 128
ONE_SCALE = ("static", "tensor")  # activations of which all rows share a scale


@dataclass(frozen=True)
class Groups:
    """The numbers of elements that share a scale.

    integer: int8, else fp8.  x_inputs: inputs of a row of activations.  inputs, outputs: of the weight.
    WHOLE: all of that axis.
    """

    integer: bool
    x_inputs: int
    inputs: int
    outputs: int

    def depth(self) -> int | None:
        """Return the inputs of one step, within one group of x and one of the weight, or None if no step is."""
        side = math.gcd(self.x_inputs, self.inputs)
        return next((depth for depth in (128, 64, 32) if side % depth == 0), None)

    @property
    def whole(self) -> bool:
        """Tell whether a row of activations, and one of the weight, has one scale."""
        return self.x_inputs == WHOLE and self.inputs == WHOLE

    def scaling(self, one_scale: bool) -> Scaling | None:
        """Return how torch calls such scales, or None if it takes none like them.

        one_scale: all rows of activations share one.
        """
        if self.integer:
            return None
        if self.whole and self.outputs == WHOLE and one_scale:
            return "tensor"
        if self.whole and self.outputs in (1, WHOLE):
            return "row"
        return "block" if self.x_inputs == self.inputs == self.outputs == SIDE else None


class EightBit:
    """The base of the fp8 kernel and the int8 kernel."""

    device_type = "cuda"  # the only one it runs on
    name: str
    layout: str
    element: str
    error: float  # of rounding activations, relative to their size

    def groups(self, problem: LinearProblem) -> Groups:
        raise NotImplementedError

    def scales(self, packed: Packed, problem: LinearProblem) -> Tensor:
        """Return the weight's scales, [I/G, O/G'], in any order."""
        return packed["scales"]

    def _why_not(self, problem: LinearProblem, activations: Activations) -> str | None:
        if activations not in SYMMETRIC_ACTIVATIONS:
            return f"quantises activations to {self.element}, the checkpoint asks for {activations}"
        if problem.compute == "exact":
            return "quantises activations, which compute=exact forbids"
        if problem.dtype not in FLOATS:
            return f"quantises float16 or bfloat16 activations, not {problem.dtype}"
        if problem.in_features > LONGEST_ROW:
            return f"quantises rows of up to {LONGEST_ROW} inputs, the layer has {problem.in_features}"
        if self.groups(problem).depth() is None:
            return f"takes groups of multiples of 32 inputs, the weight is {problem.weight}"
        return why_not_device(problem.device)

    def numerics(self, problem: LinearProblem) -> str:
        kind = problem.weight
        assert isinstance(kind, (Fp8Type, IntType))
        said = f"inputs rounded to {self.element} ({kind.activations}), sums of every 128 in float32"
        scaling = self.groups(problem).scaling(kind.activations in ONE_SCALE)
        shape = problem.out_features, problem.in_features
        if scaling and why_not_scaled_mm(scaling, problem.device, *shape, problem.dtype) is None:
            said += f"; from {TORCH_TOKENS} rows on torch's _scaled_mm, unless it refuses"
        return said

    def tolerance(self, problem: LinearProblem) -> float:
        return TOLERANCES[problem.dtype] + self.error

    def input_codes(self, problem: LinearProblem) -> RowCodes | None:
        """Return how `run` takes x already quantised, or None where it does not.

        It does not where only this kernel knows the scale, or where all rows share one.
        """
        kind, groups = problem.weight, self.groups(problem)
        assert isinstance(kind, (Fp8Type, IntType))
        if kind.activations not in ("token", "group"):
            return None
        return RowCodes(groups.integer, 0 if groups.x_inputs == WHOLE else groups.x_inputs)

    def run(
        self, packed: Packed, problem: LinearProblem, x: Tensor | QuantisedRows, bias: Tensor | None
    ) -> Tensor:
        """Multiply x by the weight.

        x: [*, I] in the problem's dtype, or quantised as `input_codes` says.  Returns [*, O].
        """
        groups = self.groups(problem)
        kind = problem.weight
        assert isinstance(kind, (Fp8Type, IntType))
        weight, scales, zeros = packed["weight"], self.scales(packed, problem), packed.get("zeros")
        sides, device = (groups.x_inputs, groups.inputs, groups.outputs), problem.device.spec
        if isinstance(x, QuantisedRows):
            return multiply_eight_bit(x.codes, x.scales, weight, scales, zeros, bias, x.dtype, *sides, device)
        static = packed.get("input_scales")
        return eight_bit_linear(x, weight, scales, zeros, static, bias, kind.activations, *sides, device)


class TritonFp8Activations(EightBit):
    """Products of fp8 by fp8, on matrix units that multiply float8_e4m3fn."""

    name = "triton_fp8_w8a8"
    layout = "fp8, scales of blocks by output, of rows in a row"
    element, error = "fp8", 4e-2

    def groups(self, problem: LinearProblem) -> Groups:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        side = kind.block[1] or WHOLE
        return Groups(False, side if kind.activations == "group" else WHOLE, side, kind.block[0] or WHOLE)

    def why_not(self, problem: LinearProblem) -> str | None:
        kind, architecture = problem.weight, problem.device.architecture
        if not isinstance(kind, Fp8Type):
            return f"multiplies fp8 only, the weight is {kind}"
        if architecture is not None and not architecture.fp8:
            return f"{problem.device.name} does not multiply float8_e4m3fn"
        return self._why_not(problem, kind.activations)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, Fp8Weight)
        static = {} if weight.input_scales is None else {"input_scales": weight.input_scales}
        scales = weight.scales
        if weight.block == TENSOR and weight.activations == "token":
            scales = scales.expand(weight.shape[0], 1)  # torch wants one for each row, if x has that
        if self.groups(problem).inputs == WHOLE:
            scales = scales.t()
        return {"weight": weight.weight, "scales": scales.contiguous(), **static}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        scales = self.scales(packed, problem).t().contiguous()
        if kind.block == TENSOR:
            scales = packed["scales"].flatten()[:1].view(1, 1)
        return Fp8Weight(packed["weight"], scales, kind.block, kind.activations, packed.get("input_scales"))

    def scales(self, packed: Packed, problem: LinearProblem) -> Tensor:
        # Those of blocks lie as in checkpoints, which is as torch takes them.
        return packed["scales"] if self.groups(problem).inputs == WHOLE else packed["scales"].t()

    def cases(self, device: Device) -> Iterator[Case]:
        kinds: tuple[tuple[int, int, tuple[int, int], Activations], ...] = (
            (*EVEN, (128, 128), "group"),
            (*EVEN, (1, 0), "token"),
            (*EVEN, (0, 0), "static"),
            (*ODD, (128, 128), "group"),
        )
        weights = [
            Fp8Weight(
                torch.empty((out_features, in_features), dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(
                    (
                        divide(out_features, block[0] or out_features),
                        divide(in_features, block[1] or in_features),
                    ),
                    device="meta",
                ),
                block,
                activations,
                torch.empty(1, device="meta") if activations == "static" else None,
            )
            for out_features, in_features, block, activations in kinds
        ]
        return linear_cases(self, device, weights)


class TritonInt8Activations(EightBit):
    """Products of int8 by int8, summed in int32 within a group: exact but for the rounding of activations."""

    name = "triton_int8_w8a8"
    layout = "int8 less 128, scales by input group"
    element, error = "int8", 2e-2

    def groups(self, problem: LinearProblem) -> Groups:
        kind = problem.weight
        assert isinstance(kind, IntType)
        side = WHOLE if kind.group_size >= problem.in_features else kind.group_size
        return Groups(True, side if kind.activations == "group" else WHOLE, side, 1)

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits != 8 or not kind.plain:
            return f"multiplies 8-bit integers with integer zero points in order, the weight is {kind}"
        return self._why_not(problem, kind.activations)

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, IntWeight)
        packed = {
            "weight": (weight.codes ^ 128).view(torch.int8),
            "scales": weight.scales.t().contiguous(),
        }
        if weight.zeros is not None:
            packed["zeros"] = weight.zeros.t().contiguous()
        if weight.input_scales is not None:
            packed["input_scales"] = weight.input_scales
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        zeros = packed.get("zeros")
        return IntWeight(
            packed["weight"].view(torch.uint8) ^ 128,
            packed["scales"].t().contiguous(),
            None if zeros is None else zeros.t().contiguous(),
            8,
            kind.group_size,
            activations=kind.activations,
            input_scales=packed.get("input_scales"),
        )

    def cases(self, device: Device) -> Iterator[Case]:
        weights = []
        for out_features, in_features, group, symmetric in ((*EVEN, 14336, True), (*ODD, 960, False)):
            codes = torch.empty((out_features, in_features), dtype=torch.uint8, device="meta")
            scales = torch.empty((out_features, in_features // group), device="meta")
            zeros = None if symmetric else scales.to(torch.uint8)
            weights.append(IntWeight(codes, scales, zeros, 8, group, activations="token"))
        return linear_cases(self, device, weights)


@operator(
    "eight_bit_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? input_scales, Tensor? bias, "
    "str activations, int x_inputs, int inputs, int outputs, str device) -> Tensor",
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
def eight_bit_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    input_scales: Tensor | None,
    bias: Tensor | None,
    activations: str,
    x_inputs: int,
    inputs: int,
    outputs: int,
    device: str,
) -> Tensor:
    """Quantise x, and multiply it by the weight.

    x: [*, I] floats.  weight: [O, I] fp8 or int8.  x_inputs, inputs, outputs: as in `Groups`.  Returns [*, O].
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    groups = Groups(weight.dtype is torch.int8, x_inputs, inputs, outputs)
    codes, x_scales = quantise(rows, groups, activations, input_scales)
    one_scale = activations in ONE_SCALE
    y = _multiply_codes(
        codes, x_scales, weight, scales, zeros, bias, x.dtype, groups, one_scale, probe_device(device)
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@operator(
    "multiply_eight_bit(Tensor codes, Tensor x_scales, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "ScalarType dtype, int x_inputs, int inputs, int outputs, str device) -> Tensor",
    lambda codes, x_scales, weight, scales, zeros, bias, dtype, *rest: codes.new_empty(
        (*codes.shape[:-1], weight.shape[0]), dtype=dtype
    ),
)
def multiply_eight_bit(
    codes: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    x_inputs: int,
    inputs: int,
    outputs: int,
    device: str,
) -> Tensor:
    """Multiply quantised activations by the weight.

    codes: [*, I] fp8 or int8, as the weight's.  x_scales: [rows, I / x_inputs].  Returns [*, O] in dtype.
    """
    groups = Groups(weight.dtype is torch.int8, x_inputs, inputs, outputs)
    rows = codes.reshape(-1, codes.shape[-1])
    y = _multiply_codes(
        rows, x_scales, weight, scales, zeros, bias, dtype, groups, False, probe_device(device)
    )
    return y.view(*codes.shape[:-1], weight.shape[0])


def _multiply_codes(
    codes: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    groups: Groups,
    one_scale: bool,
    device: Device,
) -> Tensor:
    """Multiply codes [T, I] by the weight, by torch where it takes the product.  one_scale: as in `Groups.scaling`."""
    tokens, scaling = codes.shape[0], groups.scaling(one_scale)
    if scaling is not None and tokens >= TORCH_TOKENS and _on_gpu(codes):
        y = scaled_mm(codes, x_scales, weight, scales, bias, dtype, scaling, device)
        if y is not None:
            return y
    y = codes.new_empty((tokens, weight.shape[0]), dtype=dtype)
    if tokens:
        tile = _choose_tile(device, tokens, weight, groups)
        _multiply(codes.contiguous(), x_scales, weight, scales, zeros, bias, y, groups, tile)
    return y


def _on_gpu(codes: Tensor) -> bool:
    return codes.is_cuda


def quantise(
    x: Tensor, groups: Groups, activations: str, input_scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantise rows.  x: [T, I] floats.

    Returns codes [T, I], and float32 scales [T, I / x_inputs], those of a group side by side.
    """
    tokens, in_features = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    largest, low = (127.5, -128.0) if groups.integer else (E4M3_MAX, -E4M3_MAX)
    static = None
    if activations == "static":
        assert input_scales is not None
        static = input_scales.max()
    elif activations == "tensor":
        static = x.abs().amax() / largest
    side = min(groups.x_inputs, in_features)
    count = divide(in_features, side)
    codes = empty_codes(x, (tokens, in_features), torch.int8 if groups.integer else torch.uint8)
    scales = empty_scales(x, tokens, count)
    hardware = not interpreting()
    block = next_power(side)
    quantise_rows.launch(
        (tokens, count),
        x,
        static,
        codes if groups.integer or not hardware else codes.view(torch.float8_e4m3fn),
        scales,
        in_features,
        x.stride(0),
        scales.stride(1),
        LARGEST=largest,
        SMALLEST=torch.finfo(x.dtype).smallest_normal,
        LOW=low,
        INTEGER=groups.integer,
        HARDWARE=hardware,
        GROUP=groups.x_inputs,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return codes if groups.integer else codes.view(torch.float8_e4m3fn), scales


def _choose_tile(device: Device, tokens: int, weight: Tensor, groups: Groups) -> Tile:
    out_features, in_features = weight.shape
    size, depth = bucket(tokens), groups.depth()
    assert depth is not None
    shape = f"{FAMILY} t{size} o{out_features} i{in_features} d{depth} {'int8' if groups.integer else 'fp8'}"
    return tuned(device, shape) or _default_tile(device, size, out_features, in_features, depth)


@functools.cache
def _default_tile(device: Device, size: int, out_features: int, in_features: int, depth: int) -> Tile:
    shared = architecture_of(device).shared_bytes
    outputs, rows, warps = (64, max(16, size), 4) if size <= 64 else (128, 64, 8)
    blocks = divide(out_features, outputs) * divide(size, rows)
    splits = 1
    while (
        blocks * splits < 2 * device.processors and in_features // (2 * splits) >= 4 * depth and splits < 16
    ):
        splits *= 2
    stages = max(1, min(4, (shared - 2048) // (depth * (outputs + rows))))
    return Tile(outputs, rows, depth, splits, warps, stages)


def _multiply(
    codes: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    groups: Groups,
    tile: Tile,
) -> None:
    tokens, in_features = codes.shape
    out_features = weight.shape[0]
    chunk = divide(divide(in_features, tile.splits), tile.depth) * tile.depth
    splits = divide(in_features, chunk)
    whole = splits == 1
    if x_scales.stride(0) != 1:
        x_scales = x_scales.t().contiguous().t()
    sums = y if whole else y.new_empty((splits, tokens, out_features), dtype=torch.float32)
    multiply_scaled.launch(
        (divide(out_features, tile.outputs), divide(tokens, tile.tokens), splits),
        codes,
        x_scales,
        weight,
        scales,
        zeros,
        bias if whole else None,
        sums,
        tokens,
        out_features,
        in_features,
        chunk,
        x_scales.stride(1),
        *scales.stride(),
        X_GROUP=groups.x_inputs,
        GROUP_IN=groups.inputs,
        GROUP_OUT=groups.outputs,
        INTEGER=groups.integer,
        WHOLE=groups.whole,
        EVEN=in_features % tile.depth == 0,
        BLOCK_O=tile.outputs,
        BLOCK_T=tile.tokens,
        BLOCK_I=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not whole:
        grid = (divide(out_features, 256), tokens)
        add_splits.launch(
            grid, sums, None, bias, y, tokens, out_features, SPLITS=splits, BLOCK=256, num_warps=2
        )
