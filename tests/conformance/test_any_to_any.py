"""Every format as the source of every method that a rule can name: loaded, bound, run, and no worse than both are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.linear import TOLERANCES
from pymllm.layers.linear import Linear
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import Rule

from .vectors import Vector, load_layer, name_of, one_of_each_method

TARGETS = (
    "none",
    "awq:group_size=-1",
    "gptq:group_size=-1",
    "int4:group_size=-1,scale=mse",
    "int8",
    "fp8",
    "fp8:granularity=block",
    "mxfp4",
    "mxfp8",
    "mlx:bits=5,group_size=32",
    "gguf:type=Q5_1",
    "gguf:type=Q6_K",
)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def converted(vector: Vector, target: LinearMethodBase) -> Linear:
    """The layer of a vector, loaded in the method `target`."""
    method = ConvertedLinearMethod(vector.method, target)
    tensors = {spec.name: vector.stored_for(spec) for spec in method.weight_specs(vector.shape)}
    layer = load_layer(
        lambda: Linear(vector.in_features, vector.out_features, False, method, prefix="model.layer"),
        [tensors],
    )
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("vector", one_of_each_method(), ids=name_of)
def test_any_format_becomes_any_method_within_the_errors_of_both(vector, target):
    method = Rule.parse(f"x={target}").build()
    try:
        method.check(vector.shape)
        layer = converted(vector, method)
    except ConfigError as refusal:
        # A shape that the target cannot have: words of eight outputs, groups that do not divide. Never the source.
        assert refusal.code in ("packing", "group-size"), refusal
        return
    bound = bound_weight(layer)
    weight = bound.canonical().dequantize(torch.float64)
    source = vector.canonical.dequantize(torch.float32)
    original = vector._content[1].get("weight_float", vector.dequantized).float()
    own = relative(method.quantize(original, vector.shape).dequantize(torch.float32), original)
    # A target's error on rounded weights differs a little from that on the originals.
    assert relative(weight, original) <= relative(source, original) + 1.15 * own + 1e-6
    x = torch.randn((3, vector.in_features), generator=torch.Generator().manual_seed(1))
    problem, kernel = bound.problem, bound.selection.kernel
    tolerance = getattr(kernel, "tolerance", lambda p: TOLERANCES[p.dtype])(problem)
    assert relative(bound.run(x, None), x.double() @ weight.t()) <= tolerance
