"""The gated delta rule, the scan of Mamba 2 and causal convolutions on the GPU, against float64."""

from dataclasses import replace

import pytest
import torch

from pymllm.kernels.registry import select
from pymllm.kernels.triton.recurrence import TritonCausalConv, TritonGatedDelta, TritonMamba2Scan

from ..recurrence_cases import (
    assert_near,
    conv_case,
    gated_delta_case,
    mamba2_case,
    small_cases,
    step_of,
    tokens_of,
)
from .gpu import DEVICE, FLOATS, HERE, UNIT

KERNELS = {
    "gated_delta": TritonGatedDelta(),
    "mamba2_scan": TritonMamba2Scan(),
    "causal_conv": TritonCausalConv(),
}
# As those of recurrence_cases.py, with less work for the interpreter.
MIXED = ((3, 0, 4), (1, 9, 0), (6, 3, 6), (1, 0, 2), (0, 8, 3), (2, 0, -1), (2, 6, 1))
STEPS = {"nothing": (), "no token": ((0, 3, 1),), "decoding": ((1, 4, 3), (1, 0, 5)), "mixed": MIXED}
# Of float32 arithmetic with a GPU's exponential (2^-22), and of one rounding to bfloat16 more than the CPU has.
FLOAT32 = 2e-5


def check(case, requests):
    case = case.to(HERE)
    state = case.state()
    exact, exact_state = case.exact(requests, state)
    found = case.run(KERNELS[case.operation], state, step_of(requests, HERE))
    assert_near(found, exact, case.problem.dtype, FLOAT32 + UNIT.get(case.problem.dtype, 0.0))
    assert_near(state, exact_state, torch.float32, FLOAT32)


@pytest.mark.parametrize("operation", range(3), ids=list(KERNELS))
@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", (torch.float32, *FLOATS), ids=str)
def test_a_step_equals_the_recurrence_in_float64(operation, requests, dtype):
    check(small_cases(tokens_of(requests), dtype)[operation], requests)


@pytest.mark.parametrize("operation", range(3), ids=list(KERNELS))
def test_a_prompt_has_the_same_bits_however_it_is_cut_and_beside_others(operation):
    case = small_cases(12)[operation].to(HERE)
    kernel, whole_state = KERNELS[case.operation], case.state()
    whole = case.run(kernel, whole_state, step_of(((12, 0, 2),), HERE))
    state, pieces, at = case.state(), [], 0
    for cut in (1, 4, 1, 6):
        pieces.append(case.slice(at, at + cut).run(kernel, state, step_of(((cut, at, 2),), HERE)))
        at += cut
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(state[2], whole_state[2])
    case = small_cases(tokens_of(MIXED))[operation].to(HERE)
    together = case.run(kernel, case.state(), step_of(MIXED, HERE))
    alone = case.slice(4, 10).run(kernel, case.state(), step_of(MIXED[2:3], HERE))
    assert torch.equal(together[4:10], alone)


@pytest.mark.parametrize("operation", range(3), ids=list(KERNELS))
def test_without_slots_nothing_is_read_or_kept(operation):
    requests = ((3, 0, 0), (2, 5, 1))
    case = small_cases(5)[operation].to(HERE)
    exact, _ = case.exact(requests, None)
    found = case.run(KERNELS[case.operation], None, step_of(requests, HERE, slots=False))
    assert_near(found, exact, torch.float32, FLOAT32)


def test_sizes_and_options():
    requests = ((2, 0, 1), (1, 3, 4))
    for case in (
        gated_delta_case(3, 1, 1, 1, 1, eps=None),
        gated_delta_case(3, 1, 3, 5, 2),
        gated_delta_case(3, 1, 2, 128, 128, small=torch.bfloat16),
        gated_delta_case(3, 1, 2, 20, 33, channels=True),
        mamba2_case(3, 1, 1, 1, 1, limit=(0.0, 0.1)),
        mamba2_case(3, 3, 5, 1, 2, limit=(0.05, 0.2)),
        mamba2_case(3, 2, 64, 2, 128),
        conv_case(3, 1, 1, activation=None, bias=False),
        conv_case(3, 257, 3, activation=None),
        conv_case(3, 31, 7, bias=False),
    ):
        check(case, requests)


def test_a_step_of_any_size_is_as_exact_as_float32():
    case = mamba2_case(12, 2, 4, 1, 3)
    case.others["dt_bias"].zero_()
    case.tokens["dt"][:, 0] = torch.tensor(
        [-200.0, -80.0, -20.0, -7.0, -3.0, -1.0, -0.7, 0.0, 1.0, 19.0, 21.0, 800.0]
    )
    # The steps alone: each a request's first, and only token, with D left out.
    case.others["D"].zero_()
    requests = tuple((1, 0, -1) for _ in range(12))
    case = case.to(HERE)
    exact, _ = case.exact(requests, case.state())
    found = case.run(KERNELS["mamba2_scan"], case.state(), step_of(requests, HERE)).cpu().double()
    assert ((found - exact).abs() <= 5e-6 * exact.abs().amax(-1, keepdim=True) + 1e-30).all()


def test_what_it_does_not_take_is_refused_and_left_to_the_reference():
    for case, changed, why in (
        (gated_delta_case(1, 1, 1, 1, 1), {"key_dim": 513}, "takes keys of up to 512 elements, not 513"),
        (mamba2_case(1, 1, 1, 1, 1), {"state_size": 600}, "takes states of up to 512 elements, not 600"),
        (conv_case(1, 1, 1), {"kernel_size": 33}, "takes kernels of up to 32 tokens, not 33"),
        (
            conv_case(1, 1, 1),
            {"dtype": torch.float64},
            "computes in float32, float16 or bfloat16, not in torch.float64",
        ),
    ):
        problem = replace(case.problem, device=DEVICE)
        chosen = select(case.operation, problem)
        assert chosen.kernel.name == "triton"
        chosen = select(case.operation, replace(problem, **changed))
        assert chosen.kernel.name == "reference"
        assert chosen.refused[0].why == why
