"""Native calls that stand for torch's operations on a tape: the same numbers, bit for bit, or no call."""

from __future__ import annotations

import pytest
import torch

from pymllm.engine.tape_calls import call_natively

from ..kernels.integer_cases import needs_native

pytestmark = needs_native
aten = torch.ops.aten
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers of many sizes, zeros of both signs, infinities and NaN."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-6, 5, shape)
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    return x.to(dtype)


def same(func, *args, **kwargs) -> bool:
    """Tell whether the native call gives torch's bits.  AssertionError if there is no such call."""
    expected = func(*args, **kwargs)
    found = torch.empty_strided(expected.shape, expected.stride(), dtype=expected.dtype).fill_(123)
    assert call_natively(func, args, kwargs, found)
    bits = torch.int32 if expected.dtype is torch.float32 else torch.int16
    alike = found.contiguous().view(bits) == expected.contiguous().view(bits)
    return bool((alike | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("func", (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor))
def test_sums_and_products(func, dtype):
    x, y = filled(2, 5, 3, 8, dtype=dtype), filled(2, 5, 3, 8, dtype=dtype)
    assert same(func, x, y)
    assert same(func, x, filled(1, 1, 3, 8, dtype=dtype))  # repeated
    assert same(func, filled(5, 1, 1, dtype=dtype), y)
    assert same(func, x.transpose(1, 2), y.transpose(1, 2))  # strided, and so is the result
    assert same(func, x[..., 4:], y[..., :4])  # slices
    assert same(func, x[0, 0, 0], y[0, 0, 0])
    assert same(func, x, 0.5)


@pytest.mark.parametrize("dtype", TYPES)
def test_copies(dtype):
    x = filled(3, 4, 6, dtype=dtype)
    assert same(aten.neg.default, x[..., 3:])
    assert same(aten.clone.default, x.transpose(0, 1), memory_format=torch.contiguous_format)
    for dim in (0, 1, -1):
        assert same(aten.cat.default, [x, x.neg(), x], dim)
    assert same(aten.cat.default, [x[..., 3:].neg(), x[..., :3]], -1)


def test_a_product_of_many_numbers_by_several_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same(aten.mul.Tensor, filled(300, 1024, dtype=torch.float32), torch.tensor([3.0]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "func, args, kwargs",
    (
        (aten.add.Tensor, (torch.ones(3), torch.ones(3)), {"alpha": 2}),
        (aten.mul.Tensor, (torch.ones(3).bfloat16(), torch.ones(3)), {}),  # of two types
        (aten.mul.Tensor, (torch.ones(3).bfloat16(), 1 / 3), {}),  # torch rounds the product alone
        (aten.mul.Tensor, (torch.ones(3).double(), 2.0), {}),
        (aten.add.Tensor, (torch.ones(3).int(), 1), {}),
        (aten.mul.Tensor, (torch.ones(1, 2, 1, 2, 3), 2.0), {}),  # more dimensions than a call has
        (aten.cat.default, ([torch.ones(2), torch.ones(2).bfloat16()],), {}),
        (aten.silu.default, (torch.ones(3),), {}),
    ),
)
def test_what_a_call_would_not_give_is_left_to_torch(func, args, kwargs):
    result = func(*args, **kwargs)
    assert not call_natively(func, args, kwargs, result)
