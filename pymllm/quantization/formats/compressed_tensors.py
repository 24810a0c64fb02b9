"""compressed-tensors, the format of llm-compressor.  Its config gives each layer a method of `compressed_linear.py`:

    pack-quantized                          integers of 1 to 8 bits, packed
    int-quantized                           int8, often with int8 activations
    float-quantized                         float8 e4m3
    naive-quantized                         int8 or float8, by the weights' type
    nvfp4-pack-quantized                    fp4 in groups of 16
    mxfp4-pack-quantized                    fp4 in groups of 32
    mxfp8-quantized                         float8 e4m3 in groups of 32, whose scales are powers of two

A group whose `weights` are null is for attention: it says how keys, values and queries are rounded.
The page with the layouts: quantization/compressed_tensors/README.md; for float8, quantization/fp8/README.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, nearest
from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import KVCacheMethodBase, read_kv_scheme
from pymllm.quantization.method import LinearMethodBase, StoredTensor, kind_of
from pymllm.quantization.storage.compressed_linear import (
    MX_GROUP,
    FloatQuantizedLinearMethod,
    Fp4LinearMethod,
    IntQuantizedLinearMethod,
)
from pymllm.quantization.storage.compressed_transforms import refuse_online_transforms
from pymllm.quantization.storage.fields import (
    compile_pattern,
    is_block,
    read_names,
    refuse_other_than_zeros,
    unsupported,
)
from pymllm.quantization.storage.packing import unpack_words
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import (
    AUTOROUND,
    KV_SCHEME,
    OBSERVERS,
    REFUSED,
    RUNNING,
    STORED_DTYPE,
    STORED_LAYER,
    SWITCH,
    WRITER,
)
from pymllm.weights.report import Skip
from pymllm.weights.spec import FLOATS

_unsupported = functools.partial(unsupported, "compressed-tensors")

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
CLASS_NAME = re.compile(r"[A-Z]\w*")
CLASSES = ("Linear", "Embedding")  # of the modules whose weights a group may quantise
STORED = ("weight_packed", "weight_scale")  # a module with a tensor of such a name is quantised
# These store the group of every input; "weight" and "static" only change how the writer calibrates.
ACT_ORDER = ("group", "dynamic", True)


# Of the weights, or the activations, of a group; a reader looks at these in some strategies alone.
_CODES = {
    **OBSERVERS,
    **harmless(STORED_DTYPE, "scale_dtype zp_dtype"),
    **harmless("the strategy has no groups", "group_size", only=(-1,)),
    **harmless("the strategy has no blocks", "block_structure", only=()),
    **harmless("the order of inputs is that of the groups", "actorder", only=("weight", "static", False)),
}
HARMLESS = {
    **AUTOROUND,
    **below("config_groups.*.weights config_groups.*.input_activations", _CODES),
    **below("config_groups.*.weights", harmless("weights are stored in codes", "dynamic", only=(False,))),
    **below("kv_cache_scheme", KV_SCHEME),
    # Of a group for attention, whose weights are null.
    **below(
        "config_groups.*.input_activations config_groups.*.output_activations",
        harmless("read when the cache is made", "type num_bits symmetric dynamic strategy"),
    ),
    **harmless("attention has no stored codes", "config_groups.*.format", only=(*FORMATS, "dense")),
    **below(
        "transform_config.config_groups.*",
        harmless("folded into the weights", "type head_dim precision randomize requires_grad"),
        below("apply.*", harmless("folded into the weights", "inverse targets ignore")),
    ),
    **below(
        "sparsity_config",
        harmless("a dense file has every weight", "targets ignore global_sparsity sparsity_structure"),
        harmless("a dense file has every weight", "registry_requires_subclass"),
    ),
    **harmless("no group has stored codes that it would describe", "format", only=(*FORMATS, "dense")),
    **harmless(WRITER, "version"),
    **harmless("a figure about the files", "global_compression_ratio"),
    **harmless(STORED_LAYER, "quantization_status"),
    **harmless(RUNNING, "run_compressed dequantize use_optimized_inference", only=SWITCH),
    **harmless("float8 is e4m3fn", "fp8_dtype_flavor", only=("float8_e4m3fn",)),
    **harmless(
        f"queries are rounded while the model runs, {REFUSED}", "attention_input_activations", only=()
    ),
}


@dataclass(frozen=True)
class Group:
    """One of `config_groups`: the layers that it targets, and their method.

    method: None where `weights` are null; the group is for attention then.  attention: how it rounds its inputs, keys
    and values too.
    open_symmetry: whether the config does not say if weights have zero points, so that the tensors do.
    """

    name: str
    targets: tuple[str, ...]
    method: LinearMethodBase | None
    attention: Any = None
    open_symmetry: bool = False


@register_quantization("compressed-tensors")
@dataclass(kw_only=True, eq=False)
class CompressedTensorsConfig(QuantizationConfig):
    """`quantization_config` of compressed-tensors: config_groups with targets, ignore, format, kv_cache_scheme."""

    groups: Sequence[Group]
    ignore: Sequence[str] = ()
    kv_cache_scheme: Any = None
    notes: tuple[str, ...] = ()
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsConfig:
        sparsity = config.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            raise _unsupported("sparsity_config", sparsity, "none, or format dense")
        folded = refuse_online_transforms(config.get("transform_config"))
        settings = config.get("config_groups")
        # A config without groups quantises the cache of keys and values alone.
        if not isinstance(settings, Mapping) or not (settings or config.get("kv_cache_scheme")):
            raise _unsupported("config_groups", settings, "an object of groups")
        groups = [_read_group(name, group, config.get("format")) for name, group in settings.items()]
        _refuse_conflicts(groups)
        return cls(
            groups=groups,
            ignore=read_names(config, "ignore", regex="re:"),
            kv_cache_scheme=config.get("kv_cache_scheme"),
            notes=folded,
        )

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        super().see_checkpoint(tensors)
        self.has_shapes = any(name.endswith(".weight_shape") for name in tensors)  # then every layer has one
        modules = {name for module in self.stored_modules for name in self.spellings(module)}
        for group in self.groups:
            for target in group.targets:
                if group.method is None or target.startswith("re:") or target in (*CLASSES, "lm_head"):
                    continue  # a tied head has no tensors of its own
                if target not in modules:
                    raise ConfigError(
                        f"the target {target!r} is not a layer of this checkpoint",
                        code="quantization-config",
                        file="config.json",
                        tensor=f"quantization_config.config_groups.{group.name}.targets",
                        expected="Linear, Embedding, a layer's name, or re: and a regular expression",
                        found=repr(target),
                        fix=nearest(target, [*CLASSES, *modules]) or None,
                    )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        # A tied head has no tensors but the embedding's.
        tied = getattr(layer, "tied_to", None) is not None
        of_class = "Embedding" if tied or kind_of(layer) == "embedding" else "Linear"
        found = self._group(prefix, of_class)
        names = self.spellings(prefix)
        excluded = of_class in self.ignore
        excluded |= any(_targets(pattern, name) for pattern in self.ignore for name in names)
        excluded |= found is None or found.method is None
        if not self.covers(layer, prefix, "weight_scale", "weight_packed", excluded=excluded):
            return None
        said = None if found is None or excluded else self._completed(found, prefix, of_class)
        if said is not None and len(self.groups) == 1:
            return said
        return self.as_stored(
            layer, prefix, said, (self._completed(group, prefix, of_class) for group in self.groups)
        )

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """Read `kv_cache_scheme`; without one, how a group for this attention module rounds its keys and values."""
        module = prefix.rpartition(".")[0]
        names = self.spellings(module)
        groups = (group for group in self.groups if group.method is None and _means_attention(group, names))
        return read_kv_scheme(self.kv_cache_scheme or next((group.attention for group in groups), None))

    def _group(self, prefix: str, of_class: str) -> Group | None:
        """Find the layer's group: one that names the layer, else one with a pattern for it, else one for its class.

        A group for attention is no layer's that is stored quantised, though its pattern may fit the layer's name.
        """
        stored = any(f"{prefix}.{name}" in self.stored for name in STORED)
        groups = [group for group in self.groups if group.method is not None or not stored]
        ranked = [
            (_rank(target, name, of_class), target, group)
            for group in groups
            for target in group.targets
            for name in self.spellings(prefix)
        ]
        hits = [entry for entry in ranked if entry[0] is not None]
        return min(hits, key=lambda entry: entry[:2])[2] if hits else None

    def _completed(self, group: Group, prefix: str, of_class: str) -> LinearMethodBase | None:
        """Complete a group's method with what the config leaves open and the checkpoint's headers say."""
        scale = self.stored.get(f"{prefix}.weight_scale")
        method: Any = group.method
        if method is not None and of_class == "Embedding":  # its inputs are ids
            method = replace(method, activations="float")
            if isinstance(method, Fp4LinearMethod):
                method = replace(method, global_activations=False)
        if isinstance(method, IntQuantizedLinearMethod):
            if group.open_symmetry and f"{prefix}.weight_zero_point" in self.stored:
                method = replace(method, symmetric=False)
            if scale is not None and scale.dtype in FLOATS:
                method = replace(method, scale_dtype=scale.dtype)
            if method.packed and self.stored:
                method = replace(method, has_shape=self.has_shapes)
            if method.index == "absent" and f"{prefix}.weight_g_idx" in self.stored:
                method = replace(method, index="in order")
        elif isinstance(method, Fp4LinearMethod):
            if scale is not None and scale.dtype is torch.float8_e8m0fnu:
                method = replace(method, scale_dtype=scale.dtype)
            if method.kind == "mxfp4" and f"{prefix}.input_global_scale" in self.stored:
                method = replace(method, global_activations=of_class != "Embedding")
        return method  # type: ignore[no-any-return]

    def skip_reason(self, tensor: str) -> Skip | str | None:
        prefix, _, suffix = tensor.rpartition(".")
        if suffix in ("weight_zero_point", "input_zero_point") and f"{prefix}.weight_scale" in self.stored:
            packed = suffix == "weight_zero_point" and f"{prefix}.weight_packed" in self.stored
            found = self._group(prefix, "Linear") or self._group(prefix, "Embedding")
            bits = found.method.bits if found and isinstance(found.method, IntQuantizedLinearMethod) else 0
            scale = self.stored.get(f"{prefix}.weight_scale")
            outputs = 0 if scale is None or not scale.shape else scale.shape[0]
            refuse = functools.partial(_refuse_zero_points, bits=bits if packed else 0, outputs=outputs)
            return Skip("a zero point of symmetric quantisation, which does not use any", refuse)
        return None


def _refuse_zero_points(stored: Tensor, bits: int, outputs: int) -> str | None:
    """Return how many stored zero points are not neutral, or None.

    bits: of the fields that are packed in int32 words along the outputs, raised by 2^(bits-1); 0: they are not packed.
    """
    if not bits or stored.dtype is not torch.int32:
        return refuse_other_than_zeros(stored)
    fields = unpack_words(stored.t(), bits)[:, :outputs]  # [I/G, O]
    return refuse_other_than_zeros(fields.to(torch.int16) - 2 ** (bits - 1))


def _rank(target: str, prefix: str, of_class: str) -> int | None:
    """Rank how closely a target means this layer: 0 by name, 1 by pattern, 2 by class; None if it does not."""
    if target == of_class:
        return 2
    return int(target.startswith("re:")) if _targets(target, prefix) else None


def _targets(pattern: str, prefix: str) -> bool:
    """Tell whether a target or ignore entry means this layer: its name, or `re:` and a pattern for its start."""
    if pattern.startswith("re:"):
        return compile_pattern(pattern[3:], "targets or ignore").match(prefix) is not None
    return pattern == prefix


def _means_attention(group: Group, names: Iterable[str]) -> bool:
    """Tell whether a group means this attention module: by a name of it, its class, or its projection of keys."""
    return any(
        "attention" in target.lower() if CLASS_NAME.fullmatch(target) else _targets(target, name)
        for target in group.targets
        for module in names
        for name in (module, f"{module}.k_proj")
    )


def _refuse_conflicts(groups: Sequence[Group]) -> None:
    """Raise ConfigError for a target that two groups give different methods."""
    first: dict[str, Group] = {}
    for group in groups:
        for target in group.targets:
            other = first.setdefault(target, group)
            if other.method != group.method:
                raise _unsupported(
                    f"config_groups.{group.name}.targets",
                    target,
                    f"targets that no other group has; {other.name} has it too",
                )


def _read_group(name: str, group: Any, default_format: Any) -> Group:
    at = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise _unsupported(at, group, "an object")
    weights, outputs = group.get("weights"), group.get("output_activations")
    targets = read_names(group, "targets", regex="re:")
    if weights is None and not set(targets) & set(CLASSES):
        return Group(name, targets, None, group.get("input_activations") or outputs)
    if outputs:
        raise _unsupported(f"{at}.output_activations", outputs, "null")
    if not isinstance(weights, Mapping):
        raise _unsupported(f"{at}.weights", weights, "an object")
    file_format = group.get("format") or default_format
    if file_format not in FORMATS:
        raise _unsupported(f"{at}.format", file_format, " or ".join(FORMATS))
    element = (weights.get("type"), weights.get("num_bits"))
    if file_format == "naive-quantized":
        file_format = "float-quantized" if element[0] == "float" else "int-quantized"
    activations = _Activations(f"{at}.input_activations", group.get("input_activations"))
    read = {
        "float-quantized": _read_float8,
        "nvfp4-pack-quantized": _read_fp4,
        "mxfp4-pack-quantized": _read_fp4,
        "mxfp8-quantized": _read_mxfp8,
    }.get(file_format, _read_int)
    method = read(f"{at}.weights", weights, file_format, activations)
    return Group(name, targets, method, open_symmetry="symmetric" not in weights)


def _read_float8(
    at: str, weights: Mapping[str, Any], file_format: str, activations: _Activations
) -> LinearMethodBase:
    _expect(at, weights, type="float", num_bits=8)
    _expect_symmetric(at, weights)
    strategy = weights.get("strategy")
    if strategy == "block":
        structure: Any = weights.get("block_structure")
        if not is_block(structure):
            raise _unsupported(f"{at}.block_structure", structure, "two positive integers")
        block = (structure[0], structure[1])
    elif strategy == "group":
        if type(weights.get("group_size")) is not int or weights["group_size"] <= 0:
            raise _unsupported(
                f"{at}.group_size", weights.get("group_size"), "a positive integer with strategy group"
            )
        block = (1, weights["group_size"])
    elif strategy in ("tensor", "channel"):
        block = TENSOR if strategy == "tensor" else CHANNEL
    else:
        raise _unsupported(f"{at}.strategy", strategy, "tensor, channel, group or block")
    return FloatQuantizedLinearMethod(block, activations.read("float", 8, block[1]))


def _read_int(
    at: str, weights: Mapping[str, Any], file_format: str, activations: _Activations
) -> LinearMethodBase:
    _expect(at, weights, type="int")
    bits = weights.get("num_bits")
    if type(bits) is not int or not 1 < bits <= 8:
        raise _unsupported(f"{at}.num_bits", bits, "2 to 8")
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy not in ("tensor", "channel", "group"):
        raise _unsupported(f"{at}.strategy", strategy, "tensor, channel or group")
    if strategy == "group" and (type(group_size) is not int or group_size <= 0):
        raise _unsupported(f"{at}.group_size", group_size, "a positive integer with strategy group")
    act_order = weights.get("actorder")
    if act_order not in (*ACT_ORDER, "weight", "static", False, None):
        raise _unsupported(f"{at}.actorder", act_order, "group, weight, static, dynamic or null")
    in_order = strategy != "group" or act_order not in ACT_ORDER or act_order is None
    size: int = group_size if strategy == "group" else 0  # type: ignore[assignment]
    return IntQuantizedLinearMethod(
        bits,
        size,
        _read_bool(at, weights, "symmetric", True),
        file_format == "pack-quantized",
        per_tensor=strategy == "tensor",
        activations=activations.read("int", 8, size),
        index="absent" if in_order else "act order",
    )


def _read_fp4(
    at: str, weights: Mapping[str, Any], file_format: str, activations: _Activations
) -> LinearMethodBase:
    kind: Any = file_format.removesuffix("-pack-quantized")
    size, strategies = (16, ("tensor_group",)) if kind == "nvfp4" else (32, ("group",))
    _expect(at, weights, type="float", num_bits=4, group_size=size)
    _expect_symmetric(at, weights)
    if weights.get("strategy") not in strategies:
        raise _unsupported(f"{at}.strategy", weights.get("strategy"), " or ".join(strategies))
    quantised = activations.read("float", 4, size)
    return Fp4LinearMethod(kind, quantised, kind == "nvfp4" and quantised != "float")


def _read_mxfp8(
    at: str, weights: Mapping[str, Any], file_format: str, activations: _Activations
) -> LinearMethodBase:
    _expect(at, weights, type="float", num_bits=8, strategy="group", group_size=MX_GROUP)
    _expect_symmetric(at, weights)
    quantised = activations.read("float", 8, MX_GROUP)
    if quantised not in ("float", "group"):
        raise _unsupported(f"{activations.at}.strategy", quantised, "group")
    quantised = "group mx" if quantised == "group" else "float"
    return FloatQuantizedLinearMethod((1, MX_GROUP), quantised, exponent_bytes=True)


class _Activations:
    """`input_activations` of a group.  at: their path in the config, for messages."""

    def __init__(self, at: str, settings: Any) -> None:
        self.at, self.settings = at, settings

    def read(self, element: str, bits: int, group_size: int) -> Activations:
        """Read how activations are quantised, beside weights of this element, bits and group size.

        They must be of the weights' own type, but integers may have zero points, and beside integer weights they may
        be fp8 with a scale for each token.  ConfigError for anything else.
        """
        at, settings = self.at, self.settings
        if settings is None:
            return "float"
        if not isinstance(settings, Mapping):
            raise _unsupported(at, settings, "null, or an object")
        strategy, dynamic = settings.get("strategy"), settings.get("dynamic")
        if element == "int" and settings.get("type") == "float":
            _expect(at, settings, num_bits=8, strategy="token", dynamic=True)
            _expect_symmetric(at, settings)
            return "token fp8"
        _expect(at, settings, type=element, num_bits=bits)
        symmetric = element != "int" or _read_bool(at, settings, "symmetric", True)
        if element != "int":
            _expect_symmetric(at, settings)
        if bits == 4:
            kind = "tensor_group" if group_size == 16 else "group"
            _expect(at, settings, strategy=kind, group_size=group_size)
            if dynamic not in (True, "local"):
                raise _unsupported(f"{at}.dynamic", dynamic, "true or local")
            return "group"
        if not dynamic:
            if strategy not in ("tensor", None):
                raise _unsupported(f"{at}.strategy", strategy, "tensor, where dynamic is false")
            return "static" if symmetric else "static asym"
        known: dict[Any, Activations] = {"token": "token", "tensor": "tensor", "group": "group"}
        if not symmetric:
            known = {"token": "token asym", "tensor": "tensor asym"}
        if not isinstance(strategy, str) or strategy not in known:
            raise _unsupported(f"{at}.strategy", strategy, " or ".join(known))
        if strategy == "group":
            _expect(at, settings, group_size=group_size)
        return known[strategy]


def _expect(at: str, settings: Mapping[str, Any], **expected: Any) -> None:
    """Raise ConfigError for settings that have another value in any of these fields."""
    for field, value in expected.items():
        if settings.get(field) != value:
            raise _unsupported(f"{at}.{field}", settings.get(field), repr(value))


def _expect_symmetric(at: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings with zero points.  Where `symmetric` is absent, there are none."""
    if settings.get("symmetric", True) is not True:
        raise _unsupported(f"{at}.symmetric", settings.get("symmetric"), "True")


def _read_bool(at: str, settings: Mapping[str, Any], field: str, default: bool) -> bool:
    value = settings.get(field, default)
    if type(value) is not bool:
        raise _unsupported(f"{at}.{field}", value, "true or false")
    return value
