"""vLLM's norms, gated activations and rotary positions, where vLLM is installed and they are switched on.

They are an entry of the registry like any other ("vllm", under elementwise). It is first in the order, but off until
`set_vllm_layers_enabled(True)`, as importing vLLM takes many seconds. Nothing of vLLM is imported before that.
"""

# T tokens, H hidden size, N half the gated size, D head size

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.registry import kernels_for, select

LAYERS = "vllm.model_executor.layers"
ROPE_TYPES = ("default", "linear", "llama3")  # those that vLLM computes as transformers does

_enabled = False


def set_vllm_layers_enabled(enabled: bool) -> None:
    """Let models that are built from now on use vLLM's layers, or no longer."""
    global _enabled
    if bool(enabled) is not _enabled:
        _enabled = bool(enabled)
        clear_vllm_layer_caches()


def is_vllm_layers_enabled() -> bool:
    return _enabled


def clear_vllm_layer_caches() -> None:
    """Forget the symbols found in vLLM, the layers made of them, and the kernels chosen with them."""
    _find.cache_clear()
    kernels_for.cache_clear()
    select.cache_clear()


def get_vllm_silu_and_mul_cls() -> type[nn.Module] | None:
    """Return vLLM's SiluAndMul, or None where it cannot be had and while vLLM's layers are switched off."""
    return _find("activation", "SiluAndMul")[0]


def get_vllm_gelu_and_mul_cls() -> type[nn.Module] | None:
    return _find("activation", "GeluAndMul")[0]


def get_vllm_rmsnorm_cls() -> type[nn.Module] | None:
    return _find("layernorm", "RMSNorm")[0]


def get_vllm_rope_fn() -> Callable[..., nn.Module] | None:
    return _find("rotary_embedding", "get_rope")[0]


@functools.cache
def _find(module: str, name: str) -> tuple[Any, str | None]:
    """Look up a symbol of vLLM.  Returns the symbol and None, or None and why it cannot be had."""
    if not _enabled:
        return None, "switched off: set_vllm_layers_enabled(True) before the model is built"
    try:
        if importlib.util.find_spec("vllm") is None:
            return None, "the package vllm is not installed"
        return getattr(importlib.import_module(f"{LAYERS}.{module}"), name), None
    except Exception as error:  # whatever a vLLM raises that does not fit this machine
        return None, f"vllm cannot be imported here: {type(error).__name__}: {error}"


def _platform() -> str:
    """Return the device type that the installed vLLM is built for."""
    platforms = importlib.import_module("vllm.platforms")
    return str(platforms.current_platform.device_type)


class VllmElementwise:
    """Norms and activations by vLLM; what it does not have, by torch."""

    name = "vllm"

    def __init__(self) -> None:
        self.torch = TorchElementwise()
        # A norm of vLLM holds its weight, so there is one for each.
        self.norms: Any = WeakTensorKeyDictionary()
        self.activations: dict[str, nn.Module] = {}

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        for module, name in (
            ("layernorm", "RMSNorm"),
            ("activation", "SiluAndMul"),
            ("activation", "GeluAndMul"),
            ("rotary_embedding", "get_rope"),
        ):
            why = _find(module, name)[1]
            if why is not None:
                return why
        if _platform() != problem.device.type:
            return f"this vllm is built for {_platform()}, not for {problem.device.type}"
        if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"does not compute in {problem.dtype}"
        return None

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise as `TorchElementwise.rms_norm` does.

        A norm without a weight, or with one of another dtype, is left to torch.
        """
        if weight is None or weight.dtype is not x.dtype or not x.numel():
            return self.torch.rms_norm(x, weight, eps, residual)
        norm = self.norms.get(weight)
        if norm is None:
            cls = get_vllm_rmsnorm_cls()
            assert cls is not None
            norm = cls(x.shape[-1], eps=eps)
            norm.weight = nn.Parameter(weight.data, requires_grad=False)
            self.norms[weight] = norm
        if residual is None:
            return norm(x)
        # vLLM's fused sum writes into both of its inputs; ours leaves them alone.
        return norm(x.clone(), residual.clone())

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._activation("silu", get_vllm_silu_and_mul_cls)(x)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        return self._activation("gelu", get_vllm_gelu_and_mul_cls, approximate="tanh")(x)

    def _activation(self, name: str, find: Callable[[], Any], **options: str) -> nn.Module:
        if name not in self.activations:
            self.activations[name] = find()(**options)
        return self.activations[name]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate by torch, for the rotary scalings that vLLM computes in another way than transformers."""
        return self.torch.rotate(x, cos, sin)

    def make_rotary(
        self,
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: float,
        scaling: Mapping[str, Any],
        rope_type: str,
        dtype: torch.dtype | None = None,
    ) -> VllmRotaryEmbeddingAdapter | None:
        """Make vLLM's rotary module for these settings, or return None where it differs from ours."""
        if rope_type not in ROPE_TYPES:
            return None
        return VllmRotaryEmbeddingAdapter(
            head_size, rotary_dim, max_position, base, scaling, rope_type, dtype=dtype
        )


class VllmRotaryEmbeddingAdapter(nn.Module):
    """A rotary module of vLLM behind the interface of ours.  It leaves its inputs alone; heads may be flattened."""

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: float,
        scaling: Mapping[str, Any] | None = None,
        rope_type: str = "default",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = get_vllm_rope_fn()
        assert make is not None, "VllmElementwise.why_not has asked for it"
        self.head_size, self.rotary_dim, self.max_position = head_size, rotary_dim, max_position
        settings = {**(scaling or {}), "rope_type": rope_type}
        taken = inspect.signature(make).parameters
        if "rope_parameters" in taken:  # vLLM 0.12 and later
            settings |= {"rope_theta": base, "partial_rotary_factor": rotary_dim / head_size}
            self.rotary = make(head_size, max_position, rope_parameters=settings, dtype=dtype)
        else:
            scaled = None if rope_type == "default" else settings
            self.rotary = make(head_size, rotary_dim, max_position, base, rope_scaling=scaled, dtype=dtype)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key.

        positions: [T].  query, key: [T, heads * D] or [T, heads, D].  Returns both rotated, in their shapes.
        """
        if not positions.numel():
            return query.clone(), key.clone()
        rotated = self.rotary(positions, *(x.flatten(1).clone() for x in (query, key)))
        return rotated[0].view(query.shape), rotated[1].view(key.shape)
