"""Floats to GGUF's blocks: the `gguf` package reads the bytes, and makes the same ones where it can make any."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.quantization.formats.gguf import GGUFLinearMethod
from pymllm.quantization.rounding.gguf import ROUNDING, round_to_blocks
from pymllm.quantization.rules import Rule
from pymllm.quantization.storage.gguf_pack import pack_blocks, split_scales
from pymllm.weights.spec import LinearShape, Span

# What llama.cpp's own quantiser makes of `weights()`: the relative errors, by benchmarks/gguf_rounding.py's `quantise`.
LLAMA_CPP = {
    "normal": {"Q2_K": 0.29823, "Q3_K": 0.15133, "Q4_K": 0.07186, "Q5_K": 0.03625, "Q6_K": 0.01783},
    "shifted": {"Q2_K": 0.16526, "Q3_K": 0.12545, "Q4_K": 0.03977, "Q5_K": 0.01988, "Q6_K": 0.01504},
}


def weights(kind: str = "normal") -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((64, 1024)) + (1.5 if kind == "shifted" else 0)
    return (0.02 * values).astype(np.float32)


def odd_weights() -> np.ndarray:
    """Blocks of zeros, of one value, of one sign, tiny and large ones."""
    weight = weights()
    weight[0] = 0
    weight[1, :300] = 0.5
    weight[2] = -np.abs(weight[2])
    weight[3] = np.abs(weight[3]) + 1
    weight[4] *= 1e-6
    weight[5, ::64] = 1000
    weight[6, 7:] = 0
    return weight


def shape_of(weight: np.ndarray) -> LinearShape:
    outputs, inputs = (Span.full(size) for size in weight.shape)
    return LinearShape(inputs, (outputs,), ("layer",), torch.float32)


@pytest.mark.parametrize("kind", ROUNDING)
def test_the_gguf_package_reads_what_the_canonical_weight_says(kind):
    weight = odd_weights()
    method, shape = GGUFLinearMethod(kind), shape_of(weight)
    made = method.quantize(torch.from_numpy(weight), shape)
    stored = method.to_stored(made, shape)["weight"]
    meant = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(meant, made.dequantize(torch.float32).numpy())
    again = method.to_canonical({"weight": stored}, shape)
    assert torch.equal(again.codes, made.codes) and again.type == made.type
    # On the meta device a plan sees the same type of weight.
    assert method.quantize(torch.from_numpy(weight).to("meta"), shape).type == made.type


@pytest.mark.parametrize("kind", [kind for kind in ROUNDING if not kind.endswith("K")])
def test_types_of_32_values_have_the_bytes_that_the_gguf_package_writes(kind):
    weight = odd_weights()
    packed = pack_blocks(round_to_blocks(torch.from_numpy(weight), kind), kind)
    expected = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("values", LLAMA_CPP)
@pytest.mark.parametrize("kind", LLAMA_CPP["normal"])
def test_k_types_err_no_more_than_llama_cpp(values, kind):
    weight = torch.from_numpy(weights(values))
    found = round_to_blocks(weight, kind).dequantize(torch.float32)
    assert float((found - weight).norm() / weight.norm()) <= 1.005 * LLAMA_CPP[values][kind]


@pytest.mark.parametrize("kind", [kind for kind in ROUNDING if kind.endswith("K")])
def test_blocks_of_any_writer_can_be_written_again(kind):
    """Random bytes: scales of any size, also those that no rounding makes."""
    from ..gguf_files import random_blocks

    raw = torch.from_numpy(random_blocks(kind, 16, 1024, seed=3))
    method, shape = GGUFLinearMethod(kind), shape_of(np.zeros((16, 1024)))
    canonical = method.to_canonical({"weight": raw}, shape)
    stored = method.to_stored(canonical, shape)["weight"]
    number = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(gguf.dequantize(stored.numpy(), number), gguf.dequantize(raw.numpy(), number))


def test_scales_that_no_small_integers_have_are_not_packed():
    scales = torch.tensor([[[1.0, 1.0 + 2**-20]]])
    assert split_scales(scales, range(63, 0, -1)) is None
    integers, factor = split_scales(torch.tensor([[[0.25, 0.75, 0.0]]]), range(63, 0, -1))
    assert torch.equal(integers * factor, torch.tensor([[[0.25, 0.75, 0.0]]]))


def test_what_a_type_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of 256.*Q8_0") as caught:
        GGUFLinearMethod("Q4_K").quantize(torch.zeros(4, 320), shape_of(np.zeros((4, 320))))
    assert caught.value.code == "group-size"
    weight = torch.full((2, 32), 1e7)
    with pytest.raises(ConfigError, match="1e\\+07") as caught:
        GGUFLinearMethod("Q8_0").quantize(weight, shape_of(weight.numpy()))
    assert caught.value.code == "bad-weight"
    with pytest.raises(ConfigError, match="Choose one of Q4_0"):
        Rule.parse("**=gguf:type=Q9").build()
    assert Rule.parse("**=gguf:type=q6_k").build() == GGUFLinearMethod("Q6_K")
    assert Rule.parse("**=gguf").build() == GGUFLinearMethod("Q4_K")
    assert Rule.parse("**=gguf:type=BF16").build().dtype is torch.bfloat16
