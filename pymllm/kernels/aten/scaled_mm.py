"""torch._scaled_mm: fp8 weights and fp8 activations on the tensor cores of recent GPUs."""

# T tokens, O out_features, I in_features

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX, CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.scaled_mm import scaled_mm, why_not_scaled_mm


class TorchScaledMM:
    """Products of fp8 by fp8 (W8A8), with a scale for each output channel and each token."""

    name = "torch_scaled_mm"
    device_type = "cuda"  # the only one it runs on
    layout = "fp8_channel"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, Fp8Type):
            return f"multiplies fp8 only, the weight is {kind}"
        if problem.device.type != "cuda":
            return "needs a CUDA device"
        if problem.device.capability is None or problem.device.capability < (8, 9):
            return f"needs compute capability 8.9, {problem.device.name} has {problem.device.capability}"
        if kind.block not in ((0, 0), (1, 0)):
            return f"takes one scale a tensor or channel, the weight has {kind}"
        if kind.activations != "token":
            return f"quantises activations per token, the checkpoint wants {kind.activations!r}"
        if problem.compute == "exact":
            return "quantises activations, which compute=exact forbids"
        shape = problem.out_features, problem.in_features
        return why_not_scaled_mm("row", problem.device, *shape, problem.dtype)

    def numerics(self, problem: LinearProblem) -> str:
        return "inputs rounded to fp8 per token, sums on tensor cores"

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        assert isinstance(weight, Fp8Weight)
        scales = weight.scales.expand(weight.shape[0], 1).contiguous()
        return {"weight": weight.weight, "scales": scales}

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        kind = problem.weight
        assert isinstance(kind, Fp8Type)
        scales = packed["scales"] if kind.block == (1, 0) else packed["scales"][:1]
        return Fp8Weight(packed["weight"], scales, kind.block, kind.activations)

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, scales = packed["weight"], packed["scales"].t()
        rows = x.reshape(-1, problem.in_features)
        x_scales = (rows.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=1e-12)
        codes = (rows / x_scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        result = scaled_mm(codes, x_scales, weight, scales, bias, x.dtype, "row", problem.device)
        if result is None:
            # Slower: both sides in bfloat16, which holds every code and any sum.
            sums = (codes.bfloat16() @ weight.bfloat16().t()).float() * x_scales * scales
            result = (sums if bias is None else sums + bias).to(x.dtype)
        return result.view(*x.shape[:-1], problem.out_features)
