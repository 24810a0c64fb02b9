"""ModelOpt's other algorithms by their formulas: integers, MX formats, W4A8, blocks in all their shapes, mixtures."""

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError

from ..checkpoints import relative_error, save_tensors, write_checkpoint
from ..forward import TOLERANCE, llm_logits_of
from .test_modelopt import E2M1, FP8, NVFP4, FP8Blocks, assert_right
from .test_mxfp8 import MXFP8


def modelopt(algo, ignored, **more):
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head", *ignored]} | more


def nibbles(codes):
    return codes[:, ::2] | (codes[:, 1::2] << 4)


@dataclass(frozen=True)
class Int4:
    """Two outputs a byte.  static: with what W4A8_AWQ stores besides."""

    static: bool = False

    def config(self, ignored):
        return modelopt("W4A8_AWQ" if self.static else "W4A16_AWQ", ignored, group_size=32)

    def encode(self, weight):
        groups = weight.unflatten(1, (-1, 32))
        scales = groups.abs().amax(-1) / 7
        codes = (groups / scales[..., None]).round().clamp(-8, 7)
        signed = codes.flatten(1).to(torch.int64) % 16
        tensors = {"weight": (signed[::2] | (signed[1::2] << 4)).to(torch.uint8), "weight_scale": scales}
        if self.static:
            tensors |= {"input_scale": torch.tensor(0.01), "weight_scale_2": weight.abs().amax() / 448}
        return tensors, (codes * scales[..., None]).flatten(1)


@dataclass(frozen=True)
class Int8:
    static: bool = False

    def config(self, ignored):
        return modelopt("W8A8_SQ_PER_CHANNEL" if self.static else "W8A16", ignored)

    def encode(self, weight):
        scales = weight.abs().amax(1) / 127
        codes = (weight / scales[:, None]).round()
        tensors = {"weight": codes.to(torch.int8), "weight_scale": scales}
        return tensors | ({"input_scale": torch.tensor(0.03)} if self.static else {}), codes * scales[:, None]


@dataclass(frozen=True)
class Fp4:
    """E2M1 in groups of 32: MXFP4, the same with fp8 activations, or e4m3 scales under a second one."""

    algo: str

    def config(self, ignored):
        return modelopt(self.algo, ignored, group_size=32)

    def encode(self, weight):
        blocks = weight.unflatten(1, (-1, 32))
        if self.algo == "W4A8_NVFP4_FP8":
            second = weight.abs().amax() / 448
            stored = (blocks.abs().amax(-1) / (6 * second)).to(torch.float8_e4m3fn)
            scales, more = stored.float() * second, {"weight_scale_2": second}
        else:
            exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
            stored, scales, more = (exponents + 127).to(torch.uint8), 2**exponents, {}
        codes = (blocks[..., None] / scales[..., None, None] - E2M1).abs().argmin(-1)
        if self.algo.endswith("FP8"):
            more["input_scale"] = torch.tensor(0.02)
        packed = nibbles(codes.flatten(1).to(torch.uint8))
        return {"weight": packed, "weight_scale": stored} | more, (E2M1[codes] * scales[..., None]).flatten(1)


@pytest.mark.parametrize(
    "writer",
    (
        Int4(),
        Int4(static=True),
        Int8(),
        Int8(static=True),
        Fp4("mxfp4"),
        Fp4("W4A8_MXFP4_FP8"),
        Fp4("W4A8_NVFP4_FP8"),
    ),
    ids=repr,
)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    assert_right(tmp_path, write_checkpoint(tmp_path, "llama", writer))


@pytest.mark.parametrize("axes", (0, 2, 4))
def test_scales_of_blocks_have_the_axes_that_are_stored(axes, tmp_path):
    @dataclass(frozen=True)
    class Blocks(FP8Blocks):
        def encode(self, weight):
            tensors, meant = super().encode(weight)
            scale = tensors["weight_scale"]
            if axes < 4:
                scale = scale[:, 0, :, 0]
            return tensors | {
                "weight_scale": scale.squeeze() if axes == 0 and scale.numel() == 1 else scale
            }, meant

    # Weights of one block, of several, and of uneven ones (320), which two ranks cannot share.
    written = write_checkpoint(tmp_path, "llama", Blocks(), intermediate_size=320)
    assert pymllm.verify(tmp_path, device="cpu").ok
    assert relative_error(llm_logits_of(written, compute="exact"), written.logits()) <= TOLERANCE


def test_mixed_precision_knows_all_algorithms_and_the_modules_around_layers(tmp_path):
    parts = {"q_proj": Int4(), "k_proj": Int4(), "v_proj": Int4(), "o_proj": MXFP8("modelopt")}
    parts |= dict.fromkeys(("gate_proj", "up_proj"), FP8()) | {"down_proj": Fp4("mxfp4")}
    algorithms = {
        "model.layers.*.self_attn.?_proj": {
            "quant_algo": "W4A16_AWQ",
            "group_size": 32,
            "pre_quant_scale": True,
        },
        "model.layers.0.mlp": {"quant_algo": "FP8"},
        "model.layers.1.mlp": {"quant_algo": "FP8"},
    }
    for i in (0, 1):
        algorithms[f"model.layers.{i}.self_attn.o_proj"] = {"quant_algo": "MXFP8", "group_size": 32}
        algorithms[f"model.layers.{i}.mlp.down_proj"] = {"quant_algo": "mxfp4", "group_size": 32}

    def mix(raw):
        raw["quantization_config"] = modelopt("MIXED_PRECISION", (), quantized_layers=algorithms)

    assert_right(tmp_path, write_checkpoint(tmp_path, "llama", NVFP4(), parts=parts, edit_config=mix))


def test_factors_of_inputs_are_refused_by_name(tmp_path):
    written = write_checkpoint(tmp_path, "llama", Int4())
    name = "model.layers.1.self_attn.o_proj.pre_quant_scale"
    save_tensors(tmp_path, written.tensors | {name: torch.full((128,), 0.5)})
    with pytest.raises(ConfigError, match="pre_quant_scale") as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert name in str(caught.value)
