"""Writers of quantised checkpoints, by the words of each format's page, for tests over all formats at once."""

# O out_features, I in_features, G group_size

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoints import AWQ, FP8, CompressedFP8, Writer
from .quantization.test_bitsandbytes import EightBit, FourBit
from .quantization.test_fbgemm_fp8 import Fbgemm
from .quantization.test_hqq import HQQ
from .quantization.test_modelopt import FP8 as ModelOptFP8
from .quantization.test_modelopt import NVFP4
from .quantization.test_mxfp4 import MXFP4
from .quantization.test_quark import Quark


@dataclass(frozen=True)
class GPTQ:
    """Symmetric int4, zero points stored less one.  marks: of the writer in the config."""

    group_size: int = 32
    negative: bool = False  # as AutoRound's, whose scales have the sign of the peak
    marks: tuple[tuple[str, str], ...] = ()

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        base = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group_size,
            "sym": True,
            "desc_act": False,
        }
        return base | {"dynamic": {f"-:.*{name}": {} for name in ignored}} | dict(self.marks)

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.unflatten(1, (-1, self.group_size))  # [O, I/G, G]
        scales = (groups.abs().amax(-1) / 7).half()
        if self.negative:
            scales[:, ::2] *= -1
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).long() + 8
        meant = ((codes - 8) * scales.float()[..., None]).flatten(1)
        zeros = torch.full((scales.shape[1], scales.shape[0]), 7)
        stored = {
            "qweight": pack(codes.flatten(1)).t(),
            "qzeros": pack(zeros),
            "scales": scales.t(),
        }
        return {name: tensor.contiguous() for name, tensor in stored.items()}, meant


def pack(codes: Tensor) -> Tensor:
    """[N, K] codes of four bits to [N, K/8] int32 words, the first in the lowest bits."""
    words = (codes.long().unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@dataclass(frozen=True)
class CompressedInt:
    """Integers as compressed-tensors has them, in bytes (int-quantized) or packed; a scale for each row.

    zero_points: whether these are stored.  said: what the config says of `symmetric`; None: nothing.
    """

    bits: int = 8
    zero_points: bool = False
    said: bool | None = True
    packed: bool = False

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        weights = {"num_bits": self.bits, "type": "int", "strategy": "channel", "dynamic": False}
        if self.said is not None:
            weights["symmetric"] = self.said
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if self.packed else "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *ignored],
        }

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        middle, top = 2 ** (self.bits - 1), 2**self.bits - 1
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = (high - low) / top if self.zero_points else torch.maximum(high, -low) / (middle - 1)
        zero = (-middle - low / scale).round().clamp(-middle, middle - 1) if self.zero_points else 0 * scale
        codes = (weight / scale + zero).round().clamp(-middle, middle - 1)
        stored = {"weight_scale": scale}
        if self.packed:
            stored["weight_packed"] = pack(codes + middle)
            stored["weight_shape"] = torch.tensor(weight.shape)
        else:
            stored["weight"] = codes.to(torch.int8)
        if self.zero_points:
            stored["weight_zero_point"] = (
                pack((zero + middle).t()).t().contiguous() if self.packed else zero.to(torch.int8)
            )
        return stored, (codes - zero) * scale


@dataclass(frozen=True)
class AutoRoundFP8:
    """AutoRound's float8, a scale for each row."""

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:fp8_static",
            "data_type": "fp",
            "bits": 8,
            "group_size": -1,
            "extra_config": {f".*{name}": {"bits": 16} for name in ignored},
        }

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1) / 448
        codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None]


WRITERS: dict[str, Writer] = {
    "awq": AWQ(64),
    "gptq": GPTQ(),
    "auto-round": AutoRoundFP8(),
    "bitsandbytes-4": FourBit(),
    "bitsandbytes-8": EightBit(),
    "compressed-fp8": CompressedFP8("channel"),
    "compressed-int8": CompressedInt(),
    "fbgemm-fp8": Fbgemm(),
    "fp8-block": FP8(),
    "fp8-tensor": FP8(None),
    "hqq": HQQ(),
    "modelopt-fp8": ModelOptFP8(),
    "modelopt-nvfp4": NVFP4("W4A16_NVFP4"),
    "mxfp4": MXFP4(),
    "quark": Quark("per_channel", static=False),
}
LAYER = "model.layers.0.mlp.down_proj"


def excluded_name(fmt: str) -> str:
    """The entry for LAYER in a writer's list of ignored layers."""
    return "down_proj" if fmt in ("hqq", "gptq", "auto-round", "quark") else LAYER
