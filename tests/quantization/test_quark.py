"""Quark: the spellings by their formulas, modules left alone, ranks, config errors."""

from dataclasses import dataclass

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import encode_e4m3, pack_awq, write_checkpoint
from ..forward import assert_answers_as_meant

SCHEME = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor"}


@dataclass(frozen=True)
class Quark:
    qscheme: str = "per_tensor"
    static: bool = True

    def config(self, ignored):
        weight = SCHEME | {"qscheme": self.qscheme}
        return {
            "quant_method": "quark",
            "global_quant_config": {
                "weight": weight,
                "input_tensors": weight | {"is_dynamic": not self.static},
            },
            "layer_quant_config": {},
            "exclude": ["lm_head", *(f"re:.*{name}" for name in ignored)],
            "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
        }

    def encode(self, weight):
        scale = (weight.abs().amax(1) if self.qscheme == "per_channel" else weight.abs().amax()) / 448
        codes = (weight / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
        static = {"input_scale": torch.tensor(0.02)} if self.static else {}
        return {"weight": codes, "weight_scale": scale} | static, codes.float() * scale.reshape(-1, 1)


@dataclass(frozen=True)
class QuarkBlocks:
    """fp8 with scales of groups of 32 inputs, [O, I/32], or of blocks."""

    block: tuple[int, int]

    def config(self, ignored):
        of = {"qscheme": "per_group", "group_size": 32, "ch_axis": -1}
        if self.block[0] > 1:
            of = {"qscheme": "per_block", "block_size": list(self.block)}
        return {
            "quant_method": "quark",
            "global_quant_config": {"weight": SCHEME | of, "input_tensors": None},
            "exclude": ["lm_head", *(f"*{name}" for name in ignored)],
        }

    def encode(self, weight):
        stored, scales, meant = encode_e4m3(weight, self.block)
        return {"weight": stored, "weight_scale": scales}, meant


@dataclass(frozen=True)
class QuarkIntegers:
    """uint4 with zero points in groups of 32, or int8 for each channel with static activations."""

    dtype: str = "uint4"

    def config(self, ignored):
        group = {"qscheme": "per_group", "group_size": 32, "ch_axis": 1, "symmetric": False}
        channel = {"qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
        scheme = {"dtype": self.dtype, "is_dynamic": False} | (group if self.dtype == "uint4" else channel)
        static = {"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": False}
        return {
            "quant_method": "quark",
            "global_quant_config": {
                "weight": scheme,
                "input_tensors": None if self.dtype == "uint4" else static,
            },
            "exclude": ["lm_head", *(f"*{name}" for name in ignored)],
            "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
        }

    def encode(self, weight):
        if self.dtype == "int8":
            scales = weight.abs().amax(1) / 127.5
            codes = (weight / scales[:, None]).round().clamp(-128, 127)
            zeros = torch.zeros(weight.shape[0], dtype=torch.int8)
            static = {
                "input_scale": torch.tensor(0.02),
                "input_zero_point": torch.tensor(0, dtype=torch.int8),
            }
            tensors = {"weight": codes.to(torch.int8), "weight_scale": scales, "weight_zero_point": zeros}
            return tensors | static, codes * scales[:, None]
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        tensors = {
            "weight": pack_awq(codes.flatten(1).t().long()),
            "weight_scale": scales.t(),
            "weight_zero_point": pack_awq(zeros.t().long()),
        }
        return tensors, ((codes - zeros[..., None]) * scales[..., None]).flatten(1)


WRITERS = (
    Quark(),
    Quark(static=False),
    Quark("per_channel", static=False),
    QuarkBlocks((1, 32)),
    QuarkBlocks((64, 64)),
    QuarkIntegers("uint4"),
    QuarkIntegers("int8"),
)
BAD = (
    ({}, "global_quant_config"),
    ({"global_quant_config": {"weight": SCHEME | {"dtype": "fp6_e2m3"}}}, "fp6_e2m3"),
    ({"global_quant_config": {"weight": [SCHEME, SCHEME]}}, "dtype"),
    ({"global_quant_config": {"weight": SCHEME | {"qscheme": "per_group"}}}, "group_size"),
    ({"global_quant_config": {"weight": SCHEME | {"qscheme": "per_block"}}}, "per_block"),
    ({"global_quant_config": {"weight": SCHEME | {"dtype": "fp4"}}}, "per_group"),
    ({"global_quant_config": {"weight": SCHEME}, "algo_config": [{"name": "rotation", "r4": True}]}, "r4"),
    ({"global_quant_config": {"weight": SCHEME, "input_tensors": {"dtype": "int8"}}}, "int8"),
    ({"global_quant_config": {"weight": SCHEME}, "exclude": "lm_head"}, "exclude"),
    (
        {"global_quant_config": {"weight": SCHEME}, "export": {"weight_format": "fake_quantized"}},
        "weight_format",
    ),
    ({"global_quant_config": {"weight": SCHEME}, "layer_type_quant_config": {"Conv2d": {}}}, "Conv2d"),
)


@pytest.mark.parametrize("writer", WRITERS, ids=repr)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",))
    assert_answers_as_meant(written, compute="exact")


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_a_config_that_cannot_be_read_names_field_and_value(settings, said):
    with pytest.raises(ConfigError, match=said):
        get_quantization_config("quark").from_config({"quant_method": "quark"} | settings)
