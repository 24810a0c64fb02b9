"""The GPTQ spellings: integers of 2, 3, 4 or 8 bits, as GPTQModel, transformers and vLLM read them.

`gptq` stores zero points less one, as the first kernels wanted them; `gptq_v2` stores them as they are. The setting of
most layers is the config's own; other layers, and those left in floats, are rules of its `dynamic`. The layout:
quantization/gptq/README.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

import pymllm
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, IntWeight
from pymllm.quantization.formats.gptq import BITS, GPTQLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape
from pymllm.writing.spelling import SpelledLayer, cannot_express
from pymllm.writing.targets import patterns_for


class GPTQSpelling:
    """The spelling with quant_method gptq and checkpoint_format gptq."""

    name = "gptq"
    zeros_minus_one: ClassVar[bool] = True

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose GPTQ's method for integers.  ConfigError for embeddings and what its tensors cannot hold."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        if kind == "embedding":
            fix = f"Leave it in floats: {shape.name}=none."
            raise cannot_express(self.name, shape, "a quantised embedding", fix=fix)
        reason = _why_not(weight, shape)
        if reason is not None:
            raise cannot_express(
                self.name,
                shape,
                reason,
                expected="2, 3, 4 or 8 bits with integer zero points, inputs and outputs in whole words of 32 bits",
                fix=f"Quantise it anew ({shape.name}=gptq), or write --format compressed-tensors.",
            )
        assert isinstance(weight, IntWeight)
        ordered = weight.group_index is None and weight.input_order is None
        whole_row = weight.scales.shape[1] == 1
        return GPTQLinearMethod(
            weight.bits,
            -1 if whole_row else weight.group_size,
            weight.zeros is None,
            self.zeros_minus_one,
            "in order" if ordered else "act order",
        )

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype is."""
        return torch.float16

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config`: the settings of most layers, and rules for the others."""
        quantised = {
            name: _settings(layer.method)
            for name, layer in layers.items()
            if isinstance(layer.method, GPTQLinearMethod)
        }
        counts = Counter(tuple(settings.items()) for settings in quantised.values())
        common = dict(counts.most_common(1)[0][0]) if counts else _settings(GPTQLinearMethod())
        # Readers leave the embedding alone, and the head unless `lm_head` is set.
        everything = [name for name, layer in layers.items() if layer.kind != "embedding"]
        left = [n for n in everything if n not in quantised and layers[n].kind != "lm_head"]
        dynamic: dict[str, Any] = {f"-:{pattern}": {} for pattern in _patterns(left, everything)}
        undecided = [name for name in everything if name not in left]  # the first rule that matches decides
        for settings in counts:
            names = [name for name, other in quantised.items() if tuple(other.items()) == settings]
            if dict(settings) != common:
                dynamic |= {f"+:{p}": dict(settings) for p in _patterns(names, undecided)}
                undecided = [name for name in undecided if name not in names]
        config = {
            "quant_method": "gptq",
            **common,
            "checkpoint_format": "gptq" if self.zeros_minus_one else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": any(layers[name].kind == "lm_head" for name in quantised),
            "dynamic": dynamic or None,
        }
        if (
            not self.zeros_minus_one
        ):  # transformers takes any config with `meta` for one that AutoRound cannot read
            config["meta"] = {"quantizer": [f"pymllm:{pymllm.__version__}"]}
        return config

    def side_configs(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Make the file that readers looked for before config.json had the settings."""
        return {"quantize_config.json": dict(quantization)}


class GPTQv2Spelling(GPTQSpelling):
    """The spelling with checkpoint_format gptq_v2."""

    name = "gptq_v2"
    zeros_minus_one = False


def _settings(method: LinearMethodBase) -> dict[str, Any]:
    """Write a method's settings as the config, or one of its rules, has them."""
    assert isinstance(method, GPTQLinearMethod)
    return {
        "bits": method.bits,
        "group_size": method.group_size,
        "sym": method.symmetric,
        "desc_act": method.index == "act order",
    }


def _patterns(names: list[str], everything: list[str]) -> list[str]:
    """Write regular expressions that match just these of all layers, from the name's start."""
    return [
        target.removeprefix("re:") if target.startswith("re:") else target.replace(".", r"\.") + "$"
        for target in patterns_for(names, everything)
    ]


def _why_not(weight: CanonicalWeight, shape: LinearShape) -> str | None:
    """Return why GPTQ's tensors cannot hold exactly this weight, or None."""
    if not isinstance(weight, IntWeight) or weight.bits not in BITS:
        return f"{weight.type}"
    if weight.offsets is not None:
        return "float zero points (scale=hqq, HQQ, GGUF's minima)"
    if weight.activations != "float":
        return f"quantised activations ({weight.activations})"
    for axis, size in (("inputs", shape.in_features), ("outputs", shape.out_features)):
        if size * weight.bits % 32:
            return f"{size} {axis} of {weight.bits} bits, which do not fill words of 32 bits"
    scales = weight.scales
    if not scales.is_meta and not torch.equal(scales.half().to(scales.dtype), scales):
        return f"scales in {str(scales.dtype).removeprefix('torch.')} that float16 would round"
    return None
