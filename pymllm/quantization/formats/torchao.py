"""torchao 0.15 and later, in safetensors: int8, int4, intx and float8 weights.  Nothing of torchao is imported.

A layer X has no tensor X.weight. It has the tensors of a subclass of torch's, which the file's metadata describes under
"X.weight":

    Int8Tensor                 X._weight_qdata int8 [O, I], _weight_scale [O/b0, I/b1], _weight_zero_point int8, zeros
    IntxUnpackedToInt8Tensor   the same, with codes of 1 to 8 bits, groups of inputs, and any zero points
    Int4Tensor                 X._weight_qdata [O, I/2] signed nibbles, the low one first; _weight_scale [I/G, O],
                               _weight_zero_point [I/G, O] float, which is added
    Float8Tensor               X._weight_qdata float8_e4m3fn [O, I], _weight_scale float32 [O/b0, I/b1]

w = (qdata - zero_point) * scale; of an Int4Tensor qdata * scale + zero_point. The page with the layouts:
quantization/torchao/README.md.
"""

# I in_features, O out_features, G group_size, b0 x b1 the block that shares a scale

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import CheckpointError
from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations, CanonicalWeight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase, StoredTensor
from pymllm.quantization.storage.fields import is_block, is_skipped, read_names, unsupported
from pymllm.quantization.storage.fp8_linear import E4M3LinearMethod
from pymllm.quantization.storage.groups import rows_of_parts
from pymllm.quantization.storage.packing import refuse_wide_codes, unpack_nibbles_low_first
from pymllm.quantization.storage.settings import HarmlessSettings, Settings
from pymllm.quantization.storage.torchao_settings import HARMLESS, METADATA_HARMLESS, READ_LATER
from pymllm.weights.json_text import parse_json_object
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec

_unsupported = functools.partial(unsupported, "torchao")

QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
INT8, INTX, INT4, FLOAT8 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor"
KINDS = (INT8, INTX, INT4, FLOAT8)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
SQUARE = (128, 128)  # the only block of several rows that torchao makes, where nothing says another


@dataclass(frozen=True)
class TorchAOIntLinearMethod(LinearMethodBase):
    """Weights of signed codes, one in each int8.

    bits: of the codes.  block: the (outputs, inputs) that share a scale; TENSOR, CHANNEL, or one row's group.
    scale_dtype, zero_dtype: of the tensors; None: there are no zero points.
    symmetric: whether all zero points must be zero.
    """

    bits: int
    block: tuple[int, int]
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype | None
    symmetric: bool
    activations: Activations = "float"
    name: ClassVar[str] = "torchao"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        dims: tuple[Dim, ...] = (PART,) if self.block == TENSOR else (OUT, IN.every(self.block[1]))
        specs: tuple[WeightSpec, ...] = (
            WeightSpec(QDATA, torch.int8, (OUT, IN), refuse=refuse_wide_codes(self.bits)),
            WeightSpec(SCALE, self.scale_dtype, dims, accepts=FLOATS, scale=True),
        )
        if self.zero_dtype is not None:
            wide = refuse_wide_codes(self.bits) if self.zero_dtype is torch.int8 else None
            specs += (WeightSpec(ZERO, self.zero_dtype, dims, refuse=wide),)
        return specs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        middle = 2 ** (self.bits - 1)
        # The sum wraps around for 8 bits, which is right.
        codes = (tensors[QDATA] + middle).view(torch.uint8)
        scales, zeros = self._rows(tensors[SCALE], shape), tensors.get(ZERO)
        group = codes.shape[1] // scales.shape[1]
        weight = IntWeight(codes, scales, None, self.bits, group, activations=self.activations)
        if zeros is None:
            return weight
        zeros = self._rows(zeros, shape)
        if self.symmetric:
            if not zeros.is_meta and bool(zeros.any()):
                raise CheckpointError(
                    f"an {INT8} has zero points, and this subclass should only have zeros there",
                    code="zero-points",
                    tensor=f"{shape.name}.{ZERO}",
                    expected="zeros",
                    found=f"{int((zeros != 0).sum())} other values",
                )
            return weight
        if zeros.is_floating_point():
            offsets = -(zeros.float() + middle) * scales.float()
            return replace(weight, offsets=offsets)
        return replace(weight, zeros=(zeros + middle).view(torch.uint8))

    def _rows(self, values: Tensor, shape: LinearShape) -> Tensor:
        """Return values of groups [O, I/G] as they are, and give each part's value [P] to all of its rows [O, 1]."""
        return rows_of_parts(values, shape).unsqueeze(1) if self.block == TENSOR else values

    def describe(self) -> str:
        per = {TENSOR: "tensor", CHANNEL: "row"}.get(self.block, f"group of {self.block[1]}")
        return f"torchao int{self.bits} per {per}, activations {self.activations}"


