"""The contract between layers and weight formats.

A layer holds a `quant_method`. The method creates the weights as the checkpoint stores them, converts them once to a
canonical layout, binds the best kernel for it, and applies that. `LinearMethodBase` does all of this from four things
that a format supplies: its tensors (`weight_specs`), what it refuses (`check`), and its layout both ways
(`to_canonical`, and `quantize` for use as the target of a rule).

Methods are frozen values without per-layer state: equal methods mean equal formats, so a fused layer whose parts
resolve to equal methods is one matmul. What belongs to a layer lives on the layer.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from pymllm.errors import ConfigError, fetch_factory_name, nearest
from pymllm.quantization.method import LinearMethodBase, StoredTensor, kind_of
from pymllm.weights.spec import FLOATS

if TYPE_CHECKING:
    from typing_extensions import Self

    from pymllm.quantization.kv_cache import KVCacheMethodBase


class QuantizationConfig(ABC):
    """A checkpoint's `quantization_config`, read: which method each layer has, by its checkpoint name."""

    registered_as: ClassVar[str]

    @classmethod
    def get_name(cls) -> str:
        """Return the name that the class is registered under: the `quant_method` that it reads.  TypeError for none."""
        if not hasattr(cls, "registered_as"):
            raise TypeError(f"{cls.__name__} has no name; give it one with @register_quantization(name)")
        return cls.registered_as

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `quantization_config`.  ConfigError names the field, its value and what is supported."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of the layer with this (unfused) checkpoint name; None: not quantised."""

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        """The method that a rule `pattern=name:key=value,...` asks for.  ConfigError for an unknown option."""
        raise ConfigError(
            f"{cls.get_name()} cannot be the method of a rule",
            code="not-a-target",
            fix="Choose another method.",
        )

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """How the attention module `prefix` is to store keys and values; None: the checkpoint does not say."""
        return None

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Told once, before any layer is made, what the checkpoint's headers hold; for what a config leaves open."""
        self.stored = tensors
        self.stored_modules = frozenset(name.rpartition(".")[0] for name in tensors)

    stored: Mapping[str, StoredTensor] = MappingProxyType({})
    stored_modules: frozenset[str] = frozenset()  # what the stored tensors belong to

    def stored_as_float(self, prefix: str) -> bool:
        """Tell whether the checkpoint holds this layer's weight as plain floats, whatever its config says of it."""
        weight = self.stored.get(f"{prefix}.weight")
        return weight is not None and weight.dtype in FLOATS

    def covers(self, layer: nn.Module, prefix: str, *tensors: str) -> bool:
        """Tell whether the format can be this layer's, by the layer's kind and by what the checkpoint holds for it.

        It can where the layer is linear, or the checkpoint has one of `tensors` (suffixes that no float layer has) for
        it; it cannot where the checkpoint holds the weight as plain floats.
        """
        packed = any(f"{prefix}.{name}" in self.stored for name in tensors)
        return (packed or kind_of(layer) == "linear") and not self.stored_as_float(prefix)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least CUDA compute capability (80 is 8.0) that the format needs; 0: none, the reference runs anywhere."""
        return 0

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Files beside config.json that may hold the settings of this format."""
        return []

    def skip_reason(self, tensor: str) -> str | None:
        """Why a tensor which no layer asks for may be skipped; None: it may not."""
        return None


_registry: dict[str, type[QuantizationConfig]] = {}
C = TypeVar("C", bound=type[QuantizationConfig])


def register_quantization(name: str) -> Callable[[C], C]:
    """Class decorator: make a `QuantizationConfig` known by `name`.  ValueError if the name is taken."""

    def register(cls: C) -> C:
        if name in _registry:
            raise ConfigError(
                f"the quantisation method {name!r} is registered already, by {fetch_factory_name(_registry[name])}",
                code="duplicate-method",
                fix="Choose another name.",
            )
        _registry[name], cls.registered_as = cls, name
        return cls

    return register


def get_quantization_config(name: str) -> type[QuantizationConfig]:
    """The format registered under `name`.  An unknown name is an error that lists what there is."""
    known = list_quantization_methods()
    if name not in _registry:
        raise ConfigError(
            f"unknown quantisation method {name!r}",
            code="unknown-method",
            expected=" or ".join(known),
            found=name,
            fix=nearest(str(name), known)
            or "This format is not supported; the layer would not be read as it is.",
        )
    return _registry[name]


def list_quantization_methods() -> list[str]:
    """The names of all formats, those of `quantization/formats/` included."""
    from pymllm.quantization.formats import load_formats

    load_formats()
    return sorted(_registry)
