"""torch's own int4 matmul for CPUs (`_weight_int4pack_mm_for_cpu`)."""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, IntType, IntWeight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed

GROUP_SIZES = (32, 64, 128, 256)
ROW_TILE = 16  # torch refuses output counts that this does not divide
MIDDLE = 8  # torch's formula is (code - 8) * scale + zero


class TorchInt4Pack:
    """Group-wise int4 by torch's kernel.  Scales and zeros are kept in the activations' dtype, as torch wants them."""

    name = "torch_int4pack"
    device_type = "cpu"  # the only one it runs on
    layout = "torch_int4pack"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, IntType) or kind.bits != 4:
            return f"multiplies 4-bit integers only, the weight is {kind}"
        if not kind.plain:
            return f"takes integer zero points in groups that lie in order, the weight is {kind}"
        if problem.compute == "checkpoint" and kind.activations != "float":
            return "leaves activations in floats, which compute=checkpoint forbids"
        if problem.device.type != "cpu":
            return "runs on the CPU only"
        if kind.group_size not in GROUP_SIZES:
            return f"takes groups of 32, 64, 128 or 256, the weight has {kind.group_size}"
        if problem.out_features % ROW_TILE:
            return f"out_features {problem.out_features} is not a multiple of {ROW_TILE}"
        if problem.compute == "exact" and problem.dtype is not torch.float32:
            return f"rounds scales to {problem.dtype}, which compute=exact forbids"
        return None

    def numerics(self, problem: LinearProblem) -> str:
        if problem.dtype is torch.float32:
            return "weights dequantised exactly, sums in float32"
        return f"scales rounded to {str(problem.dtype).removeprefix('torch.')}, sums in float32"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, IntWeight)
        scales = weight.scales.float()
        zeros = torch.zeros_like(scales) if weight.zeros is None else (MIDDLE - weight.zeros.float()) * scales
        scales_and_zeros = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous().to(problem.dtype)
        packed = {"codes": self._pack_codes(weight.codes), "scales_and_zeros": scales_and_zeros}
        if problem.dtype is not torch.float32 or weight.scales.dtype is not torch.float16:
            # torch's copy of the scales and zeros is rounded: `unpack` needs them as they were.
            packed |= {name: t for name, t in weight.tensors().items() if name != "codes"}
        return packed

    @staticmethod
    def _pack_codes(codes: Tensor) -> Tensor:
        """Pack codes [O, I] into bytes [O, I/2] in torch's order; a few rows at a time, as torch wants int32 codes."""
        out_features, in_features = codes.shape
        packed = torch.empty((out_features, in_features // 2), dtype=torch.uint8, device=codes.device)
        if codes.device.type == "meta":
            return packed
        # torch interleaves 64 rows where it can; whole multiples keep the order of one call.
        step = 64 * max(1, (1 << 20) // (64 * in_features))
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[rows].int(), 2)
        return packed

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, IntType)
        codes = self._unpack_codes(packed["codes"], problem)
        if "scales" in packed:
            zeros = None if kind.symmetric else packed["zeros"]
            return IntWeight(codes, packed["scales"], zeros, 4, kind.group_size, activations=kind.activations)
        scales, offsets = packed["scales_and_zeros"].transpose(0, 1).unbind(-1)
        zeros = None if kind.symmetric else (MIDDLE - offsets / scales).round().to(torch.uint8)
        return IntWeight(codes, scales.half(), zeros, 4, kind.group_size, activations=kind.activations)

    @staticmethod
    def _unpack_codes(packed: Tensor, problem: LinearProblem) -> Tensor:
        """Ask the kernel itself for the codes, [O, I] uint8.

        With scales of 1 and zeros of 8, the product of a unit vector is a column of codes.
        """
        kind = problem.weight
        assert isinstance(kind, IntType)
        groups = problem.in_features // kind.group_size
        identity_scales = torch.ones((groups, problem.out_features, 2))
        identity_scales[..., 1] = MIDDLE
        codes = torch.empty((problem.out_features, problem.in_features), dtype=torch.uint8)
        step = 256
        for start in range(0, problem.in_features, step):
            columns = torch.arange(start, min(start + step, problem.in_features))
            unit = torch.zeros((len(columns), problem.in_features))
            unit[torch.arange(len(columns)), columns] = 1
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                unit, packed, kind.group_size, identity_scales
            )
            codes[:, columns] = product.t().round().to(torch.uint8)
        return codes

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        kind = problem.weight
        assert isinstance(kind, IntType)
        rows = x.reshape(-1, problem.in_features)
        if not rows.shape[0]:
            return x.new_zeros((*x.shape[:-1], problem.out_features))
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), packed["codes"], kind.group_size, packed["scales_and_zeros"]
        ).view(*x.shape[:-1], problem.out_features)
        return result if bias is None else result + bias
