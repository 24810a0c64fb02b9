"""The gated delta rule, the scan of Mamba 2 and causal convolutions, every kernel and path against float64."""

from dataclasses import replace

import pytest
import torch

from pymllm.kernels.hardware import probe_device
from pymllm.kernels.native.extension import native, native_available
from pymllm.kernels.native.recurrence import NativeCausalConv, NativeGatedDelta, NativeMamba2Scan
from pymllm.kernels.recurrence import CausalConvProblem, GatedDeltaProblem, Mamba2ScanProblem
from pymllm.kernels.registry import kernels_for, select

from .integer_cases import PATHS, needs_native
from .recurrence_cases import (
    FLOATS,
    MIXED,
    STEPS,
    assert_near,
    conv_case,
    gated_delta_case,
    mamba2_case,
    small_cases,
    step_of,
    tokens_of,
)

# Sums of up to 100 products in float32, and states that carry such sums on.
FLOAT32 = 3e-6
OPERATIONS = ("gated_delta", "mamba2_scan", "causal_conv")


def cpu_kernels(operation):
    return [kernel for kernel in kernels_for(operation) if getattr(kernel, "device_type", "cpu") == "cpu"]


NATIVE = {
    "gated_delta": NativeGatedDelta,
    "mamba2_scan": NativeMamba2Scan,
    "causal_conv": NativeCausalConv,
}
REFERENCES = [(operation, cpu_kernels(operation)[-1]) for operation in OPERATIONS]
ON_PATHS = [(operation, NATIVE[operation](path)) for operation in OPERATIONS for path in PATHS]


def name_of(value):
    return (
        value
        if isinstance(value, str)
        else "-".join((value.name, *filter(None, [getattr(value, "isa", "")])))
    )


EVERY = [*REFERENCES, *(ON_PATHS if native_available() else ())]
every_kernel = pytest.mark.parametrize("operation, kernel", EVERY, ids=name_of)


def case_of(operation, tokens, dtype=torch.float32):
    return next(case for case in small_cases(tokens, dtype) if case.operation == operation)


def check(kernel, case, requests):
    state = case.state()
    exact, exact_state = case.exact(requests, state)
    found = case.run(kernel, state, step_of(requests))
    assert_near(found, exact, case.problem.dtype, FLOAT32)
    assert_near(state, exact_state, torch.float32, FLOAT32)


@every_kernel
@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_step_equals_the_recurrence_in_float64(operation, kernel, requests, dtype):
    check(kernel, case_of(operation, tokens_of(requests), dtype), requests)


@every_kernel
def test_slots_that_no_request_has_stay_as_they_are(operation, kernel):
    case = case_of(operation, 3)
    state = case.state()
    before = state.clone()
    case.run(kernel, state, step_of(((2, 1, 4), (1, 0, 1))))
    others = [0, 2, 3, 5, 6]
    assert torch.equal(state[others], before[others])


