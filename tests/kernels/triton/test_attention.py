"""Paged attention on the GPU against the formula in float64 over what the pages hold."""

from dataclasses import replace

import pytest
import torch

from pymllm.attention import triton_attention, triton_grouped_attention
from pymllm.kernels.aten.kv_store import TorchKVStore
from pymllm.kernels.attention import AttentionStep, KVType
from pymllm.kernels.triton import attention as family
from pymllm.kernels.triton.attention import TritonAttention, TritonGroupedAttention
from pymllm.kernels.triton.kv_store import TritonKVStore
from tests.attention.steps import REQUESTS_IN_BLOCKS, blocks_of_four, empty_pages, make_case, make_problem

from .gpu import DEVICE, HERE, UNIT

GROUPED, ALONE = TritonGroupedAttention(), TritonAttention()
KV = {
    "float16": KVType(torch.float16),
    "bfloat16": KVType(torch.bfloat16),
    "fp8": KVType(torch.float8_e4m3fn, "static"),
    "fp8 a token": KVType(torch.float8_e4m3fn, "token"),
    "int8": KVType(torch.int8, "token"),
}
DECODE = [(0, 1), (15, 1), (16, 1), (70, 1)]
MIXED = [(0, 5), (33, 1), (7, 12), (31, 20)]


def moved(value):
    return value.to(HERE) if isinstance(value, torch.Tensor) else value


def result_of(kernel, case):
    problem = replace(case.problem, device=DEVICE)
    assert kernel.why_not(problem) is None
    step = replace(
        case.step, **{name: moved(value) for name, value in vars(case.step).items() if name != "_made"}
    )
    cache = case.cache and replace(
        case.cache, **{name: moved(value) for name, value in vars(case.cache).items()}
    )
    return kernel.run(
        problem, moved(case.q), moved(case.k), moved(case.v), step, cache, moved(case.sinks)
    ).cpu()


def check(kernel, case):
    found, expected, problem = result_of(kernel, case), case.expected(), case.problem
    assert found.shape == expected.shape and found.dtype is problem.dtype
    # Weights and the result are rounded to the dtype; weights are at most 1, values within a few units.
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= 4 * UNIT[problem.dtype]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("requests", (DECODE, MIXED), ids=("decode", "mixed"))
def test_every_cache_type_is_read_as_it_is_stored(kv, requests):
    dtype = torch.bfloat16 if kv == "bfloat16" else torch.float16
    check(GROUPED, make_case(make_problem(dtype=dtype, kv=KV[kv]), requests))


@pytest.mark.parametrize("heads, kv_heads, head_dim", ((1, 1, 8), (6, 2, 20), (8, 1, 64)))
def test_head_counts_and_sizes_with_heads_together_and_alone(heads, kv_heads, head_dim):
    problem = make_problem(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float16)
    for kernel in (GROUPED, ALONE):
        check(kernel, make_case(problem, MIXED))


@pytest.mark.parametrize(
    "changes",
    (
        {"sliding_window": 1},
        {"sliding_window": 17},
        {"soft_cap": 0.7},
        {"sinks": True},
        {"soft_cap": 2.0, "sinks": True, "sliding_window": 9, "value_head_dim": 16},
        {"page_size": 5},
    ),
    ids=str,
)
def test_windows_caps_sinks_value_heads_and_page_sizes(changes):
    check(GROUPED, make_case(make_problem(dtype=torch.float16, **changes), [*DECODE, *MIXED]))


def test_tokens_that_see_both_ways():
    problem = make_problem(bidirectional=True, dtype=torch.float16)
    for kernel in (GROUPED, ALONE):
        check(kernel, make_case(problem, MIXED))
        assert "forward" in kernel.why_not(replace(problem, sliding_window=4))


@pytest.mark.parametrize("prefix_causal", (False, True))
def test_blocks_that_see_themselves_and_holes_that_nobody_sees(prefix_causal):
    settings = blocks_of_four(prefix_causal=prefix_causal, hole=True)
    problem = make_problem(block_causal=True, dtype=torch.float16)
    check(GROUPED, make_case(problem, REQUESTS_IN_BLOCKS, **settings))


