"""FBGEMM FP8: the spelling by its formula, modules left alone, ranks, config errors."""

from dataclasses import dataclass

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import write_checkpoint
from ..forward import assert_answers_as_meant


@dataclass(frozen=True)
class Fbgemm:
    def config(self, ignored):
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", *ignored],
        }

    def encode(self, weight):
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale


WRITERS = (Fbgemm(),)
BAD = (
    ({"activation_scale_ub": -1}, "activation_scale_ub"),
    ({"activation_scale_ub": "high"}, "activation_scale_ub"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
)


@pytest.mark.parametrize("writer", WRITERS, ids=repr)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",))
    assert_answers_as_meant(written, compute="exact")


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_a_config_that_cannot_be_read_names_field_and_value(settings, said):
    with pytest.raises(ConfigError, match=said):
        get_quantization_config("fbgemm-fp8").from_config({"quant_method": "fbgemm-fp8"} | settings)
