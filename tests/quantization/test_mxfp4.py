"""MXFP4: the layout by its formula, ranks, config errors."""

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError, ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import save_tensors, write_checkpoint
from ..forward import assert_answers_as_meant

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class MXFP4:
    scale_dtype: torch.dtype = torch.uint8
    names: tuple[str, str] = ("weight", "weight_scale")

    def config(self, ignored):
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(ignored) or None}

    def encode(self, weight):
        blocks = weight.unflatten(1, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
        codes = (blocks[..., None] / 2 ** exponents[..., None, None] - E2M1).abs().argmin(-1)
        meant = (E2M1[codes] * 2 ** exponents[..., None]).flatten(1)
        nibbles = codes.flatten(1).to(torch.uint8)
        scales = (exponents + 127).to(torch.uint8).view(self.scale_dtype)
        return dict(zip(self.names, (nibbles[:, ::2] | (nibbles[:, 1::2] << 4), scales), strict=True)), meant


WRITERS = {
    "bytes": MXFP4(),
    "e8m0": MXFP4(torch.float8_e8m0fnu),
    "packed": MXFP4(names=("weight_packed", "weight_scale")),
    "scales": MXFP4(names=("weight", "scales")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(name, tmp_path):
    written = write_checkpoint(tmp_path, "llama", WRITERS[name], ignored=("down_proj",))
    assert_answers_as_meant(written)


def test_an_exponent_that_is_nan_is_refused_by_the_name_of_its_tensor(tmp_path):
    written = write_checkpoint(tmp_path, "llama", MXFP4())
    name = "model.layers.1.mlp.down_proj.weight_scale"
    written.tensors[name].view(-1)[3] = 255
    save_tensors(tmp_path, written.tensors)
    with pytest.raises(CheckpointError, match=r"1 scales of .* NaN") as caught:
        pymllm.load_model(tmp_path)
    assert caught.value.tensor == name


@pytest.mark.parametrize(
    ("field", "value"),
    (("modules_to_not_convert", "lm_head"), ("modules_to_not_convert", [1]), ("group_size", 64)),
)
def test_a_config_that_cannot_be_read_names_field_and_value(field, value):
    with pytest.raises(ConfigError, match=field):
        get_quantization_config("mxfp4").from_config({"quant_method": "mxfp4", field: value})
