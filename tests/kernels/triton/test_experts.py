"""Routed experts on the GPU against a float64 formula: every kind of weight, routing of every kind."""

from dataclasses import replace

import pytest
import torch

from pymllm.kernels.canonical import DenseWeight, Fp8Weight, IntWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton.experts import TritonExperts, sorted_slots

from ...moe_formula import expected_experts
from .gpu import DEVICE, HERE, UNIT, randn
from .test_float_weights import codebook

# What no expert answers is never written, and thus anything: the interpreter's numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# T tokens, K experts a token, E experts, H hidden size, I intermediate size
E, H, I = 5, 96, 64
KERNEL = TritonExperts()


def weight_of(kind, out_features, in_features, seed):
    values = randn(out_features, in_features, seed=seed).cpu() / in_features**0.5
    if kind == "int4":
        return IntWeight.from_float(values, bits=4, group_size=32, symmetric=False)
    if kind == "int8":
        return IntWeight.from_float(values, bits=8, group_size=in_features, symmetric=True)
    if kind == "fp8":
        return Fp8Weight.from_float(values, block=(64, 32), activations="float")
    if kind == "iq4":
        scaled = codebook(
            torch.float32, 32, in_features, False, out_features=out_features, seed=seed, name="iq4"
        )
        return replace(scaled, scales=scaled.scales / 2048)
    if kind == "mxfp4":
        made = codebook(torch.float8_e8m0fnu, 32, in_features, False, out_features=out_features, seed=seed)
        return made
    return DenseWeight(values.to(torch.float16))


def make(kind, gate_and_up_apart=False, activation="silu"):
    firsts = [[weight_of(kind, I, H, 10 * part + e) for e in range(E)] for part in range(2)]
    if not gate_and_up_apart:
        firsts = [[weight_of(kind, 2 * I, H, e) for e in range(E)]]
    down = [weight_of(kind, H, I, 100 + e) for e in range(E)]

    def problem(weights):
        out_features, in_features = weights[0].shape
        return LinearProblem(weights[0].type, in_features, out_features, torch.float16, DEVICE)

    weight = ExpertsWeight(tuple(firsts), down)
    return weight, ExpertsProblem(tuple(map(problem, firsts)), problem(down), E, GatedActivation(activation))


def packed_here(weight, problem):
    packed = KERNEL.pack(weight, problem)
    for name, tensor in packed.items():
        packed[name] = tensor.to(HERE)
    return packed


def check(kind, sizes, *, apart=False, activation="silu", biased=False):
    weight, problem = make(kind, apart, activation)
    assert KERNEL.why_not(problem) is None
    packed = packed_here(weight, problem)
    none = ExpertsBias()
    bias = ExpertsBias(randn(E, 2 * I, seed=8).half(), randn(E, H, seed=9).half()) if biased else none
    for tokens, top_k in sizes:
        generator = torch.Generator().manual_seed(tokens)
        x = randn(tokens, H, seed=3).half()
        ids = torch.randint(-1, E, (tokens, top_k), generator=generator)
        weights = torch.rand(tokens, top_k, generator=generator)
        found = KERNEL.run(packed, problem, x, ids.to(HERE), weights.to(HERE), bias).cpu()
        at_home = ExpertsBias(*(None if t is None else t.cpu() for t in bias))
        want = expected_experts(weight, x.cpu(), ids, weights, at_home, problem.activation)
        assert found.shape == x.shape and found.dtype is torch.float16
        # Weights, the gated product and the sum are rounded to float16, in rows of up to 96 terms.
        scale = want.abs().max() if want.numel() else 0
        assert not tokens or float((found.double() - want).abs().max()) <= 8 * UNIT[torch.float16] * float(
            scale
        )


@pytest.mark.parametrize("kind", ("int4", "int8", "fp8", "mxfp4", "iq4", "dense"))
def test_every_kind_of_weight_equals_the_float64_formula(kind):
    check(kind, ((0, 2), (1, 2), (30, 2)))


@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "swiglu"))
def test_activations_biases_and_gate_and_up_apart(activation):
    check("int4", ((1, 3), (21, 1)), activation=activation, biased=True, apart=activation == "silu")


def test_an_expert_that_gets_everything_and_one_that_comes_up_twice():
    weight, problem = make("int4")
    packed = packed_here(weight, problem)
    x = randn(40, H, seed=3).half()
    ids = torch.full((40, 2), 3, device=HERE)
    weights = torch.full((40, 2), 0.5, device=HERE)
    found = KERNEL.run(packed, problem, x, ids, weights, ExpertsBias()).cpu()
    want = expected_experts(weight, x.cpu(), ids.cpu(), weights.cpu(), ExpertsBias(), problem.activation)
    assert torch.allclose(found.double(), want, atol=4e-3 * float(want.abs().max()))


@pytest.mark.parametrize("tokens, top_k, experts", ((9, 2, 5), (700, 2, 7), (3, 8, 130)))
def test_slots_are_sorted_by_expert_and_padded_to_whole_blocks(tokens, top_k, experts):
    ids = torch.randint(-1, experts, (tokens, top_k), generator=torch.Generator().manual_seed(1))
    block, order, block_experts = sorted_slots(ids.to(HERE), experts)
    order, block_experts, slots = order.cpu(), block_experts.cpu().tolist(), ids.numel()
    flat, seen = ids.flatten().tolist(), []
    used = [expert for expert in block_experts if expert >= 0]
    assert used == sorted(used) and block_experts[: len(used)] == used  # what is left over comes last
    for index, expert in enumerate(used):
        for slot in order[index * block : (index + 1) * block].tolist():
            if slot < slots:
                assert flat[slot] == expert
                seen.append(slot)
    assert sorted(seen) == [slot for slot in range(slots) if flat[slot] >= 0]
    assert len(used) == sum(-(-flat.count(e) // block) for e in range(experts))


@pytest.mark.parametrize("kind", ("int4", "mxfp4", "dense"))
def test_unpacking_gives_back_what_was_packed(kind):
    weight, problem = make(kind)
    again = KERNEL.unpack(KERNEL.pack(weight, problem), problem)
    for name, experts in weight.products().items():
        for one, other in zip(experts, again.products()[name], strict=True):
            for key, tensor in one.tensors().items():
                assert torch.equal(
                    tensor.view(torch.uint8), other.tensors()[key].contiguous().view(torch.uint8)
                ), key
