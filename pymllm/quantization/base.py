"""The configs of weight formats: the interface that each implements, and the registry that knows them by name.

A config says which method each layer of a checkpoint has; `method.py` says what a method does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from pymllm.errors import ConfigError, fetch_factory_name, nearest
from pymllm.quantization.method import LinearMethodBase, QuantizeMethodBase, StoredTensor, kind_of
from pymllm.quantization.storage.settings import HarmlessSettings, refusing_unread
from pymllm.weights.spec import FLOATS

if TYPE_CHECKING:
    from typing_extensions import Self

    from pymllm.quantization.kv_cache import KVCacheMethodBase

__all__ = [
    "LinearMethodBase",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "get_quantization_config",
    "list_quantization_methods",
    "register_quantization",
]


class QuantizationConfig(ABC):
    """The interface of a format's config, which gives each layer its method by the layer's checkpoint name."""

    registered_as: ClassVar[str]
    # The settings that `from_config` need not read, with the reason: `storage/settings.py`.
    harmless: ClassVar[HarmlessSettings] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "from_config" in cls.__dict__:
            cls.from_config = classmethod(refusing_unread(cls.__dict__["from_config"].__func__))  # type: ignore

    @classmethod
    def get_name(cls) -> str:
        """Return the name that the class is registered under: the `quant_method` that it reads.  TypeError for none."""
        if not hasattr(cls, "registered_as"):
            raise TypeError(f"{cls.__name__} has no name; give it one with @register_quantization(name)")
        return cls.registered_as

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `quantization_config`.

        config: `Settings`, if not yet, by the time that a format sees it.
        ConfigError for what cannot be read: it names the field, its value and what is supported.  One, too, for every
        setting that the format neither reads nor has in `harmless`, unless it is empty.
        """

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method of the layer with this (unfused) checkpoint name, or None if it is not quantised."""

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        """Make the method that a rule `pattern=name:key=value,...` asks for.

        ConfigError for an unknown option, and for a format that can only be read.
        """
        raise ConfigError(
            f"{cls.get_name()} cannot be the method of a rule",
            code="not-a-target",
            fix="Choose another method.",
        )

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """Return how the attention module `prefix` stores keys and values, or None if the checkpoint does not say."""
        return None

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Receive the checkpoint's headers once, before any layer is built.

        From them a format settles what its config leaves open.  tensors: by name.
        """
        self.stored = tensors
        self.stored_modules = frozenset(name.rpartition(".")[0] for name in tensors)

    notes: tuple[str, ...] = ()  # what a plan says of the config besides
    stored: Mapping[str, StoredTensor] = MappingProxyType({})
    stored_modules: frozenset[str] = frozenset()  # the names that the stored tensors belong to

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
        """List the dtypes that activations may have beside weights of this format."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least CUDA compute capability that the format needs, times ten (80 is 8.0).

        0: it needs none, as the reference kernel runs anywhere.
        """
        return 0

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """List the files beside config.json that may hold the settings of this format."""
        return []

    def skip_reason(self, tensor: str) -> str | None:
        """Return why a tensor that no layer asks for may be skipped, or None if it may not."""
        return None


_registry: dict[str, type[QuantizationConfig]] = {}
C = TypeVar("C", bound=type[QuantizationConfig])


def register_quantization(name: str) -> Callable[[C], C]:
    """Make a `QuantizationConfig` known by `name`, as a class decorator.  ConfigError if the name is taken."""

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
    """Return the config registered under `name`.  ConfigError for an unknown name, with all names that there are."""
    known = list_quantization_methods()
    if name not in _registry:
        raise ConfigError(
            f"unknown quantisation method {name!r}",
            code="unknown-method",
            expected=" or ".join(known),
            found=name,
            fix=nearest(str(name), known)
            or "Use a checkpoint in one of these formats; this one's tensors would be read as something else.",
        )
    return _registry[name]


def list_quantization_methods() -> list[str]:
    """List the names of all formats: those of `quantization/formats/`, and those that a user has registered."""
    from pymllm.quantization.formats import load_formats

    load_formats()
    return sorted(_registry)
