"""The native int4 linear against float64: every path, odd shapes, packing both ways, threads."""

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pymllm.kernels.canonical import DenseType, IntType, IntWeight, on_meta
from pymllm.kernels.hardware import Device, probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native import extension
from pymllm.kernels.native.int4 import NativeInt4

from ..operators import work_of
from ..processes import python
from ..tensors import floats
from .integer_cases import FLOATS, PATHS, assert_close, needs_native, relative_error

# M tokens, O out_features, I in_features, G group_size

KERNEL = NativeInt4()
EXACT_TOKENS = 2
TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33]
# (O, I, G): tails of the 16 rows and 4 streams of a tile; every group a block can have, and larger ones made of blocks
# (256; whole rows of 96 = 3 x 32, 320 = 5 x 64 and 640 = 5 x 128).
SHAPES = [
    (1, 32, 32),
    (7, 96, 32),
    (16, 128, 64),
    (33, 192, 64),
    (50, 384, 128),
    (65, 256, 128),
    (130, 640, 128),
    (34, 512, 256),
    (23, 96, 96),
    (17, 320, 320),
    (9, 640, 640),
]


def make_weight(
    out_features: int, in_features: int, group: int, *, symmetric: bool = False, seed: int = 0
) -> IntWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    scales = (torch.rand(out_features, groups, generator=generator) * 0.01 + 0.001).half()
    zeros = None if symmetric else codes(out_features, groups)
    return IntWeight(codes(out_features, in_features), scales, zeros, 4, group)


def make_problem(
    weight: IntWeight, dtype: torch.dtype, path: str | None = None, compute: str = "auto"
) -> LinearProblem:
    out_features, in_features = weight.shape
    device = Device("cpu", f"forced {path}", isa=path)
    return LinearProblem(weight.type, in_features, out_features, dtype, device, compute)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- results


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_agrees_with_float64(path, shape):
    for symmetric, dtype in itertools.product([False, True], FLOATS):
        weight = make_weight(*shape, symmetric=symmetric)
        problem = make_problem(weight, dtype, path)
        packed = KERNEL.pack(weight, problem)
        bias = floats(shape[0], dtype=dtype, seed=2)
        for tokens in TOKENS:
            x = floats(tokens, shape[1], dtype=dtype)
            for b in (None, bias):
                assert_close(KERNEL.run(packed, problem, x, b), x, weight, b, exact=tokens <= EXACT_TOKENS)


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exact_mode_is_exact_for_any_number_of_tokens(path, dtype):
    weight = make_weight(50, 384, 128)
    for compute in ("exact", "checkpoint"):
        problem = make_problem(weight, dtype, path, compute)
        packed = KERNEL.pack(weight, problem)
        for tokens in TOKENS:
            x = floats(tokens, 384, dtype=dtype)
            assert_close(KERNEL.run(packed, problem, x, None), x, weight, None, exact=True)


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_the_errors_are_those_that_numerics_names(path):
    weight = make_weight(128, 2048, 128)
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    few, many = floats(EXACT_TOKENS, 2048), floats(EXACT_TOKENS + 1, 2048)
    assert relative_error(KERNEL.run(packed, problem, few, None), few, weight) < 3e-7
    assert 3e-3 < relative_error(KERNEL.run(packed, problem, many, None), many, weight) < 9e-3
    assert "6e-3" in KERNEL.numerics(problem)
    assert "int8" not in KERNEL.numerics(dataclasses.replace(problem, compute="exact"))


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_more_activations_than_fit_the_caches(path):
    # 130 x 4736 codes pass the second-level cache in two parts; 500 tokens exceed the rows taken at a time (192).
    for tokens, (out_features, in_features, group) in ((130, (83, 4736, 128)), (500, (19, 64, 32))):
        weight = make_weight(out_features, in_features, group)
        problem = make_problem(weight, torch.float32, path)
        x = floats(tokens, in_features)
        assert_close(KERNEL.run(KERNEL.pack(weight, problem), problem, x, None), x, weight, None, exact=False)


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_strided_and_batched_activations(path):
    weight = make_weight(33, 192, 64)
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    base = floats(4, 7, 2 * 192)
    for x in (base[..., ::2], base[:, 1::2, :192], floats(192, 5).T, base[0, 0, 7 : 7 + 192]):
        y = KERNEL.run(packed, problem, x, None)
        assert torch.equal(
            y, KERNEL.run(packed, problem, x.clone(memory_format=torch.contiguous_format), None)
        )
        assert_close(y, x, weight, None, exact=y.numel() // 33 <= EXACT_TOKENS)
    bias = floats(66)[::2]
    assert_close(
        KERNEL.run(packed, problem, base[0, :1, :192], bias), base[0, :1, :192], weight, bias, exact=True
    )


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e30, 1e-20], ids=str)
def test_large_and_small_magnitudes(path, scale):
    weight = make_weight(33, 256, 128)
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    for tokens in (1, 5):
        x = floats(tokens, 256)
        x[:, 3] *= 1000  # one input decides the scale of its group
        y = KERNEL.run(packed, problem, x * scale, None)
        assert_close(y / scale, x, weight, None, exact=tokens <= EXACT_TOKENS)


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_a_token_that_is_not_finite_spoils_its_own_outputs_only(path, bad):
    weight = make_weight(33, 256, 128)
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    for tokens in (2, 5):
        x = floats(tokens, 256)
        clean = KERNEL.run(packed, problem, x, None)
        x[1, 200] = bad
        y = KERNEL.run(packed, problem, x, None)
        assert bool(y[1].isnan().all())
        y[1] = clean[1]
        assert torch.equal(y, clean)


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_zero_activations_and_zero_scales_give_the_bias(path):
    weight = make_weight(20, 128, 64)
    weight.scales[3] = 0
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    bias = floats(20)
    for tokens in (1, 4):
        assert torch.equal(
            KERNEL.run(packed, problem, torch.zeros(tokens, 128), bias), bias.expand(tokens, 20)
        )
        assert bool((KERNEL.run(packed, problem, floats(tokens, 128), bias)[:, 3] == bias[3]).all())


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_are_rounded_to_nearest_even_like_torch(path, dtype):
    """The product is 0, or 2^-6 exactly, so that y is the bias, or the bias and that, rounded once."""
    weight = IntWeight(torch.full((64, 32), 8, dtype=torch.uint8), torch.ones(64, 1).half(), None, 4, 32)
    problem = make_problem(weight, dtype, path)
    packed = KERNEL.pack(weight, problem)
    bias = torch.cat((floats(60, scale=3.0), torch.tensor([65504.0, -1e-7, 0.0, float("inf")]))).to(dtype)
    assert torch.equal(KERNEL.run(packed, problem, torch.ones(3, 32, dtype=dtype), bias), bias.expand(3, 64))
    one = IntWeight(torch.full((64, 32), 9, dtype=torch.uint8), torch.ones(64, 1).half(), None, 4, 32)
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 0] = 2.0**-6
    expected = (bias.float() + 2.0**-6).to(dtype).unsqueeze(0)
    assert torch.equal(KERNEL.run(KERNEL.pack(one, problem), problem, x, bias), expected)


