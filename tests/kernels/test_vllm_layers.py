"""vLLM's layers as an entry of the registry, with a stand-in for the package: lazy, off by default, with reasons."""

# T tokens, H hidden size, D head size

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from pymllm.api import load_model
from pymllm.config import Execution
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import KERNELS
from pymllm.kernels.vllm import elementwise as vllm_layers
from pymllm.kernels.vllm.elementwise import (
    VllmRotaryEmbeddingAdapter,
    clear_vllm_layer_caches,
    get_vllm_gelu_and_mul_cls,
    get_vllm_rmsnorm_cls,
    get_vllm_rope_fn,
    get_vllm_silu_and_mul_cls,
    is_vllm_layers_enabled,
    set_vllm_layers_enabled,
)
from pymllm.layers.activation import GeluAndMul, SiluAndMul
from pymllm.layers.elementwise import select_elementwise
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.rotary_embedding import RotaryEmbedding, get_rope
from pymllm.planning.make_plan import plan

from ..checkpoints import relative_error, write_checkpoint
from ..forward import logits_of
from ..processes import python
from ..tensors import random

GETTERS = (
    get_vllm_silu_and_mul_cls,
    get_vllm_gelu_and_mul_cls,
    get_vllm_rmsnorm_cls,
    get_vllm_rope_fn,
)

