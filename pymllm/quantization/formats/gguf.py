"""GGUF's block types: all that files hold, from Q4_0 to the K, IQ and TQ types, MXFP4 and NVFP4.

    weight uint8 [O, I/B · bytes of a block]   blocks of B values, one after the other along the inputs
    scale  float32 [1]                         by which the weight is multiplied: where the file has it, for NVFP4

`quantization/storage/gguf_blocks.py` unpacks blocks, `gguf_pack.py` packs them, `rounding/gguf.py` rounds floats. The
page with the layout: quantization/gguf/README.md. As the target of a rule: `gguf:type=Q4_K`, say.

A GGUF file has no quantization_config: `weights/gguf_checkpoint.py` makes one from the type of every tensor.
"""

# O out_features, I in_features, B values of a block, G values that share a scale

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, ShardingError, counted
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.rounding.gguf import ROUNDING, round_to_blocks
from pymllm.quantization.storage.fields import unsupported
from pymllm.quantization.storage.gguf_blocks import BLOCKS, BlockType
from pymllm.quantization.storage.gguf_pack import PACKERS, pack_blocks
from pymllm.quantization.storage.groups import check_groups, rows_of_parts
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec

SCALE = "scale"  # the suffix of a weight's own factor, which NVFP4 has; that of its activations: input_scale
DEFAULT = "Q4_K"  # the type that a rule without one asks for
FLOAT_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VALUES_AT_A_TIME = 1 << 24  # how many are decoded at a time; temporaries take a few bytes for each


