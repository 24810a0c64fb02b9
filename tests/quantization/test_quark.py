"""Quark FP8: the spelling by its formula, modules left alone, ranks, config errors."""

from dataclasses import dataclass

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import write_checkpoint
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


WRITERS = (Quark(), Quark(static=False), Quark("per_channel", static=False))
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
