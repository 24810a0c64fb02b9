"""RMSNorm, silu·mul and rotary on the CPU in one pass each, in C++ (`kernels/elementwise.h`).

Results equal those of `TorchElementwise` up to float32 rounding before the last step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import FLOAT_TYPES, why_not_here


class NativeElementwise:
    """The elementwise kernels, each one pass over memory.  isa: a kernel path, for tests; None: the one in use here."""

    name = "native"
    device_type = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        return why_not_here(problem) or native_missing_reason()

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute what `TorchElementwise.rms_norm` does, which runs a float32 weight over other activations itself."""
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
        """Compute what `TorchElementwise.silu_and_mul` does."""
        _check(x)
        if x.shape[-1] % 2:
            raise ValueError(f"the last dimension of x holds gate and up and must be even, not {x.shape[-1]}")
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
        """Call `TorchElementwise.gelu_and_mul`: it is two torch operations."""
        return TorchElementwise().gelu_and_mul(x)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute what `TorchElementwise.rotate` does; x may be a slice of a fused projection (strided tokens)."""
        _check(x)
        tokens, heads, head_size = x.shape
        rotary_size = 2 * cos.shape[-1]
        if cos.shape != sin.shape or cos.shape[0] != tokens or rotary_size > head_size:
            shapes = f"{list(cos.shape)} and {list(sin.shape)}"
            raise ValueError(f"cos and sin must both be [{tokens}, up to {head_size // 2}], not {shapes}")
        if {cos.dtype, sin.dtype} != {torch.float32} or not (cos.is_cpu and sin.is_cpu):
            raise ValueError(
                f"cos and sin must be float32 on the CPU, not {cos.dtype} on {cos.device} "
                f"and {sin.dtype} on {sin.device}"
            )
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
    """Raise ValueError unless all tensors are CPU floats of one dtype: the native code reads addresses, unchecked."""
    for tensor in (x, *others):
        if tensor.dtype is not x.dtype or tensor.dtype not in FLOAT_TYPES or not tensor.is_cpu:
            raise ValueError(
                f"x, weight and residual must be floats of one dtype on the CPU, not {tensor.dtype} on {tensor.device}"
            )
