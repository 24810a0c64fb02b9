"""RMSNorm, silu·mul and rotary on the CPU in one pass each, in C++ (`kernels/elementwise.h`).

Results equal those of `torch_elementwise` up to float32 rounding before the last step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import FLOAT_TYPES


class NativeElementwise:
    """One pass over memory for each.  isa: a kernel path, for tests; None: the one that runs here."""

    name = "native"
    device_type = "cpu"  # the only one it runs on

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        if problem.device.type != "cpu":
            return "runs on the CPU only"
        if problem.dtype not in FLOAT_TYPES:
            return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
        return native_missing_reason()

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `TorchElementwise.rms_norm`, which also runs a float32 weight over activations of another dtype."""
        if weight is not None and weight.dtype is not x.dtype and weight.dtype is torch.float32:
            return TorchElementwise().rms_norm(x, weight, eps, residual)
        _check(x, *(t for t in (weight, residual) if t is not None))
        size = x.shape[-1]
        if weight is not None and weight.shape != (size,):
            raise ValueError(f"the weight must be [{size}], not {list(weight.shape)}")
        x = x.contiguous()
        weight = None if weight is None else weight.contiguous()
        y = torch.empty_like(x)
        summed = None
        if residual is not None:
            if residual.shape != x.shape:
                raise ValueError(f"the residual must be {list(x.shape)}, not {list(residual.shape)}")
            residual, summed = residual.contiguous(), torch.empty_like(x)
        native().rms_norm(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            y.data_ptr(),
            0 if summed is None else summed.data_ptr(),
            FLOAT_TYPES[x.dtype],
            x.numel() // size if size else 0,
            size,
            eps,
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return y if summed is None else (y, summed)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """As `TorchElementwise.silu_and_mul`."""
        _check(x)
        if x.shape[-1] % 2:
            raise ValueError(f"the last dimension holds gate and up and must be even, not {x.shape[-1]}")
        x = x.contiguous()
        size = x.shape[-1] // 2
        y = x.new_empty((*x.shape[:-1], size))
        native().silu_and_mul(
            x.data_ptr(),
            y.data_ptr(),
            FLOAT_TYPES[x.dtype],
            y.numel() // size if size else 0,
            size,
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return y

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        """As `TorchElementwise.gelu_and_mul`, which runs it: two torch operations."""
        return TorchElementwise().gelu_and_mul(x)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `TorchElementwise.rotate`; x may be a slice of a fused projection, with its tokens further apart."""
        _check(x)
        tokens, heads, head_size = x.shape
        rotary_size = 2 * cos.shape[-1]
        if cos.shape != sin.shape or cos.shape[0] != tokens or rotary_size > head_size:
            raise ValueError(f"cos and sin must be [{tokens}, up to {head_size // 2}], not {list(cos.shape)}")
        if {cos.dtype, sin.dtype} != {torch.float32} or not (cos.is_cpu and sin.is_cpu):
            raise ValueError("cos and sin must be float32 on the CPU")
        cos, sin = cos.contiguous(), sin.contiguous()
        if x.stride(2) != 1 or x.stride(1) != head_size or x.stride(0) < 0:
            x = x.contiguous()
        y = x.new_empty(x.shape)
        native().rotate(
            x.data_ptr(),
            y.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            FLOAT_TYPES[x.dtype],
            tokens,
            heads,
            head_size,
            rotary_size,
            x.stride(0),
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return y


def _check(x: Tensor, *others: Tensor) -> None:
    """The native code reads addresses: what they point to must be floats of one dtype, in this memory."""
    for tensor in (x, *others):
        if tensor.dtype is not x.dtype or tensor.dtype not in FLOAT_TYPES or not tensor.is_cpu:
            raise ValueError(f"expected CPU floats of one dtype, not {tensor.dtype} on {tensor.device}")