@dataclass(frozen=True)
class TorchAOInt4LinearMethod(LinearMethodBase):
    """Weights of signed codes, two in each byte.

    group: how many inputs share a scale; 0: the whole row.  qdata_dtype, scale_dtype: of the tensors.
    """

    group: int
    qdata_dtype: torch.dtype = torch.int8
    scale_dtype: torch.dtype = torch.bfloat16
    name: ClassVar[str] = "torchao"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups = IN.every(self.group)
        return (
            WeightSpec(QDATA, self.qdata_dtype, (OUT, IN.packed(2))),
            WeightSpec(SCALE, self.scale_dtype, (groups, OUT), accepts=FLOATS, scale=True),
            WeightSpec(ZERO, self.scale_dtype, (groups, OUT), accepts=FLOATS),
        )

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        codes = (
            unpack_nibbles_low_first(tensors[QDATA].view(torch.uint8)) ^ 8
        )  # two's complement to an offset of 8
        scales, zeros = (tensors[name].t().contiguous() for name in (SCALE, ZERO))
        offsets = zeros.float() - 8 * scales.float()
        return IntWeight(codes, scales, None, 4, codes.shape[1] // scales.shape[1], offsets=offsets)

    def describe(self) -> str:
        return f"torchao int4 g{self.group or 'row'}"


@dataclass(frozen=True)
class TorchAOFp8LinearMethod(E4M3LinearMethod):
    """float8 weights under torchao's names.  The fields are `E4M3LinearMethod`'s."""

    name: ClassVar[str] = "torchao"
    weight_name: ClassVar[str] = QDATA

    @property
    def scale_names(self) -> tuple[str, ...]:
        return (SCALE,)


@register_quantization("torchao")
@dataclass(kw_only=True, eq=False)
class TorchAOConfig(QuantizationConfig):
    """`quantization_config` of torchao: quant_type, modules_to_not_convert.  The files' metadata, if any, decides.

    metadata: of all files together.
    """

    quant_type: Mapping[str, Any]
    modules_to_not_convert: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TorchAOConfig:
        quant_type = config.get("quant_type")
        if not isinstance(quant_type, Mapping) or not isinstance(quant_type.get("default"), Mapping):
            raise _unsupported("quant_type", quant_type, "an object with default, as torchao 0.15 writes it")
        _note_fields(quant_type["default"].get("_data"))
        return cls(
            quant_type=quant_type["default"],
            modules_to_not_convert=read_names(config, "modules_to_not_convert", regex=""),
        )

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Receive the headers and gather all files' metadata: a weight's need not be in the file of its tensors."""
        super().see_checkpoint(tensors)
        files = {
            id(file): file
            for tensor in tensors.values()
            if (file := getattr(tensor, "file", None)) is not None
        }
        for file in files.values():
            self.metadata |= file.metadata

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        data, scale, zero = (self.stored.get(f"{prefix}.{name}") for name in (QDATA, SCALE, ZERO))
        excluded = is_skipped(self.spellings(prefix), self.modules_to_not_convert)
        if not self.covers(layer, prefix, QDATA, excluded=excluded):
            return None
        if data is None or scale is None:
            raise CheckpointError(
                "the layer's tensors are not in the checkpoint, and without them its layout is unknown",
                code="torchao-layout",
                tensor=f"{prefix}.{QDATA}",
                expected=f"{QDATA} and {SCALE}, as torchao 0.15 writes them",
            )
        kind, settings = self._describe(prefix)
        if kind == INTX and zero is None:
            raise CheckpointError(
                "the layer's zero points are not in the checkpoint, and this subclass always has some",
                code="missing",
                tensor=f"{prefix}.{ZERO}",
                expected=f"{QDATA}, {SCALE} and {ZERO}",
            )
        if data.dtype is None or scale.dtype is None:
            raise _unsupported("qdata", "elements of less than a byte", "whole bytes", within=f"{prefix}.")
        # A dtype that the subclass cannot have is not taken over, so that matching reports it.
        scale_dtype = scale.dtype if scale.dtype in FLOATS else torch.float32
        if kind == INT4:
            group = _group_of_int4(prefix, settings, tuple(data.shape), tuple(scale.shape))
            in_bytes = data.dtype if data.dtype in (torch.int8, torch.uint8) else torch.int8
            return TorchAOInt4LinearMethod(group, in_bytes, scale_dtype)
        block = _block(prefix, settings, tuple(data.shape), tuple(scale.shape))
        activations = _activations(prefix, settings, kind)
        if kind == FLOAT8:
            return TorchAOFp8LinearMethod(block, activations)
        if block[0] > 1:
            raise _unsupported("block_size", list(block), "one row, or the whole tensor", within=f"{prefix}.")
        bits = 8 if kind == INT8 else _bits(prefix, settings)
        zero_dtype = None if zero is None else zero.dtype
        if zero_dtype is not None and zero_dtype not in (torch.int8, *(FLOATS if kind == INTX else INTEGERS)):
            zero_dtype = torch.int8
        return TorchAOIntLinearMethod(bits, block, scale_dtype, zero_dtype, kind == INT8, activations)

    def _describe(self, prefix: str) -> tuple[str, Mapping[str, Any]]:
        """Return the subclass of a layer's weight and its attributes, from the metadata, else from the config."""
        text, described = self.metadata.get(f"{prefix}.weight"), None
        if text is None:
            kind = _kind_of_config(self.quant_type)
            settings: Any = self.quant_type.get("_data")
        else:
            try:
                raw = text.encode("utf-8", "surrogatepass")
                parsed = parse_json_object(raw, Path(f"{prefix}.weight"), "metadata")
                described = Settings(parsed, file="the files' metadata", root=f"{prefix}.weight")
                kind, settings = described["_type"], described["_data"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"the file's metadata of the weight cannot be read: {error!r}",
                    code="torchao-metadata",
                    tensor=f"{prefix}.weight",
                    expected="JSON with _type and _data",
                    found=text[:200],
                ) from None
        if not isinstance(kind, str) or kind not in KINDS or not isinstance(settings, Mapping):
            raise _unsupported("_type", kind, " or ".join(KINDS), file="metadata", within=f"{prefix}.weight.")
        if described is not None:
            _note_fields(settings)
            described.refuse_unread("torchao", METADATA_HARMLESS)
        return kind, settings


def _note_fields(settings: Any) -> None:
    """Count as read what is asked for when a layer's method is made."""
    for name in READ_LATER if isinstance(settings, Mapping) else ():
        settings.get(name)


def _kind_of_config(quant_type: Mapping[str, Any]) -> str:
    """Name the subclass that a config class of torchao makes."""
    name = str(quant_type.get("_type"))
    starts = {
        "Int8WeightOnly": INT8,
        "Int8DynamicActivationInt8": INT8,
        "Int4WeightOnly": INT4,
        "Float8": FLOAT8,
    }
    starts |= {"Intx": INTX, "Int8DynamicActivationIntx": INTX}
    return next((kind for start, kind in starts.items() if name.startswith(start)), name)


def _declared_block(prefix: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read `block_size` of a subclass: the (outputs, inputs) that share a scale; None: it is not declared."""
    declared = settings.get("block_size")
    if declared is None:
        return None
    if not is_block(list(declared) if isinstance(declared, (list, tuple)) else declared):
        raise _unsupported(
            "block_size", declared, "two positive integers", file="metadata", within=f"{prefix}.weight."
        )
    return declared[0], declared[1]


def _group_of_int4(
    prefix: str, settings: Mapping[str, Any], data: tuple[int, ...], scale: tuple[int, ...]
) -> int:
    """Find how many inputs share a scale [I/G, O] of codes [O, I/2]; 0: the whole row."""
    declared, inputs = _declared_block(prefix, settings), 2 * data[-1] if data else 0
    if declared is not None:
        if declared[0] != 1:
            raise _unsupported(
                "block_size", list(declared), "one row", file="metadata", within=f"{prefix}.weight."
            )
        return 0 if declared[1] == inputs else declared[1]
    groups = scale[0] if scale else 1
    return 0 if groups <= 1 else inputs // groups


def _block(
    prefix: str, settings: Mapping[str, Any], data: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[int, int]:
    """Find the (outputs, inputs) that share a scale; a side of 0 is the whole axis.

    What the subclass declares decides, and the scale must have its shape. Where it declares nothing, the scale's shape
    does: one for the tensor, for each row or group of a row, or for each square block.
    """
    declared = _declared_block(prefix, settings)
    if declared is not None and len(data) == 2:
        if declared[0] >= data[0] and declared[1] >= data[1] and math.prod(scale) == 1:
            return TENSOR
        return declared[0], 0 if declared[1] >= data[1] else declared[1]
    if len(scale) == 0 or math.prod(scale) == 1:
        return TENSOR
    if len(data) != 2 or len(scale) != 2 or 0 in scale:
        raise _unsupported(
            SCALE, list(scale), f"two dimensions that divide {list(data)}", within=f"{prefix}."
        )
    rows, columns = -(-data[0] // scale[0]), -(-data[1] // scale[1])
    if rows > 1 and (rows, columns) != SQUARE:
        raise _unsupported(
            SCALE,
            list(scale),
            f"one value, [{data[0]}, groups], or one for each block of {list(SQUARE)}",
            within=f"{prefix}.",
        )
    return rows, 0 if scale[1] == 1 else columns


def _bits(prefix: str, settings: Mapping[str, Any]) -> int:
    target = settings.get("target_dtype", settings.get("weight_dtype"))
    name = target.get("_data") if isinstance(target, Mapping) else target
    if name not in [f"int{bits}" for bits in range(1, 9)]:
        raise _unsupported("target_dtype", target, "int1 to int8", within=f"{prefix}.weight.")
    return int(str(name)[3:])


def _activations(prefix: str, settings: Mapping[str, Any], kind: str) -> Activations:
    """Read how activations are quantised: `act_quant_kwargs`, or of intx `activation_quantization`."""
    if kind == INTX:
        asked = settings.get("activation_quantization")
        name = asked.get("_data") if isinstance(asked, Mapping) else asked
        if name not in (None, "INT8_ASYM_PER_TOKEN", "int8_asym_per_token"):
            raise _unsupported(
                "activation_quantization", asked, "int8_asym_per_token", within=f"{prefix}.weight."
            )
        return "float" if name is None else "token asym reciprocal"
    kwargs = settings.get("act_quant_kwargs")
    if kwargs is None:
        return "float"
    data = kwargs.get("_data") if isinstance(kwargs, Mapping) else None
    granularity = data.get("granularity") if isinstance(data, Mapping) else None
    name = granularity.get("_type") if isinstance(granularity, Mapping) else granularity
    kinds: dict[Any, Activations] = {
        "PerRow": "token",
        "PerTensor": "tensor",
        "PerBlock": "group",
        "PerGroup": "group",
    }
    if kind == INT8:
        mapping = data.get("mapping_type") if data is not None else None
        kinds = {"PerRow": "token product", "PerTensor": "tensor product"}
        if isinstance(mapping, Mapping) and mapping.get("_data") == "ASYMMETRIC":
            kinds = {"PerRow": "token product asym"}
    if data is None or not isinstance(name, str) or name not in kinds:
        raise _unsupported("act_quant_kwargs", kwargs, " or ".join(kinds), within=f"{prefix}.weight.")
    return kinds[name]
