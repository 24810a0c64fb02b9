"""bitsandbytes: nf4 and fp4, also with double quantisation, and int8.

4 bits, over the weight laid flat, row after row, in blocks of B (n = O * I values, m = n/B blocks):

    weight                               uint8   [n/2, 1]   two codes a byte, the high nibble first
    weight.absmax                        float32 [m]        the scale of each block; with double quantisation uint8 [m]
    weight.quant_map                     float32 [16]       what the codes mean, a fraction of the scale
    weight.quant_state.bitsandbytes__nf4 uint8   [...]      JSON: blocksize, quant_type, shape, dtype, nested_*
    weight.nested_absmax                 float32 [m/256]    double quantisation: the scale of each block of scales
    weight.nested_quant_map              float32 [256]      double quantisation: what the codes of scales mean

int8: weight int8 [O, I], SCB float32 [O] (the largest magnitude of each row), weight_format uint8 [] (0: rows).

w = quant_map[code] * absmax; absmax = nested_quant_map[code] * nested_absmax + nested_offset.
int8: w = code * SCB / 127.
The page with the layouts: quantization/bitsandbytes/README.md.
"""

# I in_features, O out_features, B block size, n values, m blocks, P parts of a fused layer

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import CheckpointError
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase, StoredTensor
from pymllm.quantization.storage.fields import is_skipped, read_choice, read_names, read_stored, unsupported
from pymllm.quantization.storage.packing import unpack_nibbles_high_first
from pymllm.quantization.storage.settings import HarmlessSettings, Settings, harmless
from pymllm.quantization.storage.writer_settings import RUNNING, SWITCH
from pymllm.weights.json_text import parse_json_object
from pymllm.weights.spec import IN, OUT, PART, Dim, LinearShape, Span, WeightSpec, whole

QUANT_TYPES = ("nf4", "fp4")
MOST_STATE = 1 << 16  # bytes of a quant_state, which has some hundred
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Nested:
    """The double quantisation of scales.  block: how many scales share one of their own.  offset: added to each."""

    block: int
    offset: float