# ------------------------------------------------------------------------------------------------------------- packing


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_unpack_returns_what_pack_was_given(shape, symmetric):
    weight = make_weight(*shape, symmetric=symmetric)
    problem = make_problem(weight, torch.float32)
    unpacked = KERNEL.unpack(KERNEL.pack(weight, problem), problem)
    assert unpacked.type == weight.type
    assert unpacked.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert torch.equal(unpacked.tensors()[name], tensor), name


@needs_native
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9], ids=str)
def test_bfloat16_scales_are_exact_also_beyond_the_range_of_float16(size):
    weight = make_weight(20, 128, 64)
    weight = dataclasses.replace(weight, scales=(weight.scales.float() * size).bfloat16())
    problem = make_problem(weight, torch.float32)
    packed = KERNEL.pack(weight, problem)
    assert torch.equal(KERNEL.unpack(packed, problem).scales, weight.scales)
    x = floats(1, 128)
    assert relative_error(KERNEL.run(packed, problem, x, None), x, weight) < 3e-7


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_dtypes_are_exact(path, dtype):
    for shape in SHAPES:
        weight = make_weight(*shape)
        weight = dataclasses.replace(weight, scales=(weight.scales.float() * 1.001).to(dtype))
        problem = make_problem(weight, torch.float32, path)
        packed = KERNEL.pack(weight, problem)
        assert torch.equal(KERNEL.unpack(packed, problem).scales, weight.scales)
        for tokens in (1, 3, 17):
            x = floats(tokens, shape[1])
            assert_close(KERNEL.run(packed, problem, x, None), x, weight, None, exact=tokens <= EXACT_TOKENS)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_plan_on_the_meta_device_has_the_same_sizes(shape):
    weight = make_weight(*shape)
    problem = make_problem(weight, torch.float32)
    real, planned = KERNEL.pack(weight, problem), KERNEL.pack(on_meta(weight), problem)
    assert {name: (t.shape, t.dtype) for name, t in real.items()} == {
        name: (t.shape, t.dtype) for name, t in planned.items()
    }
    assert all(t.is_meta for t in KERNEL.unpack(planned, problem).tensors().values())


