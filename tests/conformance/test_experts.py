"""Every experts kernel against a float64 formula, over weights of every family, and every packing undone."""

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

import dataclasses
import math
from functools import partial

import pytest
import torch

from pymllm.kernels.canonical import DenseWeight, on_meta
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.registry import kernels_for, select
from pymllm.quantization.base import get_quantization_config
from pymllm.weights.spec import LinearShape, Span

from ..moe_formula import expected_experts, routed

CPU = probe_device("cpu")
E, H, I = 5, 64, 96
METHODS = {
    "int4": {"group_size": "32"},
    "int4 sym": {"group_size": "32", "symmetric": "true"},
    "int8": {},
    "fp8": {"granularity": "block"},
    "fp8 channel": {"granularity": "channel"},
    "mxfp4": {},
    "mxfp8": {},
}
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {
    "silu": GatedActivation(),
    "gelu": GatedActivation("gelu_tanh"),
    "swiglu": GatedActivation("swiglu", 1.702, 7.0),
}


def canonical(name, out_features, in_features, seed):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    weight *= in_features**-0.5
    if name in ("float32", "bfloat16"):
        return DenseWeight(weight.to(getattr(torch, name)))
    method = get_quantization_config(name.split()[0]).from_options(METHODS[name])
    shape = LinearShape(
        Span.full(in_features), (Span.full(out_features),), (f"experts.{seed}",), torch.float32
    )
    return method.quantize(weight, shape)


def ordered(weight, seed):
    """The same weight as one of GPTQ in act order is: columns in an order of their own."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(weight, input_order=order)


def make(name, dtype, *, apart=False, activation="silu", compute="exact", reordered=False):
    """(ExpertsWeight, ExpertsProblem); apart: gate and up as two weights."""
    sizes = [(I, H), (I, H), (H, I)] if apart else [(2 * I, H), (H, I)]
    products = []
    for product, (out_features, in_features) in enumerate(sizes):
        experts = [canonical(name, out_features, in_features, 10 * e + product) for e in range(E)]
        products.append([ordered(w, e) for e, w in enumerate(experts)] if reordered else experts)
    linear = [LinearProblem(p[0].type, p[0].shape[1], p[0].shape[0], dtype, CPU, compute) for p in products]
    problem = ExpertsProblem(tuple(linear[:-1]), linear[-1], E, ACTIVATIONS[activation], reordered)
    return ExpertsWeight(tuple(products[:-1]), products[-1]), problem


def accepting(problem):
    found = [kernel for kernel in kernels_for("experts") if kernel.why_not(problem) is None]
    assert found and found[-1].name == "reference"
    return found


def gated(name, both):
    gate, up = both.chunk(2)
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


def assert_equal(kernel, weight, problem, x, ids, weights, bias, activation):
    y = kernel.run(kernel.pack(weight, problem), problem, x, ids, weights, bias)
    assert y.shape == x.shape and y.dtype is x.dtype
    want = expected_experts(weight, x, ids, weights, bias, partial(gated, activation))
    allowed = getattr(kernel, "tolerance", lambda p: 3 * TOLERANCES[p.dtype])(problem)
    assert float((y.double() - want).norm()) <= allowed * max(float(want.norm()), 1e-3), kernel.name


@pytest.mark.parametrize("name", ("float32", *METHODS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, top_k", ((0, 2), (1, 2), (1, 0), (7, 1), (33, 3)))
def test_every_kernel_equals_the_float64_formula(name, dtype, tokens, top_k):
    name = "bfloat16" if name == "float32" and dtype is torch.bfloat16 else name
    weight, problem = make(name, dtype)
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    for kernel in accepting(problem):
        assert_equal(kernel, weight, problem, x, *routed(tokens, top_k, E), ExpertsBias(), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("apart", (False, True), ids=("fused", "apart"))
@pytest.mark.parametrize("reordered", (False, True), ids=("in order", "act order"))
def test_biases_activations_and_orders_of_inputs(activation, apart, reordered):
    weight, problem = make("int4", torch.float32, apart=apart, activation=activation, reordered=reordered)
    generator = torch.Generator().manual_seed(2)
    x = 5 * torch.randn(9, H, generator=generator)  # large enough for swiglu's limits to matter
    bias = ExpertsBias(torch.randn(E, 2 * I, generator=generator), torch.randn(E, H, generator=generator))
    for kernel in accepting(problem):
        assert_equal(kernel, weight, problem, x, *routed(9, 2, E), bias, activation)


@pytest.mark.parametrize("name", ("float32", "bfloat16", *METHODS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_gives_back_every_expert_bit_for_bit(name, dtype):
    weight, problem = make(name, dtype, reordered=name == "int4 sym")
    for kernel in accepting(problem):
        packed = kernel.pack(weight, problem)
        again = kernel.unpack(packed, problem)
        for product, experts in weight.products().items():
            for before, after in zip(experts, again.products()[product], strict=True):
                assert after.type == before.type
                for key, tensor in before.tensors().items():
                    found = after.tensors()[key]
                    assert found.dtype is tensor.dtype and found.shape == tensor.shape
                    same = torch.equal(
                        found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
                    )
                    assert same, (kernel.name, product, key)
                if problem.reordered:
                    assert torch.equal(after.input_order, before.input_order)


@pytest.mark.parametrize("name", ("float32", *METHODS))
def test_a_plan_counts_the_bytes_that_are_packed(name):
    weight, problem = make(name, torch.float32)
    planned = ExpertsWeight(
        tuple([on_meta(w) for w in p] for p in weight.gate_up), [on_meta(w) for w in weight.down]
    )
    for kernel in accepting(problem):
        shapes = [
            {key: (tensor.shape, tensor.dtype) for key, tensor in kernel.pack(w, problem).items()}
            for w in (weight, planned)
        ]
        assert shapes[0] == shapes[1], kernel.name


def test_linear_kernels_come_before_the_reference_and_every_refusal_has_a_reason():
    for name in ("float32", *METHODS):
        _, problem = make(name, torch.float32)
        selection = select("experts", problem)
        assert all(refusal.why for refusal in selection.refused)
        if name == "float32":
            assert selection.kernel.name != "reference"
