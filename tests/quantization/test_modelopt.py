"""ModelOpt: NVFP4, FP8 and mixtures of them by their formulas, both config files, ranks, config errors."""

import json
from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.parallel import simulate
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import save_tensors, write_checkpoint
from ..forward import logits_of

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class NVFP4:
    """algo: NVFP4 has an input_scale, W4A16_NVFP4 none.  extra: more of the config."""

    algo: str = "NVFP4"

    def config(self, ignored):
        return {
            "quant_method": "modelopt",
            "quant_algo": self.algo,
            "group_size": 16,
            "ignore": ["lm_head", *ignored],
        }

    def encode(self, weight):
        blocks = weight.unflatten(1, (-1, 16))
        second = weight.abs().amax() / (6 * 448)
        scales = (blocks.abs().amax(-1) / (6 * second)).to(torch.float8_e4m3fn)
        step = scales.float() * second
        codes = (blocks[..., None] / step[..., None, None] - E2M1).abs().argmin(-1)
        nibbles = codes.flatten(1).to(torch.uint8)
        tensors = {
            "weight": nibbles[:, ::2] | (nibbles[:, 1::2] << 4),
            "weight_scale": scales,
            "weight_scale_2": second,
        }
        if self.algo == "NVFP4":
            tensors["input_scale"] = torch.tensor(0.001)
        return tensors, (E2M1[codes] * step[..., None]).flatten(1)


@dataclass(frozen=True)
class FP8:
    def config(self, ignored):
        return {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", *ignored]}

    def encode(self, weight):
        scale = weight.abs().amax() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
        return tensors, codes.float() * scale


@dataclass(frozen=True)
class FP8Channels:
    """A scale for each channel, [O]; activations a token."""

    def config(self, ignored):
        return {
            "quant_method": "modelopt",
            "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
            "ignore": ["lm_head", *ignored],
        }

    def encode(self, weight):
        scale = weight.abs().amax(1) / 448
        codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None]


@dataclass(frozen=True)
class FP8Blocks:
    """A scale for 128 x 128, [O/128, 1, I/128, 1]; the writer spells this algorithm small."""

    def config(self, ignored):
        return {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": ["lm_head", *ignored]}

    def encode(self, weight):
        rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
        padded = torch.nn.functional.pad(
            weight, (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0])
        )
        tiles = padded.reshape(rows, 128, columns, 128)
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        codes = (tiles / scale).to(torch.float8_e4m3fn)
        cut = slice(weight.shape[0]), slice(weight.shape[1])
        meant = (codes.float() * scale).reshape(padded.shape)[cut]
        return {"weight": codes.reshape(padded.shape)[cut], "weight_scale": scale}, meant


def run(folder, written):
    return logits_of(pymllm.load_model(folder, device="cpu", dtype="float32", compute="exact"), written.ids)


def assert_right(folder, written):
    expected = written.logits()
    assert pymllm.verify(folder, device="cpu").ok
    for logits in (run(folder, written), *simulate(2, lambda parallel: run(folder, written))):
        assert (logits - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    "writer", (NVFP4(), NVFP4("W4A16_NVFP4"), FP8(), FP8Channels(), FP8Blocks()), ids=repr
)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    assert_right(tmp_path, write_checkpoint(tmp_path, "llama", writer))


def test_names_with_wildcards_stay_unquantised(tmp_path):
    def use_wildcards(raw):
        raw["quantization_config"]["ignore"] = [
            "lm_head",
            "model.layers.*.mlp.down_proj*",
            "model.layers.1.self_attn",
        ]

    kept = ("down_proj", *(f"layers.1.self_attn.{part}_proj" for part in "qkvo"))
    assert_right(
        tmp_path, write_checkpoint(tmp_path, "llama", NVFP4(), ignored=kept, edit_config=use_wildcards)
    )


def test_the_file_beside_config_json_is_read_and_scales_of_the_cache_are_skipped_for_a_reason(tmp_path):
    written = write_checkpoint(
        tmp_path, "llama", NVFP4(), edit_config=lambda raw: raw.pop("quantization_config")
    )
    settings = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    producer = {"name": "modelopt", "version": "0.41.0"}
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": producer, "quantization": settings})
    )
    scales = {f"model.layers.0.self_attn.{n}_proj.{n}_scale": torch.tensor(1.0) for n in "kv"}
    save_tensors(tmp_path, written.tensors | scales)
    model = pymllm.load_model(tmp_path, device="cpu", dtype="float32")
    reasons = {
        record.name: record.reason for record in model.load_report.tensors if record.status == "skipped"
    }
    assert "KV cache" in reasons["model.layers.0.self_attn.k_proj.k_scale"]
    assert_right(tmp_path, written)


def test_mixed_precision_gives_each_layer_its_own(tmp_path):
    def mix(raw):
        algorithms = {name: {"quant_algo": "FP8" if "mlp" in name else "NVFP4"} for name in names}
        raw["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": algorithms,
        }

    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in attention]
    names += [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in mlp]
    parts = {part: FP8() for part in mlp}
    written = write_checkpoint(tmp_path, "llama", NVFP4(), parts=parts, ignored=("o_proj",), edit_config=mix)
    assert_right(tmp_path, written)


@pytest.mark.parametrize(
    ("settings", "said"),
    (
        ({"quant_algo": "NVFP4_SVD"}, "quant_algo"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "has_zero_point"),
        ({"quant_algo": "W4A16_AWQ", "group_size": 0}, "group_size"),
        ({"quant_algo": "MXFP8", "group_size": 16}, "group_size"),
        ({}, "quant_algo"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size"),
        ({"quant_algo": "NVFP4", "exclude_modules": "lm_head"}, "exclude_modules"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "W8A8"}}}, "a.b"),
        ({"quantization": "NVFP4"}, "quantization"),
    ),
)
def test_a_config_that_cannot_be_read_names_field_and_value(settings, said):
    with pytest.raises(ConfigError, match=said):
        get_quantization_config("modelopt").from_config({"quant_method": "modelopt"} | settings)


def test_the_static_second_level_of_nvfp4_activations_multiplies(tmp_path):
    """x is rounded to e2m1 over (e4m3 scale of 16 inputs) * input_scale."""
    from pymllm.kernels.activations import quantise_activations

    written = write_checkpoint(tmp_path, "llama", NVFP4())
    model = pymllm.load_model(tmp_path, device="cpu", dtype="float32", compute="checkpoint")
    bound = model.model.layers[0].mlp.down_proj.bound
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    got = quantise_activations(x, bound.problem.weight, bound.packed["input_scales"])
    groups = x.unflatten(1, (-1, 16))
    stored = (groups.abs().amax(-1, keepdim=True) / 6 / 0.001).clamp(max=448).to(torch.float8_e4m3fn).float()
    ratio = got.unflatten(1, (-1, 16)) / (stored * 0.001)
    assert ((ratio.abs()[..., None] - E2M1[:8]).abs().amin(-1) < 1e-3).all()
    assert (got - x).norm() / x.norm() < 0.15
    assert (logits_of(model, written.ids) - written.logits()).norm() / written.logits().norm() < 0.6
