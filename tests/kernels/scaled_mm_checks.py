"""A stand-in for `torch._scaled_mm` on a GPU: its checks, and the product in float64.

The checks are those of torch's meta function (which is called), of aten/src/ATen/native/cuda/ScaledBlas.cpp, and of the
cuBLAS manual, which torch leaves to cuBLAS or to nobody.
"""

# T tokens, O out_features, I in_features

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class ScaledMM:
    """Multiplies as torch does, and keeps the kind of scaling of every call.  error: raised in place of multiplying."""

    def __init__(self, error=None):
        self.kinds, self.error = [], error

    def __call__(self, a, b, *, scale_a, scale_b, bias=None, out_dtype=None):
        checked_by_meta(a, b, scale_a, scale_b, out_dtype)
        kind = kind_of(a, b, scale_a, scale_b)
        check_operands(kind, a, b, scale_a, scale_b, bias, out_dtype)
        self.kinds.append(kind)
        if self.error is not None:
            raise self.error
        left = a.double() * spread(scale_a, a)
        right = b.double() * spread(scale_b, b)
        y = left @ right + (0 if bias is None else bias.double())
        return y.to(out_dtype)


def checked_by_meta(a, b, scale_a, scale_b, out_dtype):
    """Call torch's meta function, with tensors that say that they are on a GPU."""
    operands = [(t.shape, t.stride(), t.dtype) for t in (a, b, scale_a, scale_b)]
    with FakeTensorMode():
        fakes = [torch.empty_strided(*how[:2], dtype=how[2], device="cuda") for how in operands]
        y = torch.ops.aten._scaled_mm(*fakes, out_dtype=out_dtype)
    assert y.shape == (a.shape[0], b.shape[1]) and y.dtype is out_dtype


def kind_of(a, b, scale_a, scale_b):
    """Find the kind of scaling that torch sees in the scales.  Raises RuntimeError where it sees none."""
    for name, left, right in (
        ("tensor", _of_tensor, _of_tensor),
        ("row", _of_rows, _of_rows),
        ("block by group", _of_blocks, _of_groups),
        ("block", _of_groups, _of_blocks),
        ("group by group", _of_groups, _of_groups),
    ):
        if left(a, scale_a) and right(b.t(), scale_b.t()):
            return name
    raise RuntimeError("Invalid scaling configuration.")


def check_operands(kind, a, b, scale_a, scale_b, bias, out_dtype):
    (tokens, in_features), out_features = a.shape, b.shape[1]
    for tensor in (a, b, scale_a, scale_b, *(() if bias is None else (bias,))):
        assert tensor.data_ptr() % 16 == 0
    assert in_features % 16 == 0 and out_features % 16 == 0 and tokens > 0
    assert a.dtype in FLOAT8 and b.dtype in FLOAT8 and out_dtype in (torch.bfloat16, torch.float16)
    assert bias is None or (
        bias.dtype is out_dtype and bias.shape == (out_features,) and bias.is_contiguous()
    )
    if kind == "row":  # torch's `_scaled_rowwise_rowwise`, which multiplies where cuBLAS does not
        assert scale_a.stride() == (1, 1) and scale_b.stride(1) == 1
    elif kind != "tensor":
        assert tokens % 4 == 0 and -(-in_features // 128) % 4 == 0


def spread(scale, matrix):
    """Repeat scales along the sides of their blocks."""
    for axis in (0, 1):
        side = -(-matrix.shape[axis] // scale.shape[axis])
        if scale.shape[axis] not in (1, matrix.shape[axis]):
            side = 128
        scale = scale.double().repeat_interleave(side, axis).narrow(axis, 0, matrix.shape[axis])
    return scale


def _of_tensor(matrix, scale):
    return scale.dtype is torch.float32 and scale.numel() == 1


def _of_rows(matrix, scale):
    whole = scale.dim() == 2 and scale.shape == (matrix.shape[0], 1) and scale.is_contiguous()
    return scale.dtype is torch.float32 and whole


def _of_groups(matrix, scale):
    rows, columns = matrix.shape
    return _lies(scale, (rows, -(-columns // 128)), (1, rows))


def _of_blocks(matrix, scale):
    rows, columns = (-(-size // 128) for size in matrix.shape)
    return _lies(scale, (rows, columns), (columns, 1))


def _lies(scale, shape, strides):
    """Tell whether scales have this shape, and these strides where an axis has any."""
    fits = scale.dim() == 2 and scale.shape == shape and scale.dtype is torch.float32
    return fits and all(
        size <= 1 or found == wanted
        for size, found, wanted in zip(shape, scale.stride(), strides, strict=True)
    )
