"""The configs of weight formats: the interface that each implements, and the registry that knows them by name.

A config says which method each layer of a checkpoint has; `method.py` says what a method does.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from pymllm.errors import ConfigError, choices, fetch_factory_name, nearest, unknown_name
from pymllm.quantization.method import LinearMethodBase, QuantizeMethodBase, StoredTensor, kind_of
from pymllm.quantization.storage.kinds import checking_kinds
from pymllm.quantization.storage.settings import HarmlessSettings, refusing_unread
from pymllm.weights.loader import same_shape
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.spec import FLOATS, LinearShape, Span, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

    from pymllm.quantization.kv_cache import KVCacheMethodBase
    from pymllm.weights.report import Skip

__all__ = [
    "LinearMethodBase",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "get_quantization_config",
    "list_quantization_methods",
    "register_quantization",
]


# The suffixes that a layer's weight itself may have: one of them is there, or no weight is stored under the name.
WEIGHT_NAMES = ("weight", "qweight", "weight_packed", "W_q", "_weight_qdata", "blocks")
EXCLUDED = "stored so, although the config excludes it"
# Attributes of configs that say which layers are left out, or that are filled as layers ask.
NO_METHODS = ("modules_to_not_convert", "exclude_modules", "modules", "blocks", "ignored", "formats", "names")
INCLUDED = "stored so, although the config quantises it"


class QuantizationConfig(ABC):
    """The interface of a format's config, which gives each layer its method by the layer's checkpoint name.

    Where the config and the files disagree about a layer, the files have the last word, in every format: `covers` says
    whether the layer is quantised, `as_stored` which of the methods that the config speaks of reads what is stored.
    Both note what they overrule.
    """

    registered_as: ClassVar[str]
    # The settings that `from_config` need not read, with the reason: `storage/settings.py`.
    harmless: ClassVar[HarmlessSettings] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "from_config" in cls.__dict__:
            read = checking_kinds(cls.__dict__["from_config"].__func__)
            cls.from_config = classmethod(refusing_unread(read))  # type: ignore

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
        name, targets = cls.get_name(), list_target_methods()
        raise ConfigError(
            f"{name} cannot be the method of a rule, as pymllm only reads it",
            code="not-a-target",
            expected=choices(targets, name),
            found=name,
            fix=nearest(name, targets) or "Choose another method.",
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

    def see_names(self, names: ModuleNames) -> None:
        """Receive the other names of the model's modules, any of which the config may use."""
        self.names = names

    def spellings(self, prefix: str) -> tuple[str, ...]:
        """List the names by which the config may call a layer: in the model, as it is stored, in the writer's class."""
        return self.names.of(prefix)

    names: ModuleNames = ModuleNames()
    notes: tuple[str, ...] = ()  # what a plan says of the config besides
    stored: Mapping[str, StoredTensor] = MappingProxyType({})
    stored_modules: frozenset[str] = frozenset()  # the names that the stored tensors belong to

    @functools.cached_property
    def overruled(self) -> dict[str, str]:
        """Hold what the files have decided against the config, by layer, in the plan's words."""
        return {}

    def stored_as_float(self, prefix: str) -> bool:
        """Tell whether the checkpoint holds this layer's weight as plain floats, whatever its config says of it."""
        weight = self.stored.get(f"{prefix}.weight")
        return weight is not None and weight.dtype in FLOATS

    def covers(self, layer: nn.Module, prefix: str, *tensors: str, excluded: bool = False) -> bool:
        """Tell whether this layer is quantised: as it is stored, else as the config and the layer's kind have it.

        tensors: suffixes that no float layer has.  excluded: whether the config leaves the layer out by name.
        """
        asked = kind_of(layer) == "linear" and not excluded
        if self.stored_as_float(prefix):
            if asked:
                self.overruled[prefix] = INCLUDED
            return False
        codes = any(f"{prefix}.{name}" in self.stored for name in tensors)
        if codes and excluded:
            self.overruled[prefix] = EXCLUDED
        return codes or asked

    def as_stored(
        self,
        layer: nn.Module,
        prefix: str,
        said: LinearMethodBase | None,
        others: Iterable[LinearMethodBase | None],
    ) -> LinearMethodBase | None:
        """Return the method that reads what is stored for a layer which is quantised: `said`, else one of the others.

        said: what the config gives this layer; None: it leaves it out.  others: what it gives any layer.
        Where none of them reads the tensors, or nothing is stored, it is `said`, and matching reports what is wrong.
        """
        if prefix not in self.stored_modules or (said is not None and self.reads(said, layer, prefix)):
            return said
        for other in dict.fromkeys(others):
            if other is not None and other != said and self.reads(other, layer, prefix):
                told = f"stored so, although the config says {said.describe()}" if said else EXCLUDED
                self.overruled[prefix] = told
                return other
        return said

    def reads(self, method: LinearMethodBase, layer: nn.Module, prefix: str) -> bool:
        """Tell whether the checkpoint has all of a method's tensors for a layer, in dtypes and shapes that it takes.

        Shapes are compared where the layer knows its own.
        """
        shape: Any = getattr(layer, "shape", None)
        known = isinstance(shape, LinearShape) and prefix in shape.parts and not shape.together
        if known:
            shape = shape.part(shape.parts.index(prefix))
        else:
            shape = LinearShape(Span.full(1), (Span.full(1),), (prefix,), torch.float32)
        found: list[tuple[WeightSpec, StoredTensor]] = []
        for spec in method.weight_specs(shape):
            names = (f"{prefix}.{name}" for name in (spec.name, *spec.aliases))
            name = next((name for name in names if name in self.stored), None)
            if name is None:
                return False
            found.append((spec, self.stored[name]))
        if any(tensor.dtype not in spec.dtypes for spec, tensor in found):
            return False
        sides = shape.in_features, shape.out_features
        return not known or all(same_shape(tuple(t.shape), spec.source_shape(*sides)) for spec, t in found)

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

    def settings_beside(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Spell settings of a file beside config.json as config.json has them; None: they are of another format.

        name: of their format.
        """
        return settings if name == self.get_name() else None

    def means_the_same(self, other: Self) -> bool:
        """Tell whether another config gives the same methods.  Which layers it leaves out, the tensors say."""
        mine, theirs = ({k: v for k, v in vars(c).items() if k not in NO_METHODS} for c in (self, other))
        return mine == theirs

    @classmethod
    def get_config_keys(cls) -> list[str]:
        """List the keys of config.json, beside `quantization_config`, that may hold the settings of this format."""
        return []

    @classmethod
    def claims(cls, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bool:
        """Tell whether settings that name no quant_method are this format's, by their keys and by what is stored."""
        return False

    def skip_reason(self, tensor: str) -> Skip | str | None:
        """Return why a tensor that no layer asks for may be skipped, or None if it may not.

        tensor: its exact name.  A `Skip` where the content proves it, which loading looks at; a reason alone where the
        name does.
        """
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
            expected=choices(known, name),
            found=name,
            fix=nearest(str(name), known)
            or "Use a checkpoint in one of these formats; this one's tensors would be read as something else.",
        )
    return _registry[name]


def get_target_config(name: str) -> type[QuantizationConfig]:
    """Return the config registered under `name`, for a rule.  ConfigError for an unknown name."""
    if name not in list_quantization_methods():
        raise unknown_name("quantisation method", name, list_target_methods(), code="unknown-method")
    return _registry[name]


def list_target_methods() -> list[str]:
    """List the names of the formats that a rule may ask for."""
    base = QuantizationConfig.from_options.__func__  # type: ignore[attr-defined]
    named = ((name, _registry[name].from_options) for name in list_quantization_methods())
    return [name for name, reader in named if getattr(reader, "__func__", reader) is not base]


def list_quantization_methods() -> list[str]:
    """List the names of all formats: those of `quantization/formats/`, and those that a user has registered."""
    from pymllm.quantization.formats import load_formats

    load_formats()
    return sorted(_registry)