@dataclass(frozen=True)
class GGUFLinearMethod(LinearMethodBase):
    """GGUF's weights.

    kind: the name of their block type.  scaled: whether a float beside the blocks, `scale`, multiplies them all.
    """

    kind: str
    scaled: bool = False
    name: ClassVar[str] = "gguf"

    @property
    def block(self) -> BlockType:
        return BLOCKS[self.kind]

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        blocks = IN.in_blocks(self.block.values, self.block.size)
        specs: tuple[WeightSpec, ...] = (
            WeightSpec("weight", torch.uint8, (OUT, blocks), refuse=self._refuse),
        )
        if self.scaled:
            specs += (WeightSpec(SCALE, torch.float32, (PART,), accepts=FLOATS, scale=True),)
        return specs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        block = self.block
        codes, scales, offsets = self._decode(tensors["weight"])
        rows = rows_of_parts(tensors[SCALE], shape) if self.scaled else None
        if block.codebook:
            table = torch.tensor(INTEGER_CODEBOOKS[block.codebook].values, device=codes.device)
            return CodebookWeight(codes, table, scales, block.codebook, block.group, rows)
        if rows is not None:
            scales = scales.float() * rows[:, None]
            offsets = None if offsets is None else offsets.float() * rows[:, None]
        zeros = None if block.zero is None else scales.new_full(scales.shape, block.zero, dtype=torch.uint8)
        return IntWeight(codes, scales, zeros, block.bits, block.group, offsets=offsets)

    def _decode(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unpack rows of blocks: [O, bytes] -> codes [O, I], scales [O, I/G], and offsets alike or None."""
        block = self.block
        rows, count = stored.shape[0], stored.shape[1] // block.size
        groups = (rows, count * (block.values // block.group))
        codes = stored.new_empty((rows, count * block.values))
        scales = stored.new_empty(groups, dtype=block.scales)
        offsets = stored.new_empty(groups, dtype=block.scales) if block.offsets else None
        if stored.is_meta:
            return codes, scales, offsets
        step = max(1, VALUES_AT_A_TIME // max(codes.shape[1], 1))
        for start in range(0, rows, step):
            mine = slice(start, start + step)
            decoded = block.decode(stored[mine].unflatten(1, (count, block.size)))
            codes[mine], scales[mine] = decoded[0].flatten(1), decoded[1].flatten(1)
            if offsets is not None and decoded[2] is not None:
                offsets[mine] = decoded[2].flatten(1)
        return codes, scales, offsets

    def _refuse(self, stored: Tensor, shape: LinearShape) -> str | None:
        """Refuse blocks whose scale or minimum is not finite.  Zero is right: a block of zeros has it."""
        bad = self.block.count_bad(stored.unflatten(1, (-1, self.block.size)))
        return (
            f"{counted(bad, 'block')} of {self.kind} whose scale or minimum is NaN or infinite"
            if bad
            else None
        )

    def check(self, shape: LinearShape) -> None:
        values = self.block.values
        other = "gguf:type=Q8_0, whose blocks have 32" if values > 32 else "none, which leaves it in floats"
        check_groups(values, shape, what=f"{self.kind}'s blocks", fix=f"Give it another rule: {other}.")
        if shape.in_features_local % values:
            raise ShardingError(
                f"{shape.name}: this rank has {shape.in_features_local} inputs, which blocks of {values} do not divide",
                code="tp-granule",
                expected=f"a multiple of {values}",
                found=str(shape.in_features_local),
            )

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        if self.kind not in ROUNDING:
            return super().quantize(weight, shape)
        self.check(shape)
        made = round_to_blocks(weight, self.kind)
        parts = (made.scales,) if made.offsets is None else (made.scales, made.offsets)
        if not weight.is_meta and not all(bool(part.isfinite().all()) for part in parts):
            raise ConfigError(
                "a weight is too large for the float16 scales of this type, or not finite",
                code="bad-weight",
                tensor=shape.name,
                found=f"a magnitude of {float(weight.abs().max()):.3g}",
            )
        return made

    @property
    def free_scales(self) -> bool:
        return (
            self.block.values == self.block.group
        )  # a block of several groups has scales that depend on each other

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        packed = pack_blocks(weight, self.kind) if self.kind in PACKERS and not self.scaled else None
        if packed is None:
            raise ConfigError(
                f"{self.kind} cannot hold exactly this weight",
                code="spelling",
                tensor=shape.name,
                found=f"{weight.type}, whose scales its blocks would round",
                fix=f"Quantise it anew: {shape.name}=gguf:type={self.kind}.",
            )
        return {"weight": packed}

    def describe(self) -> str:
        return f"gguf {self.kind}"


@register_quantization("gguf")
class GGUFConfig(QuantizationConfig):
    """The config of a GGUF file.  types: the block type of every quantised tensor, by its layer."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = dict(types.items())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GGUFConfig:
        types: Any = config.get("types")
        if not isinstance(types, Mapping) or not all(isinstance(kind, str) for kind in types.values()):
            raise unsupported("GGUF", "types", types, "an object of layer to type")
        for layer, kind in types.items():
            if kind not in BLOCKS:
                raise unsupported(
                    "GGUF", "type", kind, f"F32 or F16 or BF16 or {' or '.join(BLOCKS)}", within=f"{layer}."
                )
        return cls(types)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        kind = parse_options("gguf", options, {"type": _read_kind}).get("type", DEFAULT)
        return (
            UnquantizedLinearMethod(dtype=FLOAT_KINDS[kind])
            if kind in FLOAT_KINDS
            else GGUFLinearMethod(kind)
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        kind = self.types.get(prefix)
        return None if kind is None else GGUFLinearMethod(kind, f"{prefix}.{SCALE}" in self.stored)

    def skip_reason(self, tensor: str) -> str | None:
        layer, _, suffix = tensor.rpartition(".")
        return (
            "activations stay floats beside weights of GGUF"
            if suffix == "input_scale" and layer in self.types
            else None
        )


def _read_kind(text: str) -> str:
    kind = text.upper()
    if kind not in ROUNDING and kind not in FLOAT_KINDS:
        raise ValueError(f"Choose one of {', '.join([*ROUNDING, *FLOAT_KINDS])}.")
    return kind
