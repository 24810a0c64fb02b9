"""RMSNorm, silu·mul and rotary on the CPU in one pass each, in C++ (`kernels/elementwise.h`).

Results equal those of `TorchElementwise` up to float32 rounding before the last step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.native.addresses import CODE, address, contiguous, strided_rows, unfit
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
        float32 = weight is not None and weight.dtype is not x.dtype and weight.dtype is torch.float32
        if float32 and x.is_floating_point():
            for name, tensor, wanted in (
                ("the weight", weight, x.shape[-1:]),
                ("the residual", residual, x.shape),
            ):
                if tensor is not None and tensor.shape != wanted:
                    raise unfit(name, tensor, wanted, tensor.dtype)
            return TorchElementwise().rms_norm(x, weight, eps, residual)
        x = _taken("x", x, x)
        shape = x.shape
        size, nbytes = shape[-1], x.nbytes
        y = torch.empty_like(x)
        summed = None
        if weight is not None:
            weight = _taken("the weight", weight, x)
            if weight.shape != (size,):
                raise unfit("the weight", weight, (size,), x.dtype)
        if residual is not None:
            residual = _taken("the residual", residual, x)
            if residual.shape != shape:
                raise unfit("the residual", residual, shape, x.dtype)
            summed = torch.empty_like(x)
        native().rms_norm(
            address("x", x, nbytes),
            0 if residual is None else address("the residual", residual, nbytes),
            0 if weight is None else address("the weight", weight, size * x.itemsize),
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
        x = _taken("x", x, x)
        shape = x.shape
        if shape[-1] % 2:
            raise ConfigError(
                f"the last dimension of x holds gate and up and must be even, not {shape[-1]}", code=CODE
            )
        size = shape[-1] // 2
        y = x.new_empty(*shape[:-1], size)
        native().silu_and_mul(
            address("x", x, x.nbytes),
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
        if x.ndim != 3 or x.dtype not in FLOAT_TYPES or not x.is_cpu or x.is_neg():
            raise unfit("x", x, ("T", "heads", "size"), "floats")
        tokens, heads, head_size = x.shape
        rotary_size = 2 * cos.shape[-1] if cos.ndim else 0
        wanted = (tokens, rotary_size // 2)
        if rotary_size > head_size or cos.shape != wanted or sin.shape != wanted:
            shapes = f"{list(cos.shape)} and {list(sin.shape)}"
            raise ConfigError(
                f"cos and sin must both be [{tokens}, up to {head_size // 2}], not {shapes}", code=CODE
            )
        angles = []
        for name, tensor in (("cos", cos), ("sin", sin)):
            if tensor.dtype is not torch.float32 or not tensor.is_cpu:
                raise unfit(name, tensor, wanted, torch.float32)
            angles.append(contiguous(name, tensor))
        cos, sin = angles
        size = tokens * rotary_size // 2 * 4
        x, at, stride = strided_rows("x", x)
        y = x.new_empty(tokens, heads, head_size)
        native().rotate(
            at,
            y.data_ptr(),
            address("cos", cos, size),
            address("sin", sin, size),
            FLOAT_TYPES[x.dtype],
            tokens,
            heads,
            head_size,
            rotary_size,
            stride,
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return y


def _taken(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor contiguous.  Raises ConfigError unless it is floats of the dtype of x, on the CPU."""
    dtype = tensor.dtype
    if dtype is not x.dtype or dtype not in FLOAT_TYPES or not tensor.is_cpu or not tensor.ndim:
        wanted = x.dtype if x.dtype in FLOAT_TYPES else "floats"
        raise unfit(name, tensor, ("*", "size"), wanted)
    return contiguous(name, tensor)
