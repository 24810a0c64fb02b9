"""How many binaries the steps of a model need: one for each tile, however many tokens a step has."""

# T tokens, R requests, E experts, K experts a token, H hidden size

from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch

from pymllm.kernels.attention import AttentionStep, KVType
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.kernels.recurrence import CausalConvProblem, GatedDeltaProblem, Mamba2ScanProblem
from pymllm.kernels.registry import KERNELS, kernels_for
from pymllm.kernels.routing import Routing
from pymllm.kernels.triton import linear_cases
from pymllm.kernels.triton.ahead_of_time import Case, Pointer, Task, tasks_of
from pymllm.kernels.triton.attention import example_problem, meta_tensors
from pymllm.kernels.triton.experts import TritonExperts
from pymllm.kernels.triton.launch import kernel

DEVICE = probe_device("cuda:sm90")
COUNTS = (*range(1, 71), 127, 128, 129, 1000, 2048)
BFLOAT16 = torch.bfloat16


def meta(*shape, dtype=BFLOAT16):
    return torch.empty(shape, dtype=dtype, device="meta")


def step_of(requests, new, length, **more):
    """A step of some requests; its rows of the page table are as wide as its longest request asks."""
    return AttentionStep(
        cu_seqlens_q=meta(requests + 1, dtype=torch.int32),
        # As the tensors of a step lie in one: where a row begins depends on how many there are.
        context_lens=meta(2, requests + 1, dtype=torch.int32)[1, 1:],
        page_tables=meta(requests, -(-length // 16), dtype=torch.int32),
        max_seqlen_q=new,
        max_seqlen_k=length,
        **more,
    )


def steps(count):
    """A step in which `count` requests decode, and one that reads a prompt of so many tokens."""
    yield step_of(count, 1, 100 + 37 * count, slot_mapping=meta(3, count, dtype=torch.int64)[1])
    yield step_of(1, count, count, slot_mapping=meta(count, dtype=torch.int64))


ATTENTION = example_problem(DEVICE, KVType(BFLOAT16))


def attention(kernel):
    for problem in (ATTENTION, replace(ATTENTION, kv=KVType(torch.float8_e4m3fn, "static"))):
        for count in COUNTS:
            for step in steps(count):
                q, k, v, cache = meta_tensors(problem, count, 4096)
                yield partial(kernel.run, problem, q, k, v, step, cache)


def kv_store(kernel):
    for count in COUNTS:
        for step in steps(count):
            q, k, v, cache = meta_tensors(ATTENTION, count, 4096)
            yield partial(kernel.run, ATTENTION, k, v, cache, step)
            angles = meta(count, ATTENTION.head_dim // 2, dtype=torch.float32)
            yield partial(kernel.rotate_and_store, ATTENTION, q, k, v, cache, step, angles, angles)


def routing(kernel):
    for count in COUNTS:
        yield partial(kernel.run, Routing(top_k=8), meta(count, 128), None)


def experts(kernel):
    first = next(iter(kernel.cases(DEVICE)))
    run, (packed, problem, *_) = first.run, first.run.__defaults__
    for count in COUNTS:
        ids = meta(count, 8, dtype=torch.int64)
        yield partial(run, packed, problem, meta(count, 2048), ids)


def embedding(kernel):
    weight = kernel.examples()[0]
    problem = LinearProblem(weight.type, weight.shape[1], weight.shape[0], BFLOAT16, DEVICE)
    packed = kernel.pack(weight, problem)
    for count in COUNTS:
        yield partial(kernel.run, packed, problem, meta(3, count, dtype=torch.int64)[1])


def elementwise(kernel):
    for count in COUNTS:
        x = meta(count, 4096)
        heads = meta(count, 6144)[:, :4096].view(count, 32, 128)
        table = meta(count, 64, dtype=torch.float32)
        for codes in (None, RowCodes(True), RowCodes(False, 128)):
            yield partial(kernel.rms_norm, x, meta(4096), 1e-6, x, codes)
            yield partial(kernel.silu_and_mul, x, codes)
        yield partial(kernel.rotate, heads, table, table)


def with_states(problem, run):
    """Steps of a layer with states.  run: takes the number of tokens, the state and the step."""
    for count in COUNTS:
        for requests, new in ((count, 1), (1, count)):
            slots = meta(3, requests, dtype=torch.int64)[1]
            state = meta(16, *problem.state_shape, dtype=torch.float32)
            yield partial(run, count, state, step_of(requests, new, count, state_slots=slots))


def gated_delta(kernel):
    problem = GatedDeltaProblem(
        num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, dtype=BFLOAT16, device=DEVICE
    )

    def run(tokens, state, step):
        q, v, beta = meta(tokens, 16, 128), meta(tokens, 32, 128), meta(tokens, 32)
        kernel.launch(problem, q, q, v, beta.float(), beta, state, step)

    return with_states(problem, run)


def mamba2_scan(kernel):
    problem = Mamba2ScanProblem(
        num_heads=64, head_dim=64, num_groups=8, state_size=128, dtype=BFLOAT16, device=DEVICE
    )

    def run(tokens, state, step):
        x, b, a = meta(tokens, 64, 64), meta(tokens, 8, 128), meta(64, dtype=torch.float32)
        kernel.launch(problem, x, x[..., 0], a, b, b, a, a, state, step)

    return with_states(problem, run)


def causal_conv(kernel):
    problem = CausalConvProblem(channels=8192, kernel_size=4, dtype=BFLOAT16, device=DEVICE)

    def run(tokens, state, step):
        kernel.launch(problem, meta(tokens, 8192), meta(8192, 4), None, state, step)

    return with_states(problem, run)


RUNS = {
    one.__name__: one
    for one in (
        attention,
        kv_store,
        routing,
        experts,
        embedding,
        elementwise,
        gated_delta,
        mamba2_scan,
        causal_conv,
    )
}


def of_triton(operation):
    pairs = zip(KERNELS[operation], kernels_for(operation), strict=True)
    return [kernel for path, kernel in pairs if ".triton." in path]


def tasks(kernel, runs):
    for run in runs:
        yield from tasks_of(kernel.name, Case("a step", run), DEVICE)


def assert_one_binary_a_tile(found):
    """Launches that differ in sizes and addresses alone, not in types, nor in constants, share a binary."""
    found, kinds = list(found), defaultdict(set)
    assert found
    for task in found:
        types = tuple(
            argument.dtype if isinstance(argument, Pointer) else type(argument)
            for argument in task.launch.arguments
        )
        kinds[task.launch.kernel.name, types, str(task.launch.constants)].add(task.key)
    assert {kind: keys for kind, keys in kinds.items() if len(keys) > 1} == {}


def test_all_operations_with_triton_kernels_are_here():
    assert {operation for operation in KERNELS if of_triton(operation)} == {"linear", *RUNS}


@pytest.mark.parametrize("operation", RUNS)
def test_steps_of_any_number_of_tokens_need_a_binary_for_each_tile(operation):
    for ours in of_triton(operation):
        found = list(tasks(ours, RUNS[operation](ours)))
        assert_one_binary_a_tile(found)
        names = {task.launch.kernel.name for task in found}
        # A tile for each power of two of tokens and of keys, at most, in two types of cache and two kinds of step.
        assert len({task.key for task in found}) <= 24 * len(names), operation


@pytest.mark.parametrize("kernel", of_triton("linear"), ids=lambda kernel: kernel.name)
def test_products_of_any_number_of_tokens_need_a_binary_for_each_tile(kernel, monkeypatch):
    monkeypatch.setattr(linear_cases, "TOKENS", COUNTS)
    by_weight = defaultdict(list)
    for case in kernel.cases(DEVICE):
        kind, _, sizes = case.name.rpartition(",")
        by_weight[kind, sizes.partition(" x ")[2]] += tasks(kernel, [case.run])
    for name, found in by_weight.items():
        assert_one_binary_a_tile(found)
        assert len({task.key for task in found}) <= 16, name


def test_a_key_tells_what_varies_from_what_does_not():
    @kernel(varying=("tokens", "slots"))
    def probe(x, slots, tokens, size): ...

    def key(x=0, slots=0, tokens=3, size=3):
        launches = [lambda: probe.launch((1,), meta(99)[x:], meta(99)[slots:], tokens, size)]
        return next(tasks(TritonExperts(), launches)).key

    assert key(tokens=1) == key(tokens=16) == key(tokens=3) != key(tokens=2**31)
    assert key(slots=1) == key() != key(x=1)
    assert len({key(size=size) for size in (1, 3, 5, 16, 32, 2**31, 2**32)}) == 4
    assert isinstance(next(tasks(TritonExperts(), [lambda: probe.launch((1,), meta(1), None, 1, 1)])), Task)
