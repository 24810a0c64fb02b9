"""RMSNorm, gated activations and rotary positions on the GPU, each in one pass over memory.

Roundings are those of `TorchElementwise`: results differ from its by float32 rounding before the last step.
"""

# T tokens, H hidden size, N half the gated size, D head size, R rotary size

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.hardware import Device
from pymllm.kernels.quantised_rows import QuantisedRows, RowCodes
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.elementwise_kernels import gate_rows, norm_rows, rotate_heads
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.quantised_elementwise import gate_quantised, norm_quantised, why_not_codes
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import divide, next_power

LONGEST_ROW = 1 << 15
MANY_TOKENS = 64  # fill a GPU with blocks of several warps


class TritonElementwise:
    """Norms, gated activations and rotary positions, a row or a part of one in each block."""

    name = "triton"
    device_type = "cuda"  # the only one it runs on
    rotates_in_store = True  # `TritonKVStore.rotate_and_store` gives the same bits

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        if problem.dtype not in (*FLOATS, torch.float32):
            return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
        return why_not_device(problem.device)

    def why_not_codes(self, codes: RowCodes, size: int) -> str | None:
        """Return why results of rows of `size` cannot be such codes, or None."""
        return why_not_codes(codes, size)

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        codes: RowCodes | None = None,
    ) -> Tensor | QuantisedRows | tuple[Tensor | QuantisedRows, Tensor]:
        """Normalise as `TorchElementwise.rms_norm` does.  Where codes are asked for, the normed x is codes."""
        normed: Tensor | QuantisedRows
        if codes is None:
            normed, summed = rms_norm(x, weight, eps, residual)
        else:
            normed, summed = norm_quantised(x, weight, eps, residual, codes)
        return normed if residual is None else (normed, summed)

    def silu_and_mul(self, x: Tensor, codes: RowCodes | None = None) -> Tensor | QuantisedRows:
        """Multiply as `TorchElementwise.silu_and_mul` does.  Where codes are asked for, the result is codes."""
        return gate_and_mul(x, "silu") if codes is None else gate_quantised(x, "silu", codes)

    def gelu_and_mul(self, x: Tensor, codes: RowCodes | None = None) -> Tensor | QuantisedRows:
        """Multiply as `TorchElementwise.gelu_and_mul` does.  Where codes are asked for, the result is codes."""
        return gate_and_mul(x, "gelu") if codes is None else gate_quantised(x, "gelu", codes)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate as `TorchElementwise.rotate` does.  x may be a slice of a fused projection."""
        return rotate(x, cos, sin)

    def cases(self, device: Device) -> Iterator[Case]:
        for hidden, tokens, dtype in (
            (4096, 1, torch.bfloat16),
            (8192, 512, torch.bfloat16),
            (1000, 3, torch.float16),
        ):
            x = torch.empty((tokens, hidden), dtype=dtype, device="meta")
            q, table = x.view(tokens, -1, hidden // 8), torch.empty((tokens, hidden // 16), device="meta")
            title = f"{str(dtype).removeprefix('torch.')}, {tokens} x {hidden}"
            yield Case(f"norm, {title}", lambda x=x: self.rms_norm(x, x[0], 1e-6))  # type: ignore[misc]
            yield Case(f"norm of a sum, {title}", lambda x=x: self.rms_norm(x, x[0], 1e-6, x))  # type: ignore[misc]
            yield Case(f"silu, {title}", lambda x=x: self.silu_and_mul(x))  # type: ignore[misc]
            yield Case(f"gelu, {title}", lambda x=x: self.gelu_and_mul(x))  # type: ignore[misc]
            yield Case(f"rotate, {title}", lambda q=q, t=table: self.rotate(q, t, t))  # type: ignore[misc]
        for hidden, tokens in ((4096, 1), (14336, 512)):
            x = torch.empty((tokens, hidden), dtype=torch.bfloat16, device="meta")
            pair = torch.empty((tokens, 2 * hidden), dtype=torch.bfloat16, device="meta")
            for codes in codes_for(device):
                title = f"{codes}, {tokens} x {hidden}"
                yield Case(
                    f"norm of a sum to {title}", partial(self.rms_norm, x, x[0], 1e-6, x, codes), tokens == 1
                )
                yield Case(f"silu to {title}", partial(self.silu_and_mul, pair, codes), tokens == 1)


def codes_for(device: Device) -> Iterator[RowCodes]:
    """Yield the codes that linear kernels of the device ask for."""
    yield RowCodes(True)
    if device.architecture is not None and device.architecture.fp8:
        yield RowCodes(False)
        yield RowCodes(False, 128)


@operator(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual) -> (Tensor, Tensor)",
    lambda x, weight, eps, residual: (
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(x),
    ),
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the residual to x, and normalise the sum.

    x, residual: [*, H].  Returns the normed sum and the sum; the latter is empty without a residual.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else torch.empty_like(y)
    if rows.shape[0] and size:
        others = None if residual is None else residual.reshape(-1, size)
        block = min(next_power(size), LONGEST_ROW)
        norm_rows.launch(
            (rows.shape[0],),
            rows,
            others if others is None or others.stride(-1) == 1 else others.contiguous(),
            weight,
            y,
            None if residual is None else summed,
            size,
            rows.stride(0),
            0 if others is None else others.stride(0),
            eps,
            FLOAT_WEIGHT=weight is not None and weight.dtype is torch.float32,
            WHOLE=size <= block,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )
    return y, summed


@operator(
    "gate_and_mul(Tensor x, str activation) -> Tensor",
    lambda x, activation: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
def gate_and_mul(x: Tensor, activation: str) -> Tensor:
    """Multiply activation(gate) by up.

    x: [*, 2N], gate first.  activation: "silu", or "gelu" in the tanh approximation.  Returns [*, N].
    """
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = x.new_empty((*x.shape[:-1], size))
    if y.numel():
        block = min(next_power(size), 1024)
        grid = (rows.shape[0], divide(size, block))
        gate_rows.launch(grid, rows, y, size, rows.stride(0), ACTIVATION=activation, BLOCK=block, num_warps=4)
    return y


@operator("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", lambda x, cos, sin: x.new_empty(x.shape))
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R elements of each head, and copy the rest.

    x: [T, heads, D].  cos, sin: [T, R/2] float32.  Returns [T, heads, D].
    """
    tokens, heads, size = x.shape
    y = x.new_empty(x.shape)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        half = cos.shape[-1]
        block = next_power(max(half, size - 2 * half))
        together, warps = heads_of_a_block(tokens, heads, 2 * block)
        rotate_heads.launch(
            (tokens, divide(heads, together)),
            x,
            cos.contiguous(),
            sin.contiguous(),
            y,
            x.stride(0),
            x.stride(1),
            HEADS=heads,
            SIZE=size,
            HALF=half,
            BLOCK_H=together,
            BLOCK=block,
            num_warps=warps,
        )
    return y


def heads_of_a_block(tokens: int, heads: int, size: int) -> tuple[int, int]:
    """Return how many heads of `size` a block takes, and its warps: 16 elements a thread, one warp for few tokens."""
    warps = 1 if tokens < MANY_TOKENS else 4
    return max(1, min(next_power(heads), 512 * warps // size)), warps
