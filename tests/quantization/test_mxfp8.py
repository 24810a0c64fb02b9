"""MXFP8 under all its names: the layout by its formula, ranks, kernels, the target of a rule, config errors."""

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import on_meta
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.quantization.base import get_quantization_config
from pymllm.weights.spec import LinearShape, Span

from ..checkpoints import write_checkpoint
from ..forward import assert_answers_as_meant, llm_logits_of
from ..kernels.integer_cases import needs_native

KIND = {"dtype": "fp8_e4m3", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
CONFIGS = {
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "quark": {
        "quant_method": "quark",
        "global_quant_config": {"weight": KIND, "input_tensors": KIND | {"is_dynamic": True}},
    },
}
IGNORED = {"modelopt": "ignore", "quark": "exclude"}


@dataclass(frozen=True)
class MXFP8:
    spelling: str
    scale_dtype: torch.dtype = torch.uint8

    def config(self, ignored):
        names = [f"*{name}" if self.spelling in IGNORED else name for name in ("lm_head", *ignored)]
        return CONFIGS[self.spelling] | {IGNORED.get(self.spelling, "modules_to_not_convert"): names}

    def encode(self, weight):
        blocks = weight.double().unflatten(1, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 448).log2().ceil()
        codes = (blocks / 2 ** exponents[..., None]).float().to(torch.float8_e4m3fn)
        meant = (codes.double() * 2 ** exponents[..., None]).flatten(1).float()
        name = "weight_scale_inv" if self.spelling in ("mxfp8", "fp8") else "weight_scale"
        scales = (exponents + 127).to(torch.uint8).view(self.scale_dtype)
        return {"weight": codes.flatten(1), name: scales}, meant


@pytest.mark.parametrize(
    "writer",
    (*map(MXFP8, CONFIGS), MXFP8("mxfp8", torch.float8_e8m0fnu), MXFP8("modelopt", torch.float8_e8m0fnu)),
    ids=repr,
)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",))
    assert_answers_as_meant(written)


@needs_native
def test_a_cpu_runs_it_in_its_native_kernel_and_gpus_in_triton(tmp_path):
    written = write_checkpoint(tmp_path, "qwen3", MXFP8("modelopt"))
    kernels = {
        layer.kernel for layer in pymllm.plan(written.folder, device="cpu").layers if layer.kind == "linear"
    }
    assert kernels == {"native_fp8"}
    method = get_quantization_config("mxfp8").from_options({})
    weight = on_meta(method.quantize(torch.ones(128, 256), shape(128, 256)))
    problem = LinearProblem(weight.type, 256, 128, torch.bfloat16, probe_device("cuda:sm90"))
    assert select("linear", problem).kernel.name == "triton_fp8"


def shape(out_features, in_features):
    return LinearShape(Span.full(in_features), (Span.full(out_features),), ("x",), torch.float32)


@pytest.mark.parametrize("in_features", (32, 96, 200, 24))
def test_quantising_takes_the_least_power_of_two_that_clips_nothing(in_features):
    weight = torch.randn(24, in_features, generator=torch.Generator().manual_seed(1)) * 0.1
    weight[0] = 0.0
    weight[1, 0] = 448.0
    made = get_quantization_config("mxfp8").from_options({}).quantize(weight, shape(24, in_features))
    for row in range(24):
        for start in range(0, in_features, 32):
            block = weight[row, start : start + 32].double()
            scale = made.scales[row, start // 32].double()
            assert scale.log2() == scale.log2().round()
            peak = block.abs().max()
            assert peak / scale <= 448 and (peak == 0 or peak / scale > 224)
            codes = made.weight[row, start : start + 32].double()
            # Three bits of fraction: half a unit is 1/16 of a code's power of two, or 2^-10 below 2^-6.
            bound = scale * (block.abs() / scale / 16).clamp(min=2.0**-10)
            assert bool(((codes * scale - block).abs() <= bound).all())


def test_it_is_the_target_of_a_rule_and_of_a_swap(tmp_path):
    written = write_checkpoint(tmp_path, "llama")
    llm = pymllm.LLM(written.folder, device="cpu", dtype="float32", quant="**.mlp.**=mxfp8")
    ruled = llm.logits(written.ids.tolist())
    assert 1e-4 < float((ruled - written.logits()).norm() / written.logits().norm()) < 0.1
    swapped = pymllm.LLM(written.folder, device="cpu", dtype="float32")
    pymllm.swap(swapped, "**.mlp.**", "mxfp8")
    assert torch.equal(swapped.logits(written.ids.tolist()), ruled)
    assert not torch.equal(ruled, llm_logits_of(written))


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("weight_block_size", [1, 16]),
        ("fmt", "e5m2"),
        ("scale_fmt", "float"),
        ("activation_scheme", "static"),
        ("modules_to_not_convert", "lm_head"),
    ),
)
def test_a_config_that_cannot_be_read_names_field_and_value(field, value):
    with pytest.raises(ConfigError, match=field):
        get_quantization_config("mxfp8").from_config({"quant_method": "mxfp8", field: value})


def test_scales_that_are_no_exponents_are_refused_by_name(tmp_path):
    @dataclass(frozen=True)
    class Floats(MXFP8):
        def encode(self, weight):
            tensors, meant = super().encode(weight)
            exponents = tensors["weight_scale"].double() - 127
            return tensors | {"weight_scale": (2**exponents).float()}, meant

    written = write_checkpoint(tmp_path, "llama", Floats("modelopt"))
    with pytest.raises(ConfigError, match=r"weight_scale.*float32"):
        pymllm.plan(written.folder, device="cpu")
