"""Attention over caches of 8-bit codes that are read four at a time, against the formula in float64."""

import math

import numpy as np
import pytest
import torch

from pymllm.kernels.attention import KVType
from pymllm.kernels.hardware import ARCHITECTURES, probe_device
from pymllm.kernels.triton.launch import interpreting
from tests.attention.steps import make_case, make_problem

from . import test_attention
from .gpu import UNIT
from .test_attention import GROUPED, check, result_of

FP8, FP8_TOKEN = KVType(torch.float8_e4m3fn, "static"), KVType(torch.float8_e4m3fn, "token")
INT8 = KVType(torch.int8, "token")
LENGTHS = [(length - 1, 1) for length in (1, 15, 16, 17, 63, 64, 65)]


@pytest.mark.parametrize(
    ("dtype", "kv", "group", "head_dim", "changes"),
    (
        (torch.bfloat16, FP8, 1, 64, {}),
        (torch.float16, FP8, 3, 96, {"sliding_window": 17}),
        (torch.bfloat16, FP8, 4, 128, {"soft_cap": 2.0, "sinks": True}),
        (torch.bfloat16, FP8_TOKEN, 7, 64, {"value_head_dim": 96}),
        (torch.bfloat16, INT8, 3, 64, {"page_size": 5, "sinks": True}),
        (torch.float16, INT8, 4, 128, {}),
        (torch.bfloat16, INT8, 7, 96, {"sliding_window": 33}),
        (torch.bfloat16, FP8, 1, 256, {}),
    ),
    ids=str,
)
def test_decoding_at_lengths_around_those_of_pages_and_tiles(dtype, kv, group, head_dim, changes):
    problem = make_problem(
        dtype=dtype,
        kv=kv,
        num_heads=group,
        num_kv_heads=1,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        **changes,
    )
    check(GROUPED, make_case(problem, LENGTHS))


@pytest.mark.parametrize("kv", (FP8, FP8_TOKEN, INT8), ids=str)
def test_prompts_of_several_tiles(kv):
    problem = make_problem(dtype=torch.bfloat16, kv=kv, head_dim=64, scale=0.1)
    check(GROUPED, make_case(problem, [(0, 65), (40, 33), (3, 1)]))


def one_key_each(kv, codes):
    """A step whose requests have one key each, so that results are the values: `codes`, 64 to a request and head."""
    heads = 2
    requests = len(codes) // (64 * heads)
    problem = make_problem(dtype=torch.bfloat16, kv=kv, num_heads=4, num_kv_heads=heads, head_dim=64)
    case = make_case(problem, [(0, 1)] * requests)
    for request, page in enumerate(case.step.page_tables[:, 0].tolist()):
        own = codes[64 * heads * request :][: 64 * heads].view(heads, 64)
        case.cache.v.view(torch.uint8)[page, 0] = own
    return case


@pytest.mark.parametrize("kv", (FP8, INT8), ids=str)
def test_every_code_that_is_a_number_is_read_exactly(kv):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # not numbers in e4m3
    case = one_key_each(kv, codes)
    for scales in (case.cache.k_scale, case.cache.v_scale):
        scales.fill_(1.0)
    expected = codes.view(kv.dtype).double().view(2, 2, 64).repeat_interleave(2, dim=1)
    assert torch.equal(case.expected(), expected)
    found = result_of(GROUPED, case).double()
    assert torch.allclose(found, expected, atol=0, rtol=UNIT[torch.bfloat16])  # small codes too


@pytest.fixture
def flushing_units(monkeypatch):
    """Matrix units that take what is subnormal in float16 for 0, as those of the MI200 do."""
    if not interpreting():
        pytest.skip("another GPU's matrix units are imitated in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def flush_and_multiply(self, a, b, *rest):
        for side in (a, b):
            side.data = np.where(np.abs(side.data) < 2.0**-14, 0, side.data).astype(side.data.dtype)
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", flush_and_multiply)
    monkeypatch.setattr(test_attention, "DEVICE", probe_device(ARCHITECTURES["gfx90a"].spec))


def test_no_code_is_lost_where_subnormal_numbers_are_taken_for_0(flushing_units):
    test_every_code_that_is_a_number_is_read_exactly(FP8)


@pytest.mark.parametrize("kv", (FP8, INT8, KVType(torch.float16)), ids=str)
@pytest.mark.parametrize("sinks", (False, True))
def test_many_keys_of_little_weight_count_beside_one_of_much(kv, sinks, flushing_units):
    """The first key has weight 1 and a value of 0, 299 others 2^-16 and values of 1; before them, a sink of 1."""
    problem = make_problem(dtype=torch.float16, kv=kv, head_dim=64, scale=16 * math.log(2) / 64, sinks=sinks)
    case = make_case(problem, [(299, 1)])
    first = int(case.step.page_tables[0, 0])
    one = torch.ones((), dtype=kv.dtype)
    case.q.fill_(1.0)
    if sinks:
        case.sinks.fill_(16 * math.log(2))
    case.cache.k.zero_()
    case.cache.k[first, 0] = one
    case.cache.v[:] = one
    case.cache.v[first, 0] = torch.zeros_like(one)
    for scales in (case.cache.k_scale, case.cache.v_scale):
        if scales is not None:
            scales.fill_(1.0)
    check(GROUPED, case)


@pytest.mark.parametrize("code", (127, 255))
@pytest.mark.parametrize("head_dim", (20, 64))  # read alone, and four at a time
@pytest.mark.parametrize("part", ("k", "v"))
def test_codes_that_are_not_numbers_give_none(code, head_dim, part):
    problem = make_problem(dtype=torch.bfloat16, kv=FP8, head_dim=head_dim)
    case = make_case(problem, [(5, 1), (9, 1)])
    page = int(case.step.page_tables[1, 0])
    getattr(case.cache, part).view(torch.uint8)[page, 3, 1, 17] = code  # the second request's fourth token
    found = result_of(GROUPED, case)
    assert found[0].isfinite().all() and found[1, :2].isfinite().all()
    hit = found[1, 2:] if part == "k" else found[1, 2:, 17]
    assert hit.isnan().all()


def test_garbage_behind_a_request_is_not_read_into_its_result():
    problem = make_problem(dtype=torch.bfloat16, kv=FP8, head_dim=64)
    case = make_case(problem, [(17, 1)])
    for pages in (case.cache.k, case.cache.v):
        pages.view(torch.uint8)[int(case.step.page_tables[0, 1]), 2:] = 127
        pages.view(torch.uint8)[-1] = 127
    check(GROUPED, case)


@pytest.mark.parametrize("power", (-100, 60))
def test_queries_of_any_size_keep_their_precision(power):
    problem = make_problem(dtype=torch.bfloat16, kv=FP8, head_dim=64, scale=0.1 * 2.0**-power)
    case = make_case(problem, LENGTHS[2:])
    case.q *= 2.0**power
    check(GROUPED, case)


@pytest.mark.parametrize("size", (1e-25, 1e20))
def test_scales_of_tokens_of_any_size_keep_their_precision(size):
    problem = make_problem(dtype=torch.bfloat16, kv=INT8, head_dim=64)
    case = make_case(problem, LENGTHS[2:])
    case.cache.v_scale *= size
    case.cache.v_scale[:, ::3] *= 1e-3
    check(GROUPED, case)
