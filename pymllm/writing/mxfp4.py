"""The MXFP4 spelling: gpt-oss as it was published, its experts in 4-bit floats and all else in floats.

The experts of a layer are one tensor a product, gate and up in turns, each block of 32 codes a row of its own.
The layout: quantization/mxfp4/README.md.
"""

# E experts, H hidden size, I intermediate size of one expert

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, DenseWeight
from pymllm.loading.prepare import Prepared
from pymllm.quantization.formats.mxfp4 import MXFP4LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fp4_linear import fp4_kind
from pymllm.weights.spec import LinearShape
from pymllm.writing.checkpoint_writer import CheckpointWriter
from pymllm.writing.layers import Step
from pymllm.writing.spelling import SpelledLayer, cannot_express
from pymllm.writing.stacked_experts import DOWN, GATE, UP

MODEL_TYPE = "gpt_oss"
EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<name>\w+)")
SUFFIXES = {"weight": "", "blocks": "_blocks", "weight_scale": "_scales", "bias": "_bias"}


class MXFP4Spelling:
    """The spelling with quant_method mxfp4."""

    name = "mxfp4"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose blocks for an expert in MXFP4.  ConfigError for any other quantised weight."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        four_bits = isinstance(weight, CodebookWeight) and fp4_kind(weight) == "mxfp4"
        if not four_bits or weight.activations != "float" or EXPERT.fullmatch(shape.name) is None:
            raise cannot_express(
                self.name,
                shape,
                f"{weight.type} in this layer",
                expected="mxfp4 for experts, floats for all else",
                fix=f"Give it another rule ({shape.name}=none), or write another format (--format).",
            )
        return MXFP4LinearMethod(blocks=True)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype | None:
        """Return None: exponents are stored as they are made."""
        return None

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config`.  ConfigError for a block whose experts are MXFP4 in part."""
        blocks: dict[str, set[LinearMethodBase]] = defaultdict(set)
        left = []
        for name, layer in layers.items():
            expert = EXPERT.fullmatch(name)
            if expert is not None:
                blocks[expert["block"]].add(layer.method)
            else:
                left.append(name)
        for block, methods in blocks.items():
            if len(methods) > 1:
                raise ConfigError(
                    "the mxfp4 spelling has all experts of a layer in MXFP4, or none",
                    code="spelling",
                    tensor=block,
                    found=" and ".join(sorted(method.describe() for method in methods)),
                    fix=f"Give them one rule: {block}.**=mxfp4.",
                )
        left += [block for block, (method,) in blocks.items() if not isinstance(method, MXFP4LinearMethod)]
        return {"quant_method": "mxfp4", "modules_to_not_convert": left or None}


class MXFP4Writer(CheckpointWriter):
    """The writer of gpt-oss in MXFP4.  ConfigError for another model."""

    cuts_experts = True

    def __init__(self, prepared: Prepared, *args: Any) -> None:
        model_type = prepared.config.raw["model_type"]
        if model_type != MODEL_TYPE:
            raise ConfigError(
                "the mxfp4 spelling is that of gpt-oss, whose experts are one tensor a product",
                code="spelling",
                file="config.json",
                tensor="model_type",
                expected=MODEL_TYPE,
                found=str(model_type),
                fix="Write another format: --format compressed-tensors.",
            )
        super().__init__(prepared, *args)

    def final(self, step: Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the experts of a step together again: each product is one tensor, gate and up in turns."""
        found: dict[str, Tensor] = {}
        experts: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        for name, tensor in tensors.items():
            layer, _, suffix = name.rpartition(".")
            expert = EXPERT.fullmatch(layer)
            if expert is None:
                found[name] = tensor
            else:
                experts[expert["block"], suffix][expert["name"]][int(expert["index"])] = tensor
        for (block, suffix), products in experts.items():
            gate, up, down = (
                torch.stack([products[name][index] for index in range(len(products[name]))])
                for name in (GATE, UP, DOWN)
            )
            together = {"gate_up_proj": torch.stack((gate, up), 2).flatten(1, 2), "down_proj": down}
            for product, tensor in together.items():
                floats = suffix == "weight"  # [E, O, I], which are stored with inputs before outputs
                stored = tensor.transpose(1, 2) if floats else tensor
                found[f"{block}.{product}{SUFFIXES[suffix]}"] = stored.contiguous()
        return found
