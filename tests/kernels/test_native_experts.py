"""Native experts over integer weights against a float64 formula: every path, routing of every kind, threads."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.experts import NativeIntegerExperts

from ..moe_formula import expected_experts, routed
from ..tensors import floats
from .integer_cases import FLOATS, PATHS, needs_native
from .test_native_integer import fp4, integers

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

pytestmark = needs_native
KERNEL = NativeIntegerExperts()
NO_BIAS = ExpertsBias()
E, H, I = 6, 96, 160
MAKERS = {
    "int4": lambda *shape, seed: integers(4, (*shape, 32), zeros="each", seed=seed),
    "int4 offsets": lambda *shape, seed: integers(4, (*shape, 32), zeros="offsets", seed=seed),
    "int8": lambda *shape, seed: integers(8, (*shape, shape[1]), scales=torch.float32, seed=seed),
    "mxfp4": lambda *shape, seed: fp4((*shape, 32)),
    "iq3_s": lambda *shape, seed: fp4((*shape, 32), scales=torch.float32, codebook="iq3_s"),
}


def make(name, dtype=torch.float32, path=None, compute="exact", activation="silu"):
    device = Device("cpu", f"forced {path}", isa=path)
    gate_up = [MAKERS[name](2 * I, H, seed=e) for e in range(E)]
    down = [MAKERS[name](H, I, seed=100 + e) for e in range(E)]
    first, second = (
        LinearProblem(w[0].type, w[0].shape[1], w[0].shape[0], dtype, device, compute)
        for w in (gate_up, down)
    )
    problem = ExpertsProblem((first,), second, E, GatedActivation(activation), False)
    assert KERNEL.why_not(problem) is None
    weight = ExpertsWeight((gate_up,), down)
    return weight, problem, KERNEL.pack(weight, problem)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_path_equals_the_float64_formula(path, name, dtype):
    weight, problem, packed = make(name, dtype, path)
    # Two products, and their roundings to 16 bits at the end only; silu's exp is right to 2e-7.
    allowed = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]
    bias = ExpertsBias(floats(E, 2 * I, dtype=dtype, seed=8), floats(E, H, dtype=dtype, seed=9))
    for tokens, top_k in ((0, 2), (1, 0), (1, 2), (2, 1), (7, 3), (40, 2), (230, 1)):
        x, (ids, weights) = floats(tokens, H, dtype=dtype), routed(tokens, top_k, E)
        for b in (NO_BIAS, bias):
            y, want = (
                KERNEL.run(packed, problem, x, ids, weights, b),
                expected_experts(weight, x, ids, weights, b),
            )
            assert y.shape == x.shape and y.dtype is dtype
            assert float((y.double() - want).norm()) <= allowed * max(float(want.norm()), 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_few_rows_of_an_expert_are_exact_and_many_as_rough_as_they_say(path):
    weight, problem, packed = make("int4", path=path, compute="auto")
    for rows, least, most in ((2, 0.0, 2e-6), (30, 1e-3, 2e-2)):
        x, ids, weights = floats(rows, H), torch.full((rows, 1), 3), torch.ones(rows, 1)
        want = expected_experts(weight, x, ids, weights, NO_BIAS)
        error = (KERNEL.run(packed, problem, x, ids, weights, NO_BIAS).double() - want).norm() / want.norm()
        assert least <= error <= most


@pytest.mark.parametrize("path", PATHS)
def test_a_token_does_not_depend_on_threads_nor_on_its_neighbours(path, torch_threads):
    _, problem, packed = make("int4", path=path)
    x, (ids, weights) = floats(70, H), routed(70, 3, E)
    results = []
    for threads in (1, 2, 3):
        torch_threads(threads)
        results.append(KERNEL.run(packed, problem, x, ids, weights, NO_BIAS))
    assert all(torch.equal(results[0], other) for other in results[1:])
    for first, last in ((0, 1), (1, 4), (4, 70)):
        part = slice(first, last)
        assert torch.equal(
            KERNEL.run(packed, problem, x[part], ids[part], weights[part], NO_BIAS), results[0][part]
        )


def test_strided_inputs_and_ids_of_other_dtypes():
    _, problem, packed = make("int4")
    x, (ids, weights) = floats(H, 5).t(), routed(5, 2, E)
    want = KERNEL.run(packed, problem, x.contiguous(), ids, weights, NO_BIAS)
    got = KERNEL.run(packed, problem, x, ids.int().t().contiguous().t(), weights.double(), NO_BIAS)
    assert torch.equal(got, want)


def test_a_nan_stays_with_the_tokens_that_have_it():
    _, problem, packed = make("int8")
    x, (ids, weights) = floats(6, H), (torch.arange(6).view(6, 1) % 3, torch.ones(6, 1))
    clean = KERNEL.run(packed, problem, x, ids, weights, NO_BIAS)
    x[2, 5] = float("nan")
    y = KERNEL.run(packed, problem, x, ids, weights, NO_BIAS)
    assert bool(y[2].isnan().all())
    y[2] = clean[2]
    assert torch.equal(y, clean)


def test_what_does_not_fit_is_refused():
    _, problem, packed = make("int4")
    x, (ids, weights) = floats(3, H), routed(3, 2, E)
    for bad_x in (x[:, :32], x.double(), x.unsqueeze(0)):
        with pytest.raises(ValueError, match="x must be"):
            KERNEL.run(packed, problem, bad_x, ids, weights, NO_BIAS)
    with pytest.raises(ValueError, match="tokens have ids"):
        KERNEL.run(packed, problem, x, ids[:2], weights, NO_BIAS)
    with pytest.raises(ValueError, match="bias of down"):
        KERNEL.run(packed, problem, x, ids, weights, ExpertsBias(None, floats(E, H + 1)))
    with pytest.raises(IndexError, match="expert that there is not"):
        KERNEL.run(packed, problem, x, ids.fill_(E), weights, NO_BIAS)
    assert "in order" in KERNEL.why_not(dataclasses.replace(problem, reordered=True))


def test_several_python_threads_get_the_same_results(torch_threads):
    torch_threads(2)
    cases = []
    for name, tokens in (("int4", 1), ("int8", 9), ("mxfp4", 60)):
        _, problem, packed = make(name, compute="auto")
        arguments = (packed, problem, floats(tokens, H), *routed(tokens, 2, E), NO_BIAS)
        cases.append((arguments, KERNEL.run(*arguments)))

    def repeat(start: int) -> bool:
        turns = (cases[(start + turn) % len(cases)] for turn in range(30))
        return all(torch.equal(KERNEL.run(*arguments), y) for arguments, y in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(8)))