@pytest.mark.parametrize(
    ("block_size", "changes"),
    (
        (3, {"kv": KV["int8"], "sinks": True}),
        (5, {"sliding_window": 6}),
        (23, {"num_heads": 6, "page_size": 5}),
        (32, {"soft_cap": 2.0}),
        (64, {}),
    ),
    ids=str,
)
def test_blocks_of_any_size(block_size, changes):
    """Prompts, blocks that are decoded, steps that begin or end inside a block; read from pages, and without any."""
    problem = make_problem(block_causal=True, dtype=torch.float16, **changes)
    requests = [(0, 70), (46, 23), (64, 32), (15, 3), (0, 1)]
    settings = {"block_size": block_size, "prefix_causal": False}
    for kernel in (GROUPED, ALONE):
        check(kernel, make_case(problem, requests, **settings))
    problem = replace(problem, kv=KV["float16"])
    case = make_case(problem, [(0, 70), (0, 33)], **settings)
    expected = case.expected()
    case.cache, case.step.page_tables, case.expected = None, None, lambda: expected
    check(GROUPED, case)


@pytest.mark.parametrize("sinks", (False, True))
def test_keys_divided_over_blocks_are_joined_to_the_same_result(sinks, monkeypatch):
    """Requests shorter than the others leave whole splits empty: what their memory held before is not read."""

    monkeypatch.setattr(family, "LEAST_KEYS", 16)
    case = make_case(make_problem(dtype=torch.float16, sinks=sinks), [(199, 1), (3, 1), (120, 1)])
    tile = family.choose_tile(replace(case.problem, device=DEVICE), case.step, 2)
    assert tile.splits > 4
    new_empty = torch.Tensor.new_empty

    def full_of_nan(*arguments, **options):
        made = new_empty(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    found = result_of(GROUPED, case)
    monkeypatch.undo()
    assert torch.allclose(found.cpu().double(), case.expected(), atol=4e-3)


def test_the_functions_of_both_kernels_answer_as_the_reference_function():
    case = make_case(make_problem(dtype=torch.float16, soft_cap=3.0, sliding_window=8), MIXED)
    step = replace(
        case.step, **{name: moved(value) for name, value in vars(case.step).items() if name != "_made"}
    )
    cache = replace(case.cache, **{name: moved(value) for name, value in vars(case.cache).items()})
    for function in (triton_attention, triton_grouped_attention):
        found = function(
            *(moved(t) for t in (case.q, case.k, case.v)),
            step,
            scale=0.2,
            cache=cache,
            sliding_window=8,
            soft_cap=3.0,
            device=DEVICE.spec,
        )
        assert torch.allclose(found.cpu().double(), case.expected(), atol=4e-3)


def test_without_a_cache_the_new_tokens_are_all():
    case = make_case(make_problem(dtype=torch.float16), [(0, 23), (0, 16)])
    expected = case.expected()
    problem = replace(case.problem, device=DEVICE)
    q, k, v = (moved(t) for t in (case.q, case.k, case.v))
    step = replace(case.step, page_tables=None)
    found = GROUPED.run(problem, q, k, v, step).cpu()
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= 2e-3


def test_elements_of_a_head_that_do_not_lie_side_by_side_are_read_as_what_they_are():
    case = make_case(make_problem(dtype=torch.float16), [(0, 23), (0, 16)])
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k, case.v)]
    assert all(t.stride(-1) > 1 for t in apart)
    step, problem = replace(case.step, page_tables=None), replace(case.problem, device=DEVICE)
    found = GROUPED.run(problem, *map(moved, apart), step).cpu()
    assert float((found.double() - case.expected()).abs().max() / case.expected().abs().max()) <= 2e-3


@pytest.mark.parametrize("kv", KV)
def test_keys_and_values_are_stored_as_torch_stores_them_and_slots_below_zero_are_skipped(kv):
    problem = make_problem(dtype=torch.float16, kv=KV[kv], head_dim=20)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(5, 3, 2, 20, generator=generator).half()[:, i] for i in (0, 1))  # strided
    k[3] = 0
    step = AttentionStep(slot_mapping=torch.tensor([7, -1, 0, 33, 20]))
    expected, found = empty_pages(problem, 4), empty_pages(problem, 4)
    TorchKVStore().run(problem, k, v, expected, step)
    found = replace(found, **{name: moved(value) for name, value in vars(found).items()})
    here = AttentionStep(slot_mapping=moved(step.slot_mapping))
    TritonKVStore().run(replace(problem, device=DEVICE), moved(k), moved(v), found, here)
    for name in ("k", "v", "k_scale", "v_scale"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            same = one.cpu().view(torch.uint8) == other.view(torch.uint8)
            # The interpreter truncates float32 to bfloat16; what float16 holds is cut off by a unit there.
            assert same.all() or (kv == "bfloat16" and not torch.cuda.is_available()), name