def test_what_it_cannot_run_it_refuses_with_the_reason(monkeypatch):
    weight = make_weight(32, 128, 64)
    problem = make_problem(weight, torch.float32)
    why_not = {
        "up to 4 bits": dataclasses.replace(problem, weight=dataclasses.replace(weight.type, bits=8)),
        "bfloat16": dataclasses.replace(problem, weight=DenseType(torch.bfloat16)),
        "CPU": dataclasses.replace(problem, device=Device("cuda", "a GPU")),
        "float64": dataclasses.replace(problem, dtype=torch.float64),
        "multiple of 16, the weight has 24": dataclasses.replace(
            problem, weight=IntType(4, 24, True), in_features=96
        ),
        "whole groups": dataclasses.replace(problem, in_features=96),
    }
    for reason, refused in why_not.items():
        assert reason in (KERNEL.why_not(refused) or ""), reason
    assert KERNEL.why_not(problem) == extension.native_missing_reason()
    monkeypatch.setattr(
        "pymllm.kernels.native.integer.native_missing_reason",
        lambda: "the native CPU kernels are not built: …",
    )
    assert "not built" in KERNEL.why_not(problem)


@needs_native
def test_tensors_that_do_not_fit_the_layer_are_refused_before_any_address_is_read():
    weight = make_weight(32, 128, 64)
    problem = make_problem(weight, torch.float32)
    packed = KERNEL.pack(weight, problem)
    x = floats(2, 128)
    for bad_x in (x[:, :64], x.double(), x.half(), x.to("meta")):
        with pytest.raises(ValueError, match="x must be"):
            KERNEL.run(packed, problem, bad_x, None)
    for bad_bias in (floats(31), floats(1, 32), floats(32).to("meta")):
        with pytest.raises(ValueError, match="bias must be"):
            KERNEL.run(packed, problem, x, bad_bias)
    for blocks in (packed["blocks"][:1], packed["blocks"].to("meta"), packed["blocks"].view(torch.int8)):
        with pytest.raises(ValueError, match="packed blocks must be"):
            KERNEL.run({"blocks": blocks}, problem, x, None)
    with pytest.raises(ValueError, match="layer is 32×256"):
        KERNEL.pack(weight, dataclasses.replace(problem, in_features=256))


# ------------------------------------------------------------------------------------------------------------- threads


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_the_number_of_threads(path, torch_threads):
    weight = make_weight(331, 1024, 128)  # 176 KB: enough for two threads
    problem = make_problem(weight, torch.float32, path)
    results = []
    for threads in (1, 2, 3):
        torch_threads(threads)
        packed = KERNEL.pack(weight, problem)
        results.append(
            [packed["blocks"], *(KERNEL.run(packed, problem, floats(m, 1024), None) for m in (1, 4, 33))]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("path", PATHS)
def test_a_token_gets_the_same_result_whatever_is_batched_with_it(path):
    weight = make_weight(50, 384, 128)
    problem = make_problem(weight, torch.float32, path)
    packed = KERNEL.pack(weight, problem)
    x = floats(203, 384)
    whole = KERNEL.run(packed, problem, x, None)
    for first, last in ((0, 3), (3, 8), (8, 17), (17, 60), (60, 203)):
        assert torch.equal(KERNEL.run(packed, problem, x[first:last], None), whole[first:last])


@needs_native
def test_several_python_threads_get_the_same_results(torch_threads):
    torch_threads(2)
    cases = []
    for tokens, shape in (
        (1, (331, 1024, 128)),
        (5, (130, 640, 128)),
        (40, (260, 512, 64)),
        (2, (50, 384, 128)),
    ):
        weight = make_weight(*shape)
        problem = make_problem(weight, torch.float32)
        packed, x = KERNEL.pack(weight, problem), floats(tokens, shape[1])
        cases.append((packed, problem, x, KERNEL.run(packed, problem, x, None)))

    def repeat(start: int) -> bool:
        turns = (cases[(start + turn) % len(cases)] for turn in range(60))
        return all(torch.equal(KERNEL.run(packed, problem, x, None), y) for packed, problem, x, y in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(8)))


REPORT = """
import json
from pymllm.kernels import hardware
from pymllm import _native
print(json.dumps({"isa": hardware.probe_device("cpu").isa, "code": _native.isa_code("")}))
"""


def report(isa: str) -> dict:
    return json.loads(python("-c", REPORT, check=True, PYMLLM_CPU_ISA=isa).stdout)


@needs_native
def test_the_environment_forces_every_path():
    from pymllm import _native

    for path in PATHS:
        found = report(path)
        assert (found["isa"], found["code"]) == (path, _native.isa_code(path))
    with pytest.raises(ValueError, match="not a kernel path"):
        _native.isa_code("mmx")


@needs_native
def test_a_call_is_one_native_call_into_a_new_tensor(monkeypatch):
    """Nothing is converted or copied: the rest is Python, which benchmarks/cpu_dispatch.py times."""
    weight = make_weight(16, 32, 32)
    problem = dataclasses.replace(make_problem(weight, torch.float32), device=probe_device("cpu"))
    packed, x, bias = KERNEL.pack(weight, problem), floats(1, 32), floats(16)
    work = work_of(lambda: KERNEL.run(packed, problem, x, bias), monkeypatch)
    assert work == ["new_empty", "integer_linear"]
