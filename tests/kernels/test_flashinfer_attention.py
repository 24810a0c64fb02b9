"""FlashInfer as an entry of the registry, with a stand-in for the package that takes what the real one takes."""

# R requests, T tokens, H query heads, Hkv key heads, D head size, P page size

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from pymllm.errors import KernelError
from pymllm.kernels.attention import KVType
from pymllm.kernels.flashinfer import attention as family
from pymllm.kernels.flashinfer.attention import FlashInferAttention
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import select
from tests.attention.steps import make_case, make_problem

pytest.importorskip("triton")

GPU = probe_device("cuda:sm90")
MIXED = [(0, 5), (33, 1), (7, 12), (31, 20), (0, 16)]


class BatchPrefillWithPagedKVCacheWrapper:
    """Parameters as in flashinfer 0.5 to 0.6; checks what those check, and computes in float32."""

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
    ):
        assert float_workspace_buffer.dtype is torch.uint8 and float_workspace_buffer.ndim == 1
        assert kv_layout == "NHD" and not use_cuda_graph and backend == "auto" and jit_args is None
        self.device, self.plans = float_workspace_buffer.device, 0

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        non_blocking=True,
    ):
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype is torch.int32 and t.ndim == 1 and t.is_contiguous() for t in indices)
        assert qo_indptr.device.type == paged_kv_indptr.device.type == "cpu", (
            "else the plan waits for the GPU"
        )
        assert paged_kv_indices.device == self.device
        requests = len(paged_kv_last_page_len)
        assert len(qo_indptr) == len(paged_kv_indptr) == requests + 1
        assert int(qo_indptr[0]) == int(paged_kv_indptr[0]) == 0
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        assert all(1 <= length <= page_size for length in paged_kv_last_page_len.tolist())
        assert all(new > 0 for new in qo_indptr.diff().tolist())
        assert causal and custom_mask is None and packed_custom_mask is None and pos_encoding_mode == "NONE"
        assert num_qo_heads % num_kv_heads == 0 and head_dim_qk in (64, 128, 256) and head_dim_vo is None
        assert isinstance(q_data_type, torch.dtype) and kv_data_type == q_data_type
        self.queries, self.starts = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.pages, self.last = paged_kv_indices, paged_kv_last_page_len.tolist()
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.scale, self.window, self.cap, self.dtype = sm_scale, window_left, logits_soft_cap, q_data_type
        self.plans += 1

    def run(self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None):
        heads, kv_heads, size, page_size = self.shape
        keys, values = paged_kv_cache
        assert q.dtype == keys.dtype == values.dtype == self.dtype
        assert tuple(q.shape) == (self.queries[-1], heads, size) and q.is_contiguous()
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, size)
        result = torch.empty_like(q)
        for request, last in enumerate(self.last):
            pages = self.pages[self.starts[request] : self.starts[request + 1]].long()
            length = (len(pages) - 1) * page_size + last
            rows = slice(self.queries[request], self.queries[request + 1])
            k, v = (
                t[pages].flatten(0, 1)[:length].float().repeat_interleave(heads // kv_heads, 1)
                for t in (keys, values)
            )
            logits = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * self.scale
            if self.cap:
                logits = torch.tanh(logits / self.cap) * self.cap
            position = torch.arange(length - logits.shape[1], length)[:, None]
            key = torch.arange(length)[None, :]
            seen = (key <= position) & ((key >= position - self.window) | (self.window < 0))
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            result[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        return result


@pytest.fixture
def flashinfer(monkeypatch):
    """The stand-in, installed for a test."""
    package = ModuleType("flashinfer")
    package.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(family, "_why_not_installed", lambda: None)
    monkeypatch.setattr(family, "WORKSPACE_BYTES", 64)
    caches = (select, family._package, family._workspace)
    for cache in caches:
        cache.cache_clear()
    yield package
    for cache in caches:
        cache.cache_clear()


def run(kernel, case):
    return kernel.run(
        replace(case.problem, device=GPU), case.q, case.k, case.v, case.step, case.cache, case.sinks
    )


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"sliding_window": 1},
        {"sliding_window": 9},
        {"soft_cap": 0.7},
        {"num_heads": 6, "num_kv_heads": 3, "head_dim": 128, "page_size": 5},
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_prompts_are_answered_as_the_formula_says(flashinfer, changes, dtype):
    case = make_case(make_problem(**({"head_dim": 64, "dtype": dtype} | changes)), MIXED)
    found, expected = run(FlashInferAttention(), case), case.expected()
    assert found.dtype is dtype and found.shape == expected.shape
    unit = 2.0**-11 if dtype is torch.float16 else 2.0**-8  # the result is rounded once
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= 2 * unit


def test_a_step_is_planned_once_for_all_layers_that_ask_the_same(flashinfer):
    kernel = FlashInferAttention()
    case = make_case(make_problem(head_dim=64, dtype=torch.float16), MIXED)
    windowed = replace(case, problem=replace(case.problem, sliding_window=4))
    for _ in range(3):
        run(kernel, case)
        run(kernel, windowed)
    assert [wrapper.plans for wrapper in kernel.wrappers.values()] == [1, 1]
    again = make_case(case.problem, [(3, 9)])
    run(kernel, again)
    assert [wrapper.plans for wrapper in kernel.wrappers.values()] == [2, 1]


def test_requests_without_new_tokens_are_left_out(flashinfer):
    """As a scheduler leaves them beside others: no row of theirs may be asked for."""
    case = make_case(make_problem(head_dim=64, dtype=torch.float16), [(4, 3), (20, 2)])
    step, expected = case.step, case.expected()
    step.cu_seqlens_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    step.context_lens = torch.tensor([7, 11, 22], dtype=torch.int32)
    step.page_tables = torch.stack([step.page_tables[0], step.page_tables[0], step.page_tables[1]])
    error = (run(FlashInferAttention(), case).double() - expected).abs().max()
    assert float(error / expected.abs().max()) <= 2 * 2.0**-11


def test_decoding_blocks_and_steps_without_pages_are_left_to_triton(flashinfer, monkeypatch):
    kernel, asked = FlashInferAttention(), []
    monkeypatch.setattr(kernel.decoding, "run", lambda problem, q, *rest: asked.append(len(q)) or q)
    decoding = make_case(make_problem(head_dim=64, dtype=torch.float16), [(9, 1), (30, 1)])
    run(kernel, decoding)
    blocks = make_case(make_problem(head_dim=64, dtype=torch.float16), [(8, 4)], block_size=4)
    run(kernel, blocks)
    prompt = make_case(make_problem(head_dim=64, dtype=torch.float16), [(0, 6)])
    run(kernel, replace(prompt, cache=None))
    assert asked == [2, 4, 6] and not kernel.wrappers and kernel.capturable


def test_it_is_chosen_where_it_is_installed_and_says_why_elsewhere(flashinfer):
    def chosen(**changes):
        settings = {"head_dim": 128, "dtype": torch.bfloat16, "device": GPU} | changes
        selection = select("attention", make_problem(**settings))
        refused = {refusal.kernel: refusal.why for refusal in selection.refused}
        return selection.kernel.name, refused.get("flashinfer")

    assert chosen() == ("flashinfer", None)
    assert chosen(device=probe_device("cuda:sm80"), sliding_window=100, soft_cap=30.0)[0] == "flashinfer"
    for changes, why in (
        ({"device": probe_device("hip:gfx942")}, "needs an NVIDIA GPU"),
        ({"device": probe_device("cpu")}, "needs an NVIDIA GPU"),
        ({"dtype": torch.float32}, "computes with float16 or bfloat16"),
        ({"kv": KVType(torch.float8_e4m3fn, "static")}, "reads caches of the queries' dtype"),
        ({"kv": KVType(torch.float16)}, "reads caches of the queries' dtype"),
        ({"head_dim": 80}, "takes heads of 64, 128, 256"),
        ({"head_dim": 128, "value_head_dim": 64}, "takes heads of 64, 128, 256"),
        ({"sinks": True}, "has no attention sinks"),
        ({"block_causal": True}, "has no blocks"),
        ({"bidirectional": True}, "not those after it"),
        ({"num_heads": 256, "num_kv_heads": 1}, "leaves decoding to triton_grouped, which takes up to 64"),
    ):
        name, refused = chosen(**changes)
        assert name != "flashinfer" and why in refused, changes


def test_a_kernel_that_cannot_be_compiled_is_one_clear_error(flashinfer, monkeypatch):
    def plan(self, *args, **settings):
        raise RuntimeError("Ninja build failed\nnvcc: not a compiler")

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    case = make_case(make_problem(head_dim=64, dtype=torch.float16), MIXED)
    with pytest.raises(KernelError, match=r"Ninja build failed.*attention=triton_grouped"):
        run(FlashInferAttention(), case)


def test_where_it_is_not_installed_the_reason_says_what_brings_it(monkeypatch):
    found = {"flashinfer": None, "flashinfer_jit_cache": None}
    monkeypatch.setattr(family.importlib.util, "find_spec", lambda name: found[name])
    look = family._why_not_installed.__wrapped__
    assert look() == "needs the package flashinfer (pip install 'flashinfer-python>=0.5')"
    found["flashinfer"] = object()
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert "needs nvcc" in look() and "flashinfer-jit-cache" in look()
    found["flashinfer_jit_cache"] = object()
    assert look() is None


def test_the_stand_in_has_no_parameter_that_the_package_lacks():
    real = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    for name in ("__init__", "plan", "run"):
        ours = inspect.signature(getattr(BatchPrefillWithPagedKVCacheWrapper, name)).parameters
        assert set(ours) <= set(inspect.signature(getattr(real, name)).parameters), name