# Written as vLLM's own: the norm's fused sum and the rotation write into their inputs, calls are counted.
MODULES = {
    "__init__": "",
    "platforms": "class current_platform:\n    device_type = 'cpu'\n",
    "model_executor/__init__": "",
    "model_executor/layers/__init__": "calls = []\n",
    "model_executor/layers/activation": """
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers import calls

class SiluAndMul(nn.Module):
    def forward(self, x):
        calls.append("silu")
        half = x.shape[-1] // 2
        return F.silu(x[..., :half]) * x[..., half:]

class GeluAndMul(nn.Module):
    def __init__(self, approximate="none"):
        super().__init__()
        self.approximate = approximate
    def forward(self, x):
        calls.append("gelu")
        half = x.shape[-1] // 2
        return F.gelu(x[..., :half], approximate=self.approximate) * x[..., half:]
""",
    "model_executor/layers/layernorm": """
import torch
from torch import nn
from vllm.model_executor.layers import calls

class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps
    def forward(self, x, residual=None):
        calls.append("norm")
        if residual is not None:
            residual.add_(x)
            x.copy_(residual)
        y = x.float()
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
        return y if residual is None else (y, residual)
""",
    "model_executor/layers/rotary_embedding": """
import torch
from torch import nn
from vllm.model_executor.layers import calls

class Rotary(nn.Module):
    def __init__(self, head_size, rotary_dim, base):
        super().__init__()
        self.head_size, self.rotary_dim = head_size, rotary_dim
        self.inv = 1.0 / base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    def forward(self, positions, query, key):
        calls.append("rope")
        angles = positions.float()[:, None] * self.inv
        for x in (query, key):
            heads = x.view(len(positions), -1, self.head_size)
            a, b = heads[..., : self.rotary_dim].float().chunk(2, dim=-1)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            heads[..., : self.rotary_dim] = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
        return query, key
""",
}
NEW_ROPE = """
def get_rope(head_size, max_position, is_neox_style=True, rope_parameters=None, dtype=None):
    assert rope_parameters["rope_type"] == "default" and is_neox_style
    dim = int(head_size * rope_parameters["partial_rotary_factor"])
    return Rotary(head_size, dim, rope_parameters["rope_theta"])
"""
OLD_ROPE = """
def get_rope(head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, dtype=None):
    assert rope_scaling is None
    return Rotary(head_size, rotary_dim, base)
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    yield
    set_vllm_layers_enabled(False)
    clear_vllm_layer_caches()
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def install(tmp_path, monkeypatch, rope=NEW_ROPE, **changed):
    for name, text in (MODULES | changed).items():
        file = tmp_path / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + (rope if name.endswith("rotary_embedding") else ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def calls():
    return sys.modules["vllm.model_executor.layers"].calls


def why_not(device="cpu", dtype=torch.float32):
    return vllm_layers.VllmElementwise().why_not(ElementwiseProblem(dtype, probe_device(device)))


def test_it_is_an_ordinary_entry_of_the_registry():
    assert "pymllm.kernels.vllm.elementwise:VllmElementwise" in KERNELS["elementwise"]


def test_off_by_default_and_nothing_of_it_is_imported(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    assert not is_vllm_layers_enabled()
    assert all(get() is None for get in GETTERS) and "switched off" in why_not()
    assert "vllm" not in sys.modules
    code = "import pymllm.layers.linear, sys; assert not any(m.startswith('vllm') for m in sys.modules)"
    python("-c", code, check=True)


def test_switched_on_without_the_package_is_none_and_the_native_path(monkeypatch):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    set_vllm_layers_enabled(True)
    assert is_vllm_layers_enabled() and all(get() is None for get in GETTERS)
    assert why_not() == "the package vllm is not installed"
    assert select_elementwise(Execution()).kernel.name != "vllm"


def test_a_package_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, **{"model_executor/layers/layernorm": "raise RuntimeError('no driver')"})
    set_vllm_layers_enabled(True)
    assert get_vllm_rmsnorm_cls() is None and get_vllm_silu_and_mul_cls() is not None
    assert "RuntimeError: no driver" in why_not()


def test_one_for_another_device_is_refused(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, platforms="class current_platform:\n    device_type = 'cuda'\n")
    set_vllm_layers_enabled(True)
    assert why_not() == "this vllm is built for cuda, not for cpu"


def test_the_switch_forgets_earlier_choices(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    execution = Execution(dtype=torch.float32)
    before = select_elementwise(execution)
    assert before.refused[0].kernel == "vllm" and "switched off" in before.refused[0].why
    set_vllm_layers_enabled(True)
    assert select_elementwise(execution).kernel.name == "vllm"
    assert all(get() is not None for get in GETTERS)
    set_vllm_layers_enabled(False)
    assert select_elementwise(execution).kernel.name == before.kernel.name
    assert all(get() is None for get in GETTERS)


@pytest.fixture
def on(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    set_vllm_layers_enabled(True)


def test_norms_and_activations_go_through_it_and_leave_their_inputs_alone(on):
    x, residual = random(3, 8), random(3, 8, seed=1)
    weight = random(8, seed=2)

    def results():
        norm, bare = RMSNorm(8, 1e-5), RMSNorm(8, has_weight=False)
        norm.weight.data.copy_(weight)
        kept, other = x.clone(), residual.clone()
        made = (norm(x), *norm(x, residual), bare(x), SiluAndMul()(x), GeluAndMul()(x), norm(x[:0]))
        assert torch.equal(x, kept) and torch.equal(residual, other)
        norm.weight.data.mul_(2)
        return *made, norm(x)

    expected = results()
    with Execution(dtype=torch.float32):
        actual = results()
    assert calls() == ["norm", "norm", "silu", "gelu", "norm"], "a norm without weight or rows is torch's"
    for mine, other in zip(actual, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("rope", (NEW_ROPE, OLD_ROPE), ids=("new", "old"))
@pytest.mark.parametrize("rotary_dim", (8, 4))
def test_rotary_positions_go_through_either_signature(tmp_path, monkeypatch, rope, rotary_dim):
    install(tmp_path, monkeypatch, rope)
    set_vllm_layers_enabled(True)
    positions, q, k = torch.tensor([0, 3, 7]), random(3, 16), random(3, 1, 8, seed=1)
    ours = get_rope(8, rotary_dim, 32, 1e4)
    with Execution(dtype=torch.float32):
        theirs = get_rope(8, rotary_dim, 32, 1e4)
        assert theirs is get_rope(8, rotary_dim, 32, 1e4), "cached like ours"
        yarn = get_rope(8, 8, 32, 1e4, {"factor": 2.0, "original_max_position_embeddings": 16}, "yarn")
    assert isinstance(ours, RotaryEmbedding) and isinstance(theirs, VllmRotaryEmbeddingAdapter)
    assert isinstance(yarn, RotaryEmbedding), "vLLM computes it in another way"
    kept = q.clone()
    for mine, other in zip(theirs(positions, q, k), ours(positions, q, k), strict=True):
        assert mine.shape == other.shape and torch.allclose(mine, other, atol=1e-6)
    assert torch.equal(q, kept) and calls() == ["rope"]
    empty = theirs(positions[:0], q[:0], k[:0])
    assert empty[0].shape == (0, 16) and calls() == ["rope"]


def test_a_model_says_in_its_plan_that_it_runs_them(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    install(tmp_path, monkeypatch)
    assert plan(checkpoint.folder, device="cpu").elementwise["refused"][0]["kernel"] == "vllm"
    set_vllm_layers_enabled(True)
    assert plan(checkpoint.folder, device="cpu").elementwise["kernel"] == "vllm"
    model = load_model(checkpoint.folder, device="cpu", dtype="float32")
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5
    assert {"norm", "silu", "rope"} <= set(calls())
    forced = load_model(checkpoint.folder, device="cpu", dtype="float32", kernels={"elementwise": "torch"})
    count = len(calls())
    logits_of(forced, checkpoint.ids)
    assert len(calls()) == count
