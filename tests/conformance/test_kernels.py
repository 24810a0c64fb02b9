"""Every kernel against a float64 product over the weights that were stored, and every packing undone bit for bit."""

# M rows, O out_features, I in_features

import pytest
import torch

from pymllm.kernels.canonical import DenseWeight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import kernels_for

from .vectors import all_vectors, name_of

CPU = probe_device("cpu")
E4M3 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(dtype, out_features=37, in_features=53):
    generator = torch.Generator().manual_seed(0)
    return DenseWeight(torch.randn(out_features, in_features, generator=generator).to(dtype))


# Every golden vector, and plain floats, which have none.
WEIGHTS = {name_of(vector): (lambda vector=vector: vector.canonical) for vector in all_vectors()}
WEIGHTS |= {f"dense-{str(dtype)[6:]}": (lambda dtype=dtype: dense(dtype)) for dtype in DTYPES}


def accepting(operation, weight, dtype, compute="exact"):
    """(kernel, problem) for every kernel that takes this weight.  There is always one: the reference."""
    out_features, in_features = weight.shape
    problem = LinearProblem(weight.type, in_features, out_features, dtype, CPU, compute)
    found = [(kernel, problem) for kernel in kernels_for(operation) if kernel.why_not(problem) is None]
    assert found and found[-1][0].name == "reference"
    return found


def bits(tensor):
    return tensor.flatten().clone().view(torch.uint8)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_gives_back_what_was_packed_bit_for_bit(name, dtype):
    weight = WEIGHTS[name]()
    for operation in ("linear", "embedding"):
        for kernel, problem in accepting(operation, weight, dtype):
            before = {key: tensor.clone() for key, tensor in weight.tensors().items()}
            again = kernel.unpack(kernel.pack(weight, problem), problem)
            assert again.type == weight.type and again.shape == weight.shape, kernel.name
            assert again.tensors().keys() == before.keys(), kernel.name
            for key, tensor in again.tensors().items():
                assert tensor.dtype == before[key].dtype and tensor.shape == before[key].shape, (
                    kernel.name,
                    key,
                )
                assert torch.equal(bits(tensor), bits(before[key])), (kernel.name, key)
                assert torch.equal(bits(weight.tensors()[key]), bits(before[key])), (
                    "packing changed its source"
                )


def inputs(in_features, dtype, magnitude, weight64):
    """x of several shapes: no rows, one, an odd number, three dimensions, not contiguous."""
    generator = torch.Generator().manual_seed(1)
    if dtype is torch.float16:  # keep the largest possible result within float16
        magnitude = min(magnitude, 2.0**13 / float(weight64.abs().sum(1).max().clamp(min=1e-3)))
    for shape in ((0, in_features), (1, in_features), (5, in_features), (2, 3, in_features), (in_features,)):
        yield (
            (torch.randn(shape, generator=generator) * magnitude)
            .clamp(-4 * magnitude, 4 * magnitude)
            .to(dtype)
        )
    yield (torch.randn(in_features, 7, generator=generator).clamp(-4, 4) * magnitude).to(dtype).t()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", (1.0, 1e4), ids=("ordinary", "large"))
