"""torchao: subclasses by their formula and their metadata, ranks, config errors."""

# O out_features, I in_features, G group_size

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import pymllm
from pymllm.errors import CheckpointError, ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import edit_config, write_checkpoint
from ..forward import assert_answers_as_meant

LINEAR = SimpleNamespace(kind="linear")
PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    stored = {
        "qdata": codes.to(torch.int8),
        "scale": scale,
        "zero_point": torch.zeros_like(scale, dtype=torch.int8),
    }
    return "Int8Tensor", stored, codes * scale, {"act_quant_kwargs": None}


def int8_dynamic(weight):
    kind, stored, meant, _ = int8(weight)
    kwargs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": PER_ROW}}
    return kind, stored, meant, {"act_quant_kwargs": kwargs}


def intx(weight, *, floats=False, group=32):
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = -8 - low / scale.float()
    zero = zero if floats else zero.round().clamp(-8, 7)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(-8, 7)
    meant = ((codes - zero[..., None]) * scale.float()[..., None]).flatten(1)
    zero = zero if floats else zero.to(torch.int8)
    settings = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "activation_quantization": None}
    stored = {"qdata": codes.flatten(1).to(torch.int8), "scale": scale, "zero_point": zero}
    return "IntxUnpackedToInt8Tensor", stored, meant, settings


def intx_float_zeros(weight):
    return intx(weight, floats=True)


def int4(weight):
    groups = weight.unflatten(1, (-1, 64))
    scale = ((groups.amax(-1) - groups.amin(-1)) / 15).bfloat16()
    zero = (groups.amin(-1) + 8 * scale.float()).bfloat16()
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7)
    meant = (codes * scale.float()[..., None] + zero.float()[..., None]).flatten(1)
    flat = codes.flatten(1).to(torch.int8)
    stored = {"qdata": (flat[:, ::2] & 15) | (flat[:, 1::2] << 4), "scale": scale.t(), "zero_point": zero.t()}
    return "Int4Tensor", stored, meant, {"block_size": [1, 64]}


def float8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return "Float8Tensor", {"qdata": codes, "scale": scale}, codes.float() * scale, {"act_quant_kwargs": None}


def float8_tensor_dynamic(weight):
    scale = (weight.abs().amax() / 448).reshape(1, 1)
    codes = (weight / scale).to(torch.float8_e4m3fn)
    kwargs = {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {"granularity": {"_type": "PerTensor", "_data": {}}},
    }
    return (
        "Float8Tensor",
        {"qdata": codes, "scale": scale},
        codes.float() * scale,
        {"act_quant_kwargs": kwargs},
    )


ENCODERS = (int8, int8_dynamic, intx, intx_float_zeros, int4, float8, float8_tensor_dynamic)


def write(folder, encode, *, kind=None, skipped=()):
    """A tiny checkpoint whose linear layers `encode` made, described in the file's metadata."""
    written = write_checkpoint(folder, "llama")
    tensors, metadata = {}, {"format": "pt"}
    parameters = dict(written.model.named_parameters())
    for name, tensor in written.tensors.items():
        layer = name.removesuffix(".weight")
        if layer not in written.linears or layer.endswith(tuple(skipped) or "\0"):
            tensors[name] = tensor
            continue
        subclass, stored, meant, settings = encode(tensor)
        tensors |= {f"{layer}._weight_{key}": value.contiguous() for key, value in stored.items()}
        metadata[name] = json.dumps(
            {"_type": kind or subclass, "_data": settings, "_tensor_data_names": list(stored)}
        )
        with torch.no_grad():
            parameters[name].copy_(meant)
    save_file(tensors, folder / "model.safetensors", metadata)
    quantization = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Any", "_data": {}}}}
    edit_config(folder, quantization_config=quantization | {"modules_to_not_convert": list(skipped) or None})
    return written


def load(folder):
    return pymllm.load_model(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("encode", ENCODERS)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(encode, tmp_path):
    written = write(tmp_path, encode, skipped=("down_proj",))
    assert_answers_as_meant(written, within=2e-5)


def test_the_metadata_says_how_activations_are_quantised(tmp_path):
    model = load(write(tmp_path, int8_dynamic).folder)
    kinds = {str(layer.bound.problem.weight) for layer in model.modules() if hasattr(layer, "bound")}
    assert any("activations token product" in kind for kind in kinds)


def test_a_subclass_laid_out_for_one_kernel_is_refused_by_name(tmp_path):
    written = write(tmp_path, int8, kind="Int4TilePackedTo4dTensor")
    with pytest.raises(ConfigError, match="Int4TilePackedTo4dTensor"):
        load(written.folder)


def test_an_int8_tensor_with_zero_points_is_refused(tmp_path):
    def shifted(weight):
        kind, stored, meant, settings = int8(weight)
        return kind, stored | {"zero_point": stored["zero_point"] + 3}, meant, settings

    written = write(tmp_path, shifted)
    with pytest.raises(CheckpointError, match="zero points"):
        load(written.folder)


@pytest.mark.parametrize("quant_type", (None, "int8_weight_only", {"default": 1}))
def test_a_config_of_older_releases_is_refused_with_what_is_supported(quant_type):
    with pytest.raises(ConfigError, match="quant_type"):
        get_quantization_config("torchao").from_config({"quant_method": "torchao", "quant_type": quant_type})
