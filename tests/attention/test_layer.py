"""The attention layer: shapes, its cache, its method, and the kernel that it chooses."""

from __future__ import annotations

import pytest
import torch

from pymllm.attention import Attention, set_fetch_fn_for_attn_metadata
from pymllm.errors import ConfigError, KernelError
from pymllm.quantization.kv_cache import QuantizedKVCacheMethod, UnquantizedKVCacheMethod

from .steps import make_case, make_problem

REQUESTS = [(0, 5), (33, 1), (7, 12)]


def layer_for(problem, **options):
    options = {"value_head_dim": problem.value_head_dim, "soft_cap": problem.soft_cap} | options
    return Attention(
        problem.num_heads,
        problem.head_dim,
        problem.scale,
        problem.num_kv_heads,
        sliding_window=problem.sliding_window,
        sinks=problem.sinks,
        **options,
    )


def new_slots(case):
    """Where the step's own tokens go: their places in the pages that the case has."""
    size, slots = case.problem.page_size, []
    for row, (cached, new) in enumerate(case.requests):
        table = case.step.page_tables[row].tolist()
        slots += [table[p // size] * size + p % size for p in range(cached, cached + new)]
    return torch.tensor(slots)


@pytest.mark.parametrize("flat", (False, True))
def test_new_keys_and_values_are_stored_and_seen(flat):
    problem = make_problem(value_head_dim=48, sliding_window=20)
    case = make_case(problem, REQUESTS)
    expected = case.expected()
    case.step.slot_mapping = new_slots(case)
    for pages in (case.cache.k, case.cache.v):
        pages.flatten(0, 1)[case.step.slot_mapping] = float("nan")  # they are not there yet
    layer = layer_for(problem)
    layer.cache = case.cache
    set_fetch_fn_for_attn_metadata(lambda: case.step)
    inputs = (case.q, case.k, case.v)
    found = layer(*(t.flatten(1) if flat else t for t in inputs))
    assert found.shape == ((18, 4 * 48) if flat else (18, 4, 48))
    assert torch.allclose(found.view(18, 4, 48).double(), expected, atol=2e-6)
    keys, values = layer.quant_method.load(layer, case.step.slot_mapping)
    assert torch.equal(keys, case.k) and torch.equal(values, case.v)


def test_no_tokens_return_at_once():
    """Nothing is fetched: there may be no step at all."""
    layer = layer_for(make_problem(value_head_dim=16))
    assert layer(torch.empty(0, 128), torch.empty(0, 64), torch.empty(0, 32)).shape == (0, 64)
    assert layer(torch.empty(0, 4, 32), torch.empty(0, 2, 32), torch.empty(0, 2, 16)).shape == (0, 4, 16)


def test_tokens_without_a_slot_are_seen_by_none_that_come_later():
    problem = make_problem()
    case = make_case(problem, [(0, 4)])
    layer = layer_for(problem)
    layer.cache = case.cache
    case.step.slot_mapping = torch.full((4,), -1)
    before = case.cache.k.clone()
    set_fetch_fn_for_attn_metadata(lambda: case.step)
    layer(case.q, case.k, case.v)
    assert torch.equal(case.cache.k, before)


def test_sinks_take_part_of_the_weight():
    problem = make_problem(sinks=True, soft_cap=2.0)
    case = make_case(problem, REQUESTS)
    layer = layer_for(problem)
    layer.cache = case.cache
    set_fetch_fn_for_attn_metadata(lambda: case.step)
    found = layer(case.q, case.k, case.v, case.sinks)
    assert torch.allclose(found.double(), case.expected(), atol=2e-6)


def test_a_step_of_blocks_gets_a_kernel_that_can_run_it_whatever_the_layer_chose():
    problem = make_problem()
    case = make_case(problem, [(8, 4), (4, 6)], block_size=4, prefix_causal=False)
    layer = layer_for(problem)
    layer.cache = case.cache
    set_fetch_fn_for_attn_metadata(lambda: case.step)
    assert torch.allclose(layer(case.q, case.k, case.v).double(), case.expected(), atol=2e-6)


def test_the_method_is_never_none_and_decides_the_pages():
    plain = layer_for(make_problem())
    assert isinstance(plain.quant_method, UnquantizedKVCacheMethod)
    int8 = layer_for(make_problem(), quant_method=QuantizedKVCacheMethod("int8", "token"))
    pages = int8.quant_method.allocate(int8, 3, 16, torch.device("cpu"))
    assert (pages.k.dtype, pages.k.shape, pages.k_scale.shape) == (torch.int8, (3, 16, 2, 32), (3, 16, 2))
    assert pages.nbytes == 3 * 16 * int8.problem.kv.bytes_per_token(2, 32, 32)


def test_a_kernel_can_be_named():
    assert layer_for(make_problem(), attn_impl="reference").selection.kernel.name == "reference"
    with pytest.raises(KernelError, match="torch_sdpa"):
        layer_for(make_problem(), attn_impl="torch_sdp")
    with pytest.raises(KernelError, match="soft cap"):
        layer_for(make_problem(soft_cap=2.0), attn_impl="torch_sdpa")


def test_heads_that_key_heads_do_not_share_evenly_are_refused():
    with pytest.raises(ConfigError, match="divided evenly"):
        Attention(4, 32, 0.2, 3)