@dataclass(frozen=True)
class BitsAndBytes4BitLinearMethod(LinearMethodBase):
    """4-bit weights, as the layer's quant_state describes them.

    table: the values that the 16 codes stand for.  block: how many values share a scale.
    storage: the dtype that the file declares the packed bytes to be.  state_bytes: the length of the JSON.
    """

    quant_type: str
    table: tuple[float, ...]
    block: int
    nested: Nested | None
    storage: torch.dtype
    state_bytes: int
    name: ClassVar[str] = "bitsandbytes"

    @property
    def per_element(self) -> int:
        """The number of codes in an element of the stored weight."""
        return 2 * self.storage.itemsize

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        # A block of zeros has the scale zero.
        absmax = _spec("absmax", torch.float32, OUT.flattened(self.block), scale="or zero")
        if self.nested is not None:
            absmax = _spec("absmax", torch.uint8, OUT.flattened(self.block))
        specs: tuple[WeightSpec, ...] = (
            WeightSpec("weight", self.storage, (OUT.flattened(self.per_element), whole(1)), packed=True),
            absmax,
            _spec("quant_map", torch.float32, PART, whole(16)),
            WeightSpec(
                "quant_state",
                torch.uint8,
                (PART, whole(self.state_bytes)),
                aliases=(STATE + self.quant_type,),
                refuse=_refuse_state,
            ),
        )
        if self.nested is not None:
            nested = OUT.flattened(self.block * self.nested.block)
            specs += (
                _spec("nested_absmax", torch.float32, nested, scale="or zero"),
                _spec("nested_quant_map", torch.float32, PART, whole(256)),
            )
        return specs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        """Cut this rank's columns out of whole rows.

        Rows share bytes and blocks with one another, so a rank reads whole rows, even where it keeps some columns.
        """
        dims = {spec.name: spec.dims[0].of_rows(shape.in_features) for spec in self.weight_specs(shape)}
        start, stop = shape.inputs.start, shape.inputs.stop
        # The widest groups that neither a block nor an edge of this rank cuts.
        group = math.gcd(self.block, shape.in_features, start, stop)
        weight = tensors["weight"].view(torch.uint8).view(-1, 1)
        codes, scales = [], []
        for part, rows in enumerate(shape.outputs):
            packed = _part(weight, shape, part, dims["weight"], self.storage.itemsize)
            values = unpack_nibbles_high_first(packed.view(1, -1)).view(-1)
            before = rows.start * shape.in_features - rows.stored(dims["weight"], "").start * self.per_element
            mine = values[before : before + rows.size * shape.in_features]
            codes.append(mine.view(rows.size, -1)[:, start:stop])
            # The position in the flat weight of each group's first value.
            device = weight.device
            firsts = torch.arange(rows.start, rows.stop, device=device)[:, None] * shape.in_features
            firsts = firsts + torch.arange(start, stop, group, device=device)
            absmax = _values_at(tensors["absmax"], firsts // self.block, shape, part, dims["absmax"])
            if self.nested is not None:
                blocks = firsts // (self.block * self.nested.block)
                nested = _values_at(tensors["nested_absmax"], blocks, shape, part, dims["nested_absmax"])
                absmax = (
                    tensors["nested_quant_map"].view(-1, 256)[part][absmax.int()] * nested
                    + self.nested.offset
                )
            scales.append(absmax)
        table = torch.tensor(self.table, device=weight.device)
        return CodebookWeight(torch.cat(codes), table, torch.cat(scales), self.quant_type, group)

    def describe(self) -> str:
        double = "" if self.nested is None else ", double quantised"
        return f"bitsandbytes {self.quant_type}, blocks of {self.block}{double}"


def _spec(name: str, dtype: torch.dtype, *dims: Dim, **more: Any) -> WeightSpec:
    """Make the spec of a tensor that is stored as `weight.{name}`; torch takes no parameter whose name has a dot."""
    return WeightSpec(name, dtype, dims, aliases=(f"weight.{name}",), **more)


def _refuse_state(stored: Tensor, shape: LinearShape) -> str | None:
    """Refuse a quant_state of another shape than the layer's: laid flat, [I, O] looks like [O, I]."""
    found = json.loads(bytes(stored.flatten().tolist())).get("shape")
    expected = [shape.out_features, shape.in_features]
    return None if found in (expected, None) else f"the shape {found}, where the layer has {expected}"


def _part(tensor: Tensor, shape: LinearShape, part: int, dim: Dim, width: int = 1) -> Tensor:
    """Narrow a flat tensor to one part's share.  width: the tensor's elements in one element of the dimension."""
    sizes = [span.stored(dim, "").size * width for span in shape.outputs]
    return tensor.narrow(0, sum(sizes[:part]), sizes[part])


def _values_at(tensor: Tensor, positions: Tensor, shape: LinearShape, part: int, dim: Dim) -> Tensor:
    """Pick the elements at `positions` of a part's full tensor, of which this rank holds a piece."""
    held: Span = shape.outputs[part].stored(dim, "")
    return _part(tensor, shape, part, dim)[positions - held.start]


@dataclass(frozen=True)
class BitsAndBytesInt8LinearMethod(LinearMethodBase):
    """The int8 weights of LLM.int8(), with a scale for each row.

    Activations stay floats: the file does not say which inputs LLM.int8() would leave out of its int8 product.
    """

    name: ClassVar[str] = "bitsandbytes"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        return (
            WeightSpec("weight", torch.int8, (OUT, IN)),
            WeightSpec("SCB", torch.float32, (OUT,), scale="or zero"),
            WeightSpec("weight_format", torch.uint8, (PART,)),
        )

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        formats = tensors["weight_format"]
        if not formats.is_meta and bool(formats.any()):
            raise CheckpointError(
                "the weight is stored in another order than row by row",
                code="weight-format",
                tensor=f"{shape.name}.weight_format",
                expected="0 (row)",
                found=str(formats.tolist()),
                fix="Save it again with a recent bitsandbytes, which only writes rows.",
            )
        codes = tensors["weight"].view(torch.uint8) ^ 128  # two's complement to an offset of 128
        return IntWeight(codes, (tensors["SCB"] / 127).unsqueeze(1), None, 8, codes.shape[1])

    def describe(self) -> str:
        return "bitsandbytes int8"


HARMLESS = {
    **harmless("activations stay floats", "llm_int8_threshold bnb_4bit_compute_dtype"),
    **harmless(RUNNING, "llm_int8_enable_fp32_cpu_offload", only=SWITCH),
    **harmless("weights are stored in codes", "llm_int8_has_fp16_weight", only=(False,)),
    **harmless(
        "scales are codes where the files hold nested_absmax", "bnb_4bit_use_double_quant", only=SWITCH
    ),
    **harmless("codes are read in the dtype that they are stored in", "bnb_4bit_quant_storage"),
}
STATE_HARMLESS = {
    **harmless("what the weight had before it was rounded", "dtype nested_dtype"),
    **harmless("the layer has its own shape", "shape"),
}


@register_quantization("bitsandbytes")
@dataclass(kw_only=True, eq=False)
class BitsAndBytesConfig(QuantizationConfig):
    """`quantization_config` of bitsandbytes: load_in_4bit or load_in_8bit, llm_int8_skip_modules, bnb_4bit_*.

    methods: by layer, of those whose quant_state the checkpoint holds.
    """

    bits: int
    quant_type: str = "fp4"
    skip_modules: tuple[str, ...] = ()
    methods: dict[str, LinearMethodBase] = field(default_factory=dict)
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitsAndBytesConfig:
        in_4bit, in_8bit = (
            bool(config.get(f"load_in_{bits}bit", config.get(f"_load_in_{bits}bit"))) for bits in (4, 8)
        )
        if in_4bit == in_8bit:
            found = f"load_in_4bit {in_4bit} and load_in_8bit {in_8bit}"
            raise unsupported(
                "bitsandbytes", "load_in_4bit", found, "exactly one of load_in_4bit and load_in_8bit"
            )
        return cls(
            bits=4 if in_4bit else 8,
            quant_type=read_choice("bitsandbytes", config, "bnb_4bit_quant_type", "fp4", QUANT_TYPES),
            skip_modules=read_names(config, "llm_int8_skip_modules", regex=""),
        )

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Receive the headers and read every layer's quant_state, which gives its other tensors sizes and meaning."""
        super().see_checkpoint(tensors)
        for name in tensors:
            prefix, found, quant_type = name.partition(f".{STATE}")
            if found and quant_type in QUANT_TYPES:
                self.methods[prefix] = self._read_state(prefix, quant_type)

    def stored_as_float(self, prefix: str) -> bool:
        # Codes may be declared to be floats: bnb_4bit_quant_storage.
        return prefix not in self.methods and super().stored_as_float(prefix)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = is_skipped(self.spellings(prefix), self.skip_modules)
        states = (STATE + kind for kind in QUANT_TYPES)
        if not self.covers(layer, prefix, "SCB", *states, excluded=excluded):
            return None
        if prefix in self.methods:
            return self.methods[prefix]
        if f"{prefix}.SCB" in self.stored or self.bits == 8:
            return BitsAndBytesInt8LinearMethod()
        raise CheckpointError(
            "the layer has no quant_state, without which its codes have no meaning",
            code="quant-state",
            tensor=f"{prefix}.{STATE}{self.quant_type}",
            expected=" or ".join(f"{STATE}{kind}" for kind in QUANT_TYPES),
            fix="If the layer was not quantised, name it in llm_int8_skip_modules; "
            "otherwise save the model again with bitsandbytes 0.41.3 or later.",
        )

    def _read_state(self, prefix: str, quant_type: str) -> LinearMethodBase:
        """Make the method of a layer from its quant_state.  CheckpointError for one that cannot be read."""
        name = f"{prefix}.{STATE}{quant_type}"
        stored = self.stored[name]
        small = math.prod(stored.shape) <= MOST_STATE and stored.dtype is torch.uint8
        raw = bytes(read_stored(stored).flatten().tolist()) if small else b""
        try:
            state = Settings(parse_json_object(raw, Path(name), "quant_state"), file="quant_state", root=name)
            block, nested = state["blocksize"], None
            if f"{prefix}.weight.nested_absmax" in self.stored:
                nested = Nested(state["nested_blocksize"], float(state["nested_offset"]))
            sizes = (block,) if nested is None else (block, nested.block)
            offset = 0.0 if nested is None else nested.offset
            if type(state.get("nested_offset", 0.0)) not in (int, float):
                raise ValueError("its offset is no number")
            usable = all(type(size) is int and size > 0 for size in sizes) and math.isfinite(offset)
            if not usable or state["quant_type"] != quant_type:
                raise ValueError("its fields contradict the tensors")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"the quant_state cannot be read: {error!r}",
                code="quant-state",
                tensor=name,
                expected=f"JSON with blocksize and quant_type {quant_type} (nested_blocksize and nested_offset)",
                found=repr(raw[:200]),
            ) from None
        state.refuse_unread("bitsandbytes", STATE_HARMLESS)
        weight, table = (self.stored.get(f"{prefix}.{name}") for name in ("weight", "weight.quant_map"))
        if weight is None or weight.dtype in (None, torch.bool) or table is None:
            raise CheckpointError(
                "the layer has a quant_state, but lacks the tensors that it describes",
                code="quant-state",
                tensor=name,
                expected=f"{prefix}.weight, of bytes, integers or floats, and {prefix}.weight.quant_map",
            )
        values = tuple(read_stored(table).flatten().tolist())
        if not all(math.isfinite(value) for value in values):
            raise CheckpointError(
                "the values that codes stand for are not all finite numbers",
                code="bad-value",
                tensor=f"{prefix}.weight.quant_map",
                expected="finite values",
                found=repr(values[:16]),
                fix="The checkpoint is damaged or was written wrongly: download or write it again.",
            )
        return BitsAndBytes4BitLinearMethod(quant_type, values, block, nested, weight.dtype, len(raw))
