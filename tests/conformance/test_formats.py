"""Every format decodes its golden vectors to what their writer says."""

import pytest
import torch

from pymllm.config import Execution
from pymllm.kernels.canonical import on_meta
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import kernels_for
from pymllm.quantization.binding import bind, bound_weight

from .vectors import ROOT, Vector, all_vectors, name_of


def rounded(weight: torch.Tensor, vector: Vector) -> torch.Tensor:
    """As the vector's writer rounds; the float32 product is exact wherever the writer's dtype is narrower."""
    return weight.float().to(vector.rounded_to).float()


def test_every_script_that_makes_vectors_has_made_some():
    scripts = {script.parent.name for script in ROOT.glob("*/make_golden.py")}
    assert {"awq", "fp8"} <= scripts == {vector.path.parents[1].name for vector in all_vectors()}


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
def test_the_specs_are_what_the_writer_stored(vector):
    specs = vector.method.weight_specs(vector.shape)
    stored = dict(vector.stored)
    for spec in specs:
        name = next(name for name in (spec.name, *spec.aliases) if name in stored)
        tensor = stored.pop(name)
        assert tensor.dtype in (spec.dtype, *spec.accepts)
        expected = spec.source_shape(vector.in_features, vector.out_features)
        assert tuple(tensor.shape) == expected or (tensor.numel() == 1 and len(expected) <= 1)
    assert not stored, "tensors of the file that the method does not ask for"


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
def test_the_method_decodes_to_the_writers_dequantisation(vector):
    assert torch.equal(rounded(vector.canonical.dequantize(torch.float32), vector), vector.dequantized)


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
def test_a_packed_layer_holds_the_writers_dequantisation(vector):
    layer = vector.layer()
    layer.quant_method.process_weights_after_loading(layer)
    weight = bound_weight(layer).canonical().dequantize(torch.float32)
    assert torch.equal(rounded(weight, vector), vector.dequantized)
    assert not list(layer.parameters()), "the checkpoint's layout is freed once packed"


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_plan_counts_the_bytes_that_packing_takes(vector, dtype):
    """What `planned` makes on the meta device packs to the same tensors, for the same kernel."""
    layer = vector.layer(dtype)
    layer.quant_method.process_weights_after_loading(layer)
    bound = bound_weight(layer)
    planned = bind(vector.method.planned(layer.shape), Execution(dtype=dtype), "linear")
    assert planned.selection.kernel.name == bound.selection.kernel.name
    assert planned.nbytes == bound.nbytes
    assert described(planned.packed) == described(bound.packed)


def described(packed):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()}


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
def test_every_kernel_packs_meta_tensors_like_real_ones(vector):
    weight = vector.canonical
    out_features, in_features = weight.shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = LinearProblem(weight.type, in_features, out_features, dtype, probe_device("cpu"))
        for kernel in kernels_for("linear"):
            if kernel.why_not(problem) is None:
                real, planned = kernel.pack(weight, problem), kernel.pack(on_meta(weight), problem)
                assert described(real) == described(planned), kernel.name
                assert all(tensor.is_meta for tensor in planned.values()), kernel.name