@every_kernel
def test_a_fresh_request_does_not_see_what_its_slot_holds(operation, kernel):
    case = case_of(operation, 4)
    results = []
    for held in (0.0, float("nan")):
        state = case.state().fill_(held)
        results.append((case.run(kernel, state, step_of(((1, 0, 3), (3, 0, 0)))), state[[3, 0]]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@every_kernel
def test_without_slots_every_request_begins_with_zeros_and_nothing_is_kept(operation, kernel):
    requests = ((3, 0, 0), (2, 5, 1))
    case = case_of(operation, 5)
    exact, _ = case.exact(requests, None)
    assert_near(case.run(kernel, None, step_of(requests, slots=False)), exact, torch.float32, FLOAT32)


def assert_same(kernel, found, expected):
    if kernel.reproducible:
        assert torch.equal(found, expected)
    else:  # what is float64 within differs by the rounding to float32
        assert_near(found, expected.double(), torch.float32, 1e-6)


@every_kernel
def test_a_request_has_the_same_result_alone_and_beside_others(operation, kernel):
    case = case_of(operation, tokens_of(MIXED))
    state = case.state()
    together_state = state.clone()
    together = case.run(kernel, together_state, step_of(MIXED))
    at = 0
    for new, before, slot in MIXED:
        alone_state = state.clone()
        alone = case.slice(at, at + new).run(kernel, alone_state, step_of(((new, before, slot),)))
        assert_same(kernel, together[at : at + new], alone)
        if slot >= 0:
            assert_same(kernel, together_state[slot], alone_state[slot])
        at += new


@every_kernel
@pytest.mark.parametrize("cuts", ((1,) * 150, (64, 86), (1, 63, 17, 69), (149, 1)), ids=len)
def test_a_prompt_has_the_same_result_however_it_is_cut(operation, kernel, cuts):
    case = case_of(operation, 150)
    whole_state = case.state()
    whole = case.run(kernel, whole_state, step_of(((150, 0, 2),)))
    state, pieces, at = case.state(), [], 0
    for cut in cuts:
        pieces.append(case.slice(at, at + cut).run(kernel, state, step_of(((cut, at, 2),))))
        at += cut
    assert_same(kernel, torch.cat(pieces), whole)
    assert_same(kernel, state[2], whole_state[2])


SIZES = {
    "gated_delta": [
        gated_delta_case(3, 1, 1, 1, 1, eps=None),
        gated_delta_case(3, 1, 3, 5, 2),
        gated_delta_case(3, 2, 2, 16, 64, eps=None),
        gated_delta_case(3, 1, 2, 128, 128),
        gated_delta_case(3, 1, 2, 128, 128, channels=True),
        gated_delta_case(3, 2, 2, 1, 3, eps=None, channels=True),
    ],
    "mamba2_scan": [
        mamba2_case(3, 1, 1, 1, 1, limit=(0.0, 0.1)),
        mamba2_case(3, 3, 5, 1, 2, limit=(0.05, 0.2)),
        mamba2_case(3, 4, 64, 2, 128),
    ],
    "causal_conv": [
        conv_case(3, 1, 1, activation=None, bias=False),
        conv_case(3, 5, 2),
        conv_case(3, 257, 3, activation=None),
        conv_case(3, 600, 4, bias=False),
        conv_case(3, 31, 7),
    ],
}


@every_kernel
def test_sizes_from_one_element_to_those_of_models(operation, kernel):
    for case in SIZES[operation]:
        check(kernel, case, ((2, 0, 1), (1, 3, 4)))


@every_kernel
def test_decays_and_steps_of_any_size_stay_finite(operation, kernel):
    case = case_of(operation, 70)
    for name, extremes in {"g": (-200.0, -torch.inf, 0.0, -1e-7), "dt": (-200.0, 90.0, 800.0, -20.0)}.items():
        if name in case.tokens:
            case.tokens[name][1:5, 0] = torch.tensor(extremes)
    if operation == "causal_conv":
        case.tokens["x"][1:3] = torch.tensor([[-1e4], [1e4]])
    check(kernel, case, ((70, 0, 3),))


@pytest.mark.parametrize("kernel", [pair[1] for pair in EVERY if pair[0] == "gated_delta"], ids=name_of)
def test_each_key_channel_may_have_a_decay_of_its_own(kernel):
    for dtype in FLOATS:
        check(kernel, gated_delta_case(tokens_of(MIXED), 2, 4, 12, 37, dtype, channels=True), MIXED)
    case = gated_delta_case(70, 1, 2, 20, 33, channels=True)
    case.tokens["g"][1:5, 0, 0] = torch.tensor((-200.0, -torch.inf, 0.0, -1e-7))
    check(kernel, case, ((70, 0, 3),))
    whole_state, state, pieces, at = case.state(), case.state(), [], 0
    whole = case.run(kernel, whole_state, step_of(((70, 0, 3),)))
    for cut in (1, 1, 32, 3, 33):
        pieces.append(case.slice(at, at + cut).run(kernel, state, step_of(((cut, at, 3),))))
        at += cut
    assert_same(kernel, torch.cat(pieces), whole)
    assert_same(kernel, state[3], whole_state[3])
    with pytest.raises(ValueError, match=r"g must be \[70, 2, 20\]"):
        replace(case, tokens=case.tokens | {"g": case.tokens["beta"]}).run(
            kernel, state, step_of(((70, 0, 3),))
        )


@every_kernel
def test_a_long_prompt_that_forgets_next_to_nothing_stays_exact(operation, kernel):
    # Decays of 0.9995 to the power of 1500: an error of each would show.
    case = {
        "gated_delta": lambda: gated_delta_case(1500, 1, 1, 8, 16),
        "mamba2_scan": lambda: mamba2_case(1500, 1, 4, 1, 16),
        "causal_conv": lambda: conv_case(1500, 3, 4),
    }[operation]()
    if operation == "gated_delta":
        case.tokens["g"].fill_(-5e-4)
    elif operation == "mamba2_scan":
        case.others["A"].fill_(-5e-4)
        case.others["dt_bias"].fill_(0.5)
    state = case.state()
    exact, exact_state = case.exact(((1500, 0, 2),), state)
    found = case.run(kernel, state, step_of(((1500, 0, 2),)))
    assert_near(found, exact, torch.float32, 1e-5)
    assert_near(state, exact_state, torch.float32, 1e-5)


@every_kernel
def test_g_beta_and_weights_may_be_of_another_float_dtype(operation, kernel):
    requests = ((4, 2, 0),)
    if operation == "gated_delta":
        for small in FLOATS:
            check(kernel, gated_delta_case(4, 1, 2, 8, 16, torch.bfloat16, small=small), requests)
        return
    case = case_of(operation, 4, torch.bfloat16)
    for dtype in FLOATS:
        check(kernel, replace(case, others={n: t.to(dtype) for n, t in case.others.items()}), requests)


@every_kernel
def test_what_does_not_fit_is_refused_with_what_was_expected(operation, kernel):
    case, state = case_of(operation, 3), None
    step = step_of(((2, 0, 1), (1, 3, 4)))
    name = next(iter(case.tokens))
    short = {n: t[..., :-1] for n, t in case.tokens.items()}
    for changed, expected in (
        (replace(case, tokens=short), f"{name} must be"),
        (replace(case, tokens=case.tokens | {name: case.tokens[name].double()}), "torch.float32, not"),
    ):
        with pytest.raises(ValueError, match=expected):
            changed.run(kernel, case.state(), step)
    with pytest.raises(ValueError, match="attach states"):
        case.run(kernel, None, step)
    for wrong in (case.state().double(), case.state()[..., :-1], case.state().transpose(0, -1)):
        with pytest.raises(ValueError, match=r"the state must be \[slots, "):
            case.run(kernel, wrong, step)
    state = case.state()
    with pytest.raises(ValueError, match="no state_slots"):
        case.run(kernel, state, step_of(((3, 0, 0),), slots=False))
    for requests, expected in (
        (((2, 0, 1), (1, 3, 7)), "below the 7 slots of the state, not 7"),
        (((2, 0, 1), (1, 3, 1)), "for one request only"),
        (((2, 0, 1),), "from 0 to 3"),
        (((2, 0, 1), (1, -1, 2)), "context_lens"),
    ):
        with pytest.raises(ValueError, match=expected):
            case.run(kernel, state, step_of(requests))
    step = step_of(((3, 0, 0),))
    step.state_slots = step.state_slots.int()
    with pytest.raises(ValueError, match="int64"):
        case.run(kernel, state, step)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_conventions_are_those_of_transformers(operation):
    """Which heads share, what is normalised and scaled, how a state lies: a prompt, then one token."""
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    case, kernel = case_of(operation, 70), cpu_kernels(operation)[-1]
    state = case.state()
    steps = step_of(((69, 0, 2),)), step_of(((1, 69, 2),))
    found = torch.cat(
        [
            case.slice(*at).run(kernel, state, step)
            for at, step in zip(((0, 69), (69, 70)), steps, strict=True)
        ]
    )
    inputs, others = {n: t[None] for n, t in case.tokens.items()}, case.others
    if operation == "gated_delta":
        # Not every version repeats the key heads by itself.
        for name in ("q", "k"):
            inputs[name] = inputs[name].repeat_interleave(
                inputs["v"].shape[2] // inputs[name].shape[2], dim=2
            )
        y, ended = qwen.torch_chunk_gated_delta_rule(
            *inputs.values(), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    elif operation == "mamba2_scan":
        y, ended = mamba2.mamba2_chunk_scan(
            inputs["x"],
            inputs["dt"],
            others["A"],
            inputs["B"],
            inputs["C"],
            chunk_size=32,
            D=others["D"],
            dt_bias=others["dt_bias"],
            dt_softplus=True,
            dt_limit=case.problem.dt_limit,
            return_final_states=True,
        )
        y = y.view(1, *found.shape)
    else:
        x = inputs["x"].transpose(1, 2)
        y = qwen.causal_conv1d_fn(x, others["weight"], others["bias"], activation="silu").transpose(1, 2)
        ended = x[..., -3:]
    assert_near(found, y[0].double(), torch.float32, 1e-5)
    assert_near(state[2], ended[0].double(), torch.float32, 1e-5)


@needs_native
@pytest.mark.parametrize("operation, kernel", ON_PATHS, ids=name_of)
def test_the_number_of_threads_changes_no_bit(operation, kernel):
    # Enough work for two threads (kernels/threads.h), in requests of very different lengths.
    requests = ((1, 3, 0), (300, 0, 2), (1, 0, 5), (40, 7, 1))
    tokens = tokens_of(requests)
    case = {
        "gated_delta": lambda: gated_delta_case(tokens, 1, 3, 32, 40),
        "mamba2_scan": lambda: mamba2_case(tokens, 3, 32, 1, 40),
        "causal_conv": lambda: conv_case(tokens, 600, 4),
    }[operation]()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            state = case.state()
            results.append((case.run(kernel, state, step_of(requests)), state))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_recorded_step_takes_the_slots_and_lengths_of_the_step_that_it_is_played_on(operation):
    kernel, case = NATIVE[operation](), case_of(operation, 3)
    step = step_of(((1, 4, 3), (1, 0, 5), (1, 77, 0)))
    state, tape = case.state(), native().Tape()
    case.run(kernel, state, step)  # looks at the step's tensors
    step.restart()
    tape.record()
    try:
        y = case.run(kernel, state, step)
    finally:
        tape.stop()
    assert len(tape) == 1
    again = ((1, 0, 2), (1, 8, 6), (1, 1, -1))
    step.state_slots.copy_(torch.tensor([slot for _, _, slot in again]))
    step.context_lens.copy_(torch.tensor([new + before for new, before, _ in again]))
    expected_state = state.clone()
    expected = case.run(kernel, expected_state, step_of(again))
    tape.play(0, 1)
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)


def test_problems_that_cannot_be_are_refused():
    here = {"dtype": torch.float32, "device": probe_device("cpu")}
    with pytest.raises(ValueError, match=r"value heads \(3\) must be a multiple of the key heads \(2\)"):
        GatedDeltaProblem(num_key_heads=2, num_value_heads=3, key_dim=4, value_dim=4, **here)
    with pytest.raises(ValueError, match=r"heads \(3\) must be a multiple of the groups \(0\)"):
        Mamba2ScanProblem(num_heads=3, head_dim=4, num_groups=0, state_size=4, **here)
    with pytest.raises(ValueError, match="1 token or more, not 0"):
        CausalConvProblem(channels=4, kernel_size=0, **here)
    with pytest.raises(ValueError, match="'silu' or None, not 'gelu'"):
        CausalConvProblem(channels=4, kernel_size=4, activation="gelu", **here)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_problem_has_a_kernel(operation):
    for dtype in (*FLOATS, torch.float64):
        problem = replace(case_of(operation, 1).problem, dtype=dtype)
        chosen = select(operation, problem)
        assert chosen.kernel.name == (
            "reference" if dtype is torch.float64 else cpu_kernels(operation)[0].name
        )