def test_every_kernel_equals_the_float64_product(name, dtype, magnitude):
    weight = WEIGHTS[name]()
    exact = weight.dequantize(torch.float64)
    out_features, in_features = weight.shape
    if exact.abs().max() > torch.finfo(dtype).max:
        pytest.skip("the dtype cannot hold the weights")
    bias = torch.linspace(-magnitude, magnitude, out_features).to(dtype)
    # Weights, scales and the result are rounded to the dtype, once each: three roundings, and one for the bias. A
    # kernel may round a scale and a zero point apart, so the unit is each row's largest weight. Accumulation is in
    # float32: its error, I / 2 units of 2^-24 at worst, is far below that, but counts when the dtype is float32.
    unit = torch.finfo(dtype).eps * 4 + in_features * 2.0**-24
    for kernel, problem in accepting("linear", weight, dtype):
        packed = kernel.pack(weight, problem)
        for x in inputs(in_features, dtype, magnitude, exact):
            for b in (None, bias):
                result = kernel.run(packed, problem, x, b)
                expected = x.double() @ exact.t() + (0 if b is None else b.double())
                bound = unit * (x.double().abs().sum(-1, keepdim=True) * exact.abs().amax(1) + expected.abs())
                bound = bound + (0 if b is None else unit * b.double().abs())
                # A float16 weight below the smallest normal is off by half the smallest subnormal at most.
                bound = (
                    bound + x.double().abs().sum(-1, keepdim=True) * torch.finfo(dtype).smallest_normal * unit
                )
                assert result.shape == expected.shape and result.dtype == dtype, kernel.name
                worst = ((result.double() - expected).abs() - bound).max() if x.numel() else torch.tensor(0.0)
                assert worst <= 0, f"{kernel.name}, x {list(x.shape)}, bias {b is not None}: over by {worst}"


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_a_kernel_approximates_stays_within_the_error_it_states(name):
    """With compute="auto" a kernel may round activations; `tolerance` is what it then owns up to."""
    weight = WEIGHTS[name]()
    exact = weight.dequantize(torch.float64)
    for kernel, problem in accepting("linear", weight, torch.float32, "auto"):
        packed, stated = (
            kernel.pack(weight, problem),
            getattr(kernel, "tolerance", lambda problem: 1e-5)(problem),
        )
        x = torch.randn(33, weight.shape[1], generator=torch.Generator().manual_seed(6))
        expected = x.double() @ exact.t()
        error = (kernel.run(packed, problem, x, None) - expected).norm() / expected.norm()
        assert error <= stated, kernel.name


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_reference_gives_the_same_in_chunks_of_any_size(name, monkeypatch):
    """Chunks that end within a block of scales, too."""
    weight = WEIGHTS[name]()
    kernel, problem = accepting("linear", weight, torch.float32)[-1]
    packed = kernel.pack(weight, problem)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(5))
    expected = x.double() @ weight.dequantize(torch.float64).t()
    bound = (x.double().abs() @ weight.dequantize(torch.float64).abs().t()) * weight.shape[1] * 2.0**-23
    for rows in (1, 7, 33):
        monkeypatch.setattr("pymllm.kernels.reference.linear.CHUNK_ELEMENTS", rows * weight.shape[1])
        assert ((kernel.run(packed, problem, x, None).double() - expected).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_embedding_kernel_gathers_the_dequantised_rows(name, dtype):
    weight = WEIGHTS[name]()
    table = weight.dequantize(dtype)
    generator = torch.Generator().manual_seed(2)
    for kernel, problem in accepting("embedding", weight, dtype):
        packed = kernel.pack(weight, problem)
        for shape in ((0,), (), (5,), (2, 3), (2, 0)):
            ids = torch.randint(0, weight.shape[0], shape, generator=generator)
            assert torch.equal(kernel.run(packed, problem, ids), table[ids]), kernel.name


FP8 = [
    name_of(vector) for vector in all_vectors() if getattr(vector.stored.get("weight"), "dtype", None) is E4M3
]


@pytest.mark.parametrize("name", FP8)
def test_activations_are_quantised_as_the_checkpoint_asks_when_compute_is_checkpoint(name):
    """quantization/fp8/README.md, "Activations": x_q = e4m3(clamp(x / scale, ±448))."""
    weight = WEIGHTS[name]()
    if weight.type.activations == "float":
        pytest.skip("the checkpoint asks for none")
    exact, (out_features, in_features) = weight.dequantize(torch.float64), weight.shape
    x = torch.randn(5, in_features, generator=torch.Generator().manual_seed(4))
    if weight.type.activations == "static":
        scale = weight.tensors()["input_scales"].reshape(1, 1)
    elif weight.type.activations == "tensor":
        scale = (x.abs().max() / 448).reshape(1, 1)
    elif weight.type.activations == "group":
        width = weight.type.block[1] or in_features
        scale = torch.empty_like(x)
        for start in range(0, in_features, width):
            scale[:, start : start + width] = x[:, start : start + width].abs().amax(1, keepdim=True) / 448
    elif weight.type.activations == "group mx":  # quantization/compressed_tensors/README.md, "Activations"
        peaks = x.unflatten(1, (-1, 32)).abs().amax(-1)
        powers = 2.0 ** (peaks.log2().floor() - 8)
        scale = torch.where(peaks >= 448 * powers, 2 * powers, powers).repeat_interleave(32, 1)
    else:
        scale = x.abs().amax(1, keepdim=True) / 448
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = (codes.double() * scale.double()) @ exact.t()
    for kernel, problem in accepting("linear", weight, torch.float32, "checkpoint"):
        result = kernel.run(kernel.pack(weight, problem), problem, x, None)
        bound = (x.double().abs() @ exact.abs().t()) * in_features * 2.0**-23 + 1e-30
        assert ((result.double() - expected).abs() <= bound).all(), kernel.name
        assert out_features == result.shape[1]
