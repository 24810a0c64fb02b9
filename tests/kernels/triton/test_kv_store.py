"""Rotating and storing in one launch, against each by itself."""

from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import pytest
import torch

from pymllm.attention.attention import Attention
from pymllm.attention.self_attention import SelfAttention
from pymllm.config import Execution, ModelConfig
from pymllm.kernels.attention import AttentionStep, KVType
from pymllm.kernels.triton.elementwise import TritonElementwise
from pymllm.kernels.triton.int_weights import meta_int_weight
from pymllm.kernels.triton.kv_store import TritonKVStore
from pymllm.kernels.triton.launch import recording
from pymllm.layers.mlp import GatedMLP
from pymllm.layers.step import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.models.causal_lm import DecoderLayer
from pymllm.quantization.binding import bind_layer
from pymllm.quantization.kv_cache import UnquantizedKVCacheMethod
from tests.attention.steps import empty_pages, make_problem

from .gpu import DEVICE, HERE, randn

KINDS = (
    KVType(torch.bfloat16),
    KVType(torch.float16),
    KVType(torch.float8_e4m3fn, "static"),
    KVType(torch.float8_e4m3fn, "token"),
    KVType(torch.int8, "token"),
)


def pages_of(problem, slots):
    """Empty pages, with static scales of their own for every head."""
    cache = empty_pages(problem, -(-slots // problem.page_size))
    if cache.type.scaling == "static":
        cache.k_scale.copy_(torch.linspace(0.01, 0.02, problem.num_kv_heads))
        cache.v_scale.copy_(torch.linspace(0.03, 0.01, problem.num_kv_heads))
    return replace(
        cache, **{name: t.to(HERE) for name, t in vars(cache).items() if isinstance(t, torch.Tensor)}
    )


def new_tokens(problem, tokens):
    """q, k and v as parts of a fused projection."""
    sizes = [
        problem.num_heads * problem.head_dim,
        problem.num_kv_heads * problem.head_dim,
        problem.num_kv_heads * problem.value_head_dim,
    ]
    parts = (3 * randn(tokens, sum(sizes), dtype=problem.dtype)).split(sizes, dim=-1)
    return [x.unflatten(-1, (-1, size)) for x, size in zip(parts, sizes_of_heads(problem), strict=True)]


def sizes_of_heads(problem):
    return problem.head_dim, problem.head_dim, problem.value_head_dim


SHAPES = (  # tokens, heads, kv_heads, size, rotary, value_size
    (1, 8, 2, 64, 64, 64),
    (5, 7, 1, 20, 20, 20),
    (3, 6, 6, 96, 24, 64),  # the part that is not rotated is longer than both halves of the other
    (64, 4, 3, 64, 32, 64),  # many tokens: blocks of four warps
    (2, 40, 40, 32, 30, 80),
)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, SHAPES[2]) for kind in KINDS), *((KINDS[-1], shape) for shape in SHAPES if shape != SHAPES[2])],
    ids=str,
)
def test_one_launch_leaves_the_bits_of_three(kind, shape):
    tokens, heads, kv_heads, size, rotary, value_size = shape
    problem = make_problem(
        dtype=torch.bfloat16,
        device=DEVICE,
        kv=kind,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        value_head_dim=value_size,
    )
    q, k, v = new_tokens(problem, tokens)
    angles = randn(tokens, rotary // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(2 * tokens + 3, generator=torch.Generator().manual_seed(2))[:tokens].to(HERE)
    slots[tokens // 2 + 1 :: 3] = -1
    step = AttentionStep(slot_mapping=slots)
    expected, found = pages_of(problem, 2 * tokens + 3), pages_of(problem, 2 * tokens + 3)
    rotate, store = TritonElementwise().rotate, TritonKVStore()
    store.run(problem, rotate(k, cos, sin), v, expected, step)
    y = store.rotate_and_store(problem, q, k, v, found, step, cos, sin)
    assert torch.equal(y, rotate(q, cos, sin))
    for name in ("k", "v", "k_scale", "v_scale"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def test_it_is_one_launch():
    problem = make_problem(dtype=torch.bfloat16, device=DEVICE)
    q, k, v = new_tokens(problem, 4)
    table = randn(4, problem.head_dim // 2)
    step = AttentionStep(slot_mapping=torch.arange(4).to(HERE))
    with recording() as found:
        TritonKVStore().rotate_and_store(problem, q, k, v, pages_of(problem, 16), step, table, table)
        TritonKVStore().run(problem, k, v, pages_of(problem, 16), step)
    assert [launch.kernel.name for launch in found] == ["store_tokens"] * 2


CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def attention_layer(kv=None, device=HERE, **options):
    """Self-attention with pages, on the GPU or in the interpreter."""
    with Execution(dtype=torch.bfloat16, device=DEVICE.spec, kv_dtype=kv), torch.device(device):
        layer = SelfAttention(ModelConfig(dict(CONFIG)), 0, prefix="self_attn", quant_config=None, **options)
    layer.attn.attach_cache(8, 16, device)
    return layer


@contextmanager
def step_of(device=HERE, **changes):
    """A step of two requests: three new tokens after 15, one after 17."""
    settings = {
        "cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32, device=device),
        "context_lens": torch.tensor([18, 18], dtype=torch.int32, device=device),
        "page_tables": torch.tensor([[3, 5], [1, 2]], dtype=torch.int32, device=device),
        "slot_mapping": torch.tensor([63, 80, 81, 33], device=device),
        "max_seqlen_q": 3,
        "max_seqlen_k": 18,
    }
    step = AttnMetaDataBase(**(settings | changes))
    set_fetch_fn_for_attn_metadata(lambda: step)
    try:
        yield step
    finally:
        set_fetch_fn_for_attn_metadata(None)


def names_of(layer):
    """The kernels that one call of the layer launches, in order."""
    q, k, v = (randn(4, size, dtype=torch.bfloat16) for size in layer.qkv_proj.local_sizes)
    with recording() as found:
        layer.attend(torch.tensor([15, 16, 17, 17], device=HERE), q, k, v)
    return [launch.kernel.name for launch in found]


@pytest.mark.parametrize("rotary", (64, 16))
def test_a_layer_rotates_in_its_store_and_answers_as_it_did(rotary, monkeypatch):
    layer = attention_layer(rotary_dim=rotary)
    q, k, v = (randn(4, size, dtype=torch.bfloat16) for size in layer.qkv_proj.local_sizes)
    positions = torch.tensor([15, 16, 17, 17], device=HERE)
    with step_of():
        assert names_of(layer) == ["store_tokens", "attend"]
        found = layer.attend(positions, q, k, v)
        pages = layer.attn.cache.k.clone()
        layer.attn.cache.k.zero_()
        monkeypatch.setattr(Attention, "rotates_as", lambda *_: False)
        assert names_of(layer) == ["rotate_heads", "rotate_heads", "store_tokens", "attend"]
        assert torch.equal(found, layer.attend(positions, q, k, v))
    assert torch.equal(pages, layer.attn.cache.k)


def test_whatever_looks_at_rotated_heads_has_them_rotated_before():
    layer = attention_layer()
    apart = ["rotate_heads", "rotate_heads", "store_tokens", "attend"]
    with step_of():
        for module in (layer.attn, layer.rotary):
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                handle = register(lambda *_: None)
                assert names_of(layer) == apart
                handle.remove()
        assert names_of(layer) == ["store_tokens", "attend"]

        class Rotary(type(layer.rotary)):
            def forward(self, positions, query, key):
                return super().forward(positions, query, key)

        layer.rotary = copy(layer.rotary)  # layers share it
        layer.rotary.__class__ = Rotary
        assert names_of(layer) == apart
    with step_of(page_tables=None, context_lens=torch.tensor([3, 1], dtype=torch.int32, device=HERE)):
        assert names_of(layer)[:2] == apart[:2]


def test_a_cache_method_with_a_store_of_its_own_gets_rotated_keys():
    @dataclass(frozen=True)
    class Own(UnquantizedKVCacheMethod):
        def store(self, layer, k, v, step):
            super().store(layer, k * 2, v, step)

    layer = attention_layer()
    layer.attn.quant_method = Own()
    with step_of():
        assert names_of(layer)[:2] == ["rotate_heads"] * 2


def test_a_decode_step_of_an_int4_layer_takes_few_launches():
    """Products: one launch each for a token, with the sum of its splits where it is divided."""
    with Execution(dtype=torch.bfloat16, device=DEVICE.spec), torch.device("meta"):
        attention = SelfAttention(ModelConfig(dict(CONFIG)), 0, prefix="self_attn", quant_config=None)
        layer = DecoderLayer(ModelConfig(dict(CONFIG)), attention, GatedMLP(256, 512, "silu"))
        for linear in (attention.qkv_proj, attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            shape = linear.weight.shape
            bind_layer(linear, meta_int_weight(*shape, 4, 128, True))
    attention.attn.attach_cache(8, 16, torch.device("meta"))
    hidden = torch.empty((2, 256), dtype=torch.bfloat16, device="meta")
    numbers = {"dtype": torch.int32, "device": "meta"}
    step = {
        "cu_seqlens_q": torch.empty(3, **numbers),
        "context_lens": torch.empty(2, **numbers),
        "page_tables": torch.empty((2, 2), **numbers),
        "slot_mapping": torch.empty(2, dtype=torch.int64, device="meta"),
        "max_seqlen_q": 1,
    }
    with step_of(**step), recording() as found:
        layer(torch.empty(2, dtype=torch.int64, device="meta"), hidden, hidden)
    names = [launch.kernel.name for launch in found if launch.kernel.name != "add_splits"]
    products = [name for name in names if name.startswith("multiply")]
    others = [name for name in names if name not in products]
    assert len(products) == 4
    assert others == ["norm_rows", "store_tokens", "attend", "norm_rows", "gate_rows"]
