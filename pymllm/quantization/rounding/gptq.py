"""GPTQ: weights are rounded one input at a time, and the inputs not rounded yet make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization", https://arxiv.org/abs/2210.17323.
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import IntWeight

# This share of the Hessian's mean diagonal is added; ten and a hundred times that where it is not positive definite.
DAMPING = 0.01


def round_with_hessian(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "",
) -> IntWeight:
    """Round a weight [O, I] float32 so that its outputs on the calibration inputs change least.

    gram: [I, I], the inputs' products with one another, summed over all rows (half the Hessian).
    act_order: inputs that matter most are rounded first; groups stay where they are, so that nothing is reordered.
    Without it a group's scale is chosen when its first input's turn comes, from weights that make up for the errors so
    far.
    scale_dtype: what scales are rounded to before codes are chosen.  name: the layer's, for messages.
    ConfigError if `gram` is not finite, or its Hessian cannot be inverted.
    """
    out_features, in_features = weight.shape
    order = torch.arange(in_features)
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(gram[order][:, order] if act_order else gram, name)
    left = weight[:, order].clone()
    grid = _fitted(weight, bits, group_size, symmetric, scale_dtype) if act_order else None
    scales = torch.empty((out_features, in_features // group_size), dtype=scale_dtype)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if grid is not None:
        scales, zeros = grid
    codes = torch.empty_like(left)
    span = group_size if not act_order and 32 <= group_size <= 512 else 128
    for start in range(0, in_features, span):
        stop = min(start + span, in_features)
        block = left[:, start:stop].clone()
        errors = torch.empty_like(block)
        for column in range(stop - start):
            group = int(order[start + column]) // group_size
            if grid is None and (start + column) % group_size == 0:
                ahead = torch.cat((block[:, column:], left[:, stop : start + column + group_size]), dim=1)
                fitted = _fitted(ahead[:, :group_size], bits, group_size, symmetric, scale_dtype)
                scales[:, group], zeros[:, group] = fitted[0][:, 0], fitted[1][:, 0]
            scale, zero = scales[:, group].float(), zeros[:, group].float()
            value = block[:, column]
            code = ((value / scale).round() + zero).clamp(0, 2**bits - 1)
            codes[:, start + column] = code
            error = (value - (code - zero) * scale) / upper[start + column, start + column]
            block[:, column:] -= torch.outer(error, upper[start + column, start + column : stop])
            errors[:, column] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    stored = torch.empty(weight.shape, dtype=torch.uint8)
    stored[:, order] = codes.to(torch.uint8)
    return IntWeight(stored, scales, None if symmetric else zeros.to(torch.uint8), bits, group_size)


def _fitted(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fit scales and zero points [O, I/G] as rounding to nearest does, and return both in `dtype`."""
    made = IntWeight.from_float(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    middle = torch.full_like(made.scales, 2 ** (bits - 1))
    return made.scales.to(dtype), (middle if made.zeros is None else made.zeros).to(dtype)


def _inverse_factor(gram: Tensor, name: str) -> Tensor:
    """Compute the upper Cholesky factor of the damped Hessian's inverse, [I, I]."""
    if not bool(torch.isfinite(gram).all()):
        raise ConfigError(
            "some calibration inputs of this layer are not finite numbers",
            code="calibration-values",
            tensor=name or None,
            fix="Check the model on this text: `pymllm verify MODEL --text FILE`.",
        )
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    unused = diagonal == 0  # an input that is always zero is rounded by itself
    diagonal[unused] = 1
    mean = float(gram.diagonal().mean()) or 1.0
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian + torch.eye(gram.shape[0]) * damping * mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return factor
    raise ConfigError(
        "the Hessian of this layer's calibration inputs cannot be inverted",
        code="calibration-values",
        tensor=name or None,
        fix="Calibrate on more, or more varied, text.",
    )
