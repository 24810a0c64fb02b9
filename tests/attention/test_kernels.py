"""Every attention kernel against the formula in float64, over what the pages hold; every KV store kernel, too."""

from __future__ import annotations

import pytest
import torch

from pymllm.attention import AttnMetaDataBase, reference_torch_attention
from pymllm.kernels.registry import kernels_for

from .steps import KV_TYPES, REQUESTS_IN_BLOCKS, blocks_of_four, empty_pages, make_case, make_problem

KERNELS = {kernel.name: kernel for kernel in kernels_for("attention")}
STORES = {kernel.name: kernel for kernel in kernels_for("kv_store")}

# Sums of float32, or rounding of the weights and of the result to the activations' dtype.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DECODE = [(0, 1), (1, 1), (15, 1), (16, 1), (40, 1)]
MIXED = [(0, 5), (33, 1), (7, 12), (16, 16), (0, 1), (31, 20)]
PROMPTS = [(0, 23), (0, 16)]
SHAPES = {"one": [(37, 1)], "decode": DECODE, "prompts": PROMPTS, "mixed": MIXED}


def check(kernel, case):
    if kernel.why_not(case.problem) is not None:
        pytest.skip(kernel.why_not(case.problem))
    found = kernel.run(case.problem, case.q, case.k, case.v, case.step, case.cache, case.sinks)
    expected = case.expected()
    assert found.shape == expected.shape and found.dtype is case.problem.dtype
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCES[case.problem.dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_cache_type_is_read_as_it_is_stored(name, kv, shape):
    check(KERNELS[name], make_case(make_problem(kv=KV_TYPES[kv]), SHAPES[shape]))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", ((1, 1, 8), (6, 2, 20), (8, 1, 64), (3, 3, 128)))
@pytest.mark.parametrize("name", KERNELS)
def test_head_counts_and_sizes(name, heads, kv_heads, head_dim, dtype):
    problem = make_problem(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    check(KERNELS[name], make_case(problem, MIXED))


@pytest.mark.parametrize("window", (1, 7, 16, 17, 100))
@pytest.mark.parametrize("kv", ("float32", "int8"))
@pytest.mark.parametrize("name", KERNELS)
def test_sliding_windows(name, kv, window):
    check(KERNELS[name], make_case(make_problem(sliding_window=window, kv=KV_TYPES[kv]), [*DECODE, *MIXED]))


@pytest.mark.parametrize(
    "changes",
    (
        {"soft_cap": 0.7},
        {"sinks": True},
        {"value_head_dim": 48},
        {"soft_cap": 2.0, "sinks": True, "sliding_window": 9, "value_head_dim": 16},
    ),
    ids=("soft cap", "sinks", "value head", "all"),
)
@pytest.mark.parametrize("name", KERNELS)
def test_soft_caps_sinks_and_value_heads_of_another_size(name, changes):
    check(KERNELS[name], make_case(make_problem(**changes), MIXED))


@pytest.mark.parametrize("page_size", (1, 5, 32))
@pytest.mark.parametrize("name", KERNELS)
def test_page_sizes(name, page_size):
    check(KERNELS[name], make_case(make_problem(page_size=page_size), MIXED))


@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize("changes", ({}, {"soft_cap": 0.7, "sinks": True}), ids=("plain", "cap, sinks"))
@pytest.mark.parametrize("window", (None, 1, 7, 16, 64))
@pytest.mark.parametrize("name", KERNELS)
def test_tokens_that_see_both_ways(name, window, changes, cached):
    """Also over many tiles: one text is longer than any tile, the windows end within tiles and at their edges."""
    problem = make_problem(bidirectional=True, sliding_window=window, **changes)
    case = make_case(problem, [*MIXED, (0, 150)] if cached else [(0, 1), (0, 2), (0, 150), (0, 17)])
    if not cached:
        case.cache, case.step.page_tables = None, None
        expected = make_case(problem, case.requests).expected()
        case.expected = lambda: expected
    check(KERNELS[name], case)


@pytest.mark.parametrize("prefix_causal", (False, True))
@pytest.mark.parametrize("hole", (False, True))
@pytest.mark.parametrize("window", (None, 6))
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_that_see_themselves(name, window, hole, prefix_causal):
    """Blocks of four; requests 0 and 2 read their prompts; cached positions of a padded prefix are not seen."""
    settings = blocks_of_four(prefix_causal=prefix_causal, hole=hole)
    problem = make_problem(block_causal=True, sliding_window=window)
    check(KERNELS[name], make_case(problem, REQUESTS_IN_BLOCKS, **settings))


@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize("block_size", (3, 5, 23, 64))
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_of_any_size(name, block_size, cached):
    """Sizes that do not divide a page, or are larger than a page or a request; steps may begin or end in a block."""
    changes = {"sliding_window": 6} if block_size == 5 else {}
    problem = make_problem(block_causal=True, **changes)
    requests = (
        [(0, 70), (23, 23), (15, 3), (69, 20), (0, 1), (7, 2)] if cached else [(0, 70), (0, 1), (0, 24)]
    )
    case = make_case(problem, requests, block_size=block_size, prefix_causal=False)
    if not cached:
        expected = case.expected()
        case.cache, case.step.page_tables, case.expected = None, None, lambda: expected
    check(KERNELS[name], case)


@pytest.mark.parametrize("name", KERNELS)
def test_heads_may_be_strided(name):
    """As they come from one matmul of q, k and v."""
    case = make_case(make_problem(), MIXED)
    tokens = len(case.q)
    side_by_side = torch.cat([t.reshape(tokens, -1) for t in (case.q, case.k, case.v)], dim=-1)
    sizes = [t[0].numel() for t in (case.q, case.k, case.v)]
    case.q, case.k, case.v = (
        part.view(t.shape)
        for part, t in zip(side_by_side.split(sizes, -1), (case.q, case.k, case.v), strict=True)
    )
    assert not case.q.is_contiguous()
    check(KERNELS[name], case)


@pytest.mark.parametrize("name", KERNELS)
def test_without_a_cache_the_new_tokens_are_all(name):
    case = make_case(make_problem(), PROMPTS)
    if KERNELS[name].why_not(case.problem) is not None:
        pytest.skip(KERNELS[name].why_not(case.problem))
    expected = case.expected()
    case.step.page_tables = None
    found = KERNELS[name].run(case.problem, case.q, case.k, case.v, case.step)
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= 2e-6


def test_the_reference_function_is_the_formula():
    case = make_case(make_problem(soft_cap=3.0, sinks=True, sliding_window=8), MIXED)
    found = reference_torch_attention(
        case.q,
        case.k,
        case.v,
        case.step,
        scale=0.2,
        cache=case.cache,
        sliding_window=8,
        soft_cap=3.0,
        sinks=case.sinks,
    )
    assert torch.allclose(found.double(), case.expected(), atol=1e-6)


# --- storing


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", STORES)
def test_stored_values_are_the_nearest_ones_and_slots_below_zero_are_skipped(name, kv, dtype):
    problem = make_problem(kv=KV_TYPES[kv], dtype=dtype, value_head_dim=24)
    if STORES[name].why_not(problem) is not None:
        pytest.skip(STORES[name].why_not(problem))
    cache = empty_pages(problem, 4)
    untouched = empty_pages(problem, 4)
    slots = torch.tensor([17, -1, 3, 63, -1, 40])
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, 2, size, generator=generator).to(dtype) for size in (32, 24))
    k[2] = 0.0  # a head of zeros has no peak to scale by
    STORES[name].run(problem, k, v, cache, AttnMetaDataBase(slot_mapping=slots))
    for new, pages, before, scales in (
        (k, cache.k, untouched.k, cache.k_scale),
        (v, cache.v, untouched.v, cache.v_scale),
    ):
        flat = pages.flatten(0, 1)
        kept = slots >= 0
        rest = [slot for slot in range(64) if slot not in slots.tolist()]
        assert torch.equal(flat[rest].float(), before.flatten(0, 1)[rest].float())
        stored, given = flat[slots[kept]].double(), new[kept].double()
        if scales is not None:
            scale = scales if scales.ndim == 1 else scales.flatten(0, 1)[slots[kept]]
            stored = stored * scale.double()[..., None]
        # Half a step: of the int8 grid (a peak is 127 steps), or of a float's last bit.
        peak = given.abs().amax(-1, keepdim=True)
        step = {
            "float32": 0.0,
            "bfloat16": given.abs() * 2**-8,
            "fp8": given.abs() * 2**-4 + 0.02 * 2**-9,
            "int8": peak / 127 / 2 * 1.001,
        }[kv]
        assert bool(((stored - given).abs() <= step).all())


@pytest.mark.parametrize("name", STORES)
def test_values_beyond_what_static_scales_reach_are_clamped(name):
    problem = make_problem(kv=KV_TYPES["fp8"])
    if STORES[name].why_not(problem) is not None:
        pytest.skip(STORES[name].why_not(problem))
    cache = empty_pages(problem, 1)
    k = torch.full((1, 2, 32), -1e6)
    STORES[name].run(problem, k, -k, cache, AttnMetaDataBase(slot_mapping=torch.tensor([4])))
    assert bool((cache.k[0, 4].float() == -448).all() and (cache.v[0, 4].float() == 448).all())
