"""Decoding steps played from a tape: the same answers as without one, and never a stale one."""

from __future__ import annotations

import pytest
import torch

import pymllm.engine.decoding as decoding_module
from pymllm import LLM
from pymllm.engine.tape import NotRepeatable, record
from pymllm.swapping.swap import swap

from ..kernels.integer_cases import needs_native
from ..processes import python
from .answers import answers, greedy

pytestmark = needs_native

PROMPTS = [[5, 6, 7], [9] * 30, [11, 3, 200, 17, 8]]


def tapes(llm: LLM) -> dict[int, object]:
    return {requests: batch.replay for (requests, _, _), batch in llm.engine.runner._decoding.items()}


def refusals(llm: LLM) -> set[str | None]:
    return {batch.refused for batch in llm.engine.runner._decoding.values()}


@pytest.fixture
def without_tapes(monkeypatch):
    """An LLM that runs every step in Python."""

    def refuse(*given):
        raise NotRepeatable("this test wants none")

    def make(**settings) -> LLM:
        monkeypatch.setattr(decoding_module, "record", refuse)
        return LLM(**settings)

    yield make
    monkeypatch.undo()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_python_and_cross_pages(dtype, without_tapes, monkeypatch):
    slow = without_tapes(dtype=dtype)
    expected = answers(slow, PROMPTS) + answers(slow, PROMPTS[:1])
    assert not any(tapes(slow).values())
    monkeypatch.undo()
    fast = LLM(dtype=dtype)
    assert answers(fast, PROMPTS) + answers(fast, PROMPTS[:1]) == expected
    assert tapes(fast)[3] is not None and tapes(fast)[1] is not None
    assert answers(fast, PROMPTS) == expected[:3]


def test_a_swapped_layer_is_recorded_anew():
    llm = LLM(dtype="float32")
    before = answers(llm, PROMPTS[:1])
    assert tapes(llm)[1] is not None
    swapped = swap(llm.model, "**.layers.0.**", "int8")
    other = answers(llm, PROMPTS[:1])
    fresh = LLM(dtype="float32")
    swap(fresh.model, "**.layers.0.**", "int8")
    assert other == answers(fresh, PROMPTS[:1])
    swapped.undo()
    assert answers(llm, PROMPTS[:1]) == before


def test_a_kernel_that_needs_lengths_in_python_has_no_tape_and_the_same_answers():
    llm = LLM(dtype="float32", kernels={"attention": "torch_sdpa"})
    assert answers(llm, PROMPTS) == answers(LLM(dtype="float32"), PROMPTS)
    assert refusals(llm) == {"a kernel reads the requests' lengths in Python"}


@pytest.mark.parametrize(
    ("peek", "reason"),
    [
        (lambda x: x.numpy() is not None, "numpy"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: float(x.flatten()[0]), "depends on numbers"),
        (lambda x: x[x > 1e9], "depends on numbers"),
        (lambda x: torch.tensor([1.0]), "lift_fresh"),
    ],
)
def test_a_step_that_looks_into_a_tensor_is_not_recorded(peek, reason):
    llm = LLM(dtype="float32")
    expected = answers(llm, PROMPTS[:1], greedy(12))
    llm.engine.runner._decoding.clear()
    norm = llm.model.model.norm
    run = norm.forward

    def forward(*given):
        result = run(*given)
        peek(result[0])
        return result

    norm.forward = forward
    assert answers(llm, PROMPTS[:1], greedy(12)) == expected
    assert reason in str(refusals(llm))


def test_a_hook_is_called_in_every_step():
    llm = LLM(dtype="float32")
    assert answers(llm, PROMPTS[:1], greedy(12)) and tapes(llm)[1] is not None
    calls = []
    hook = llm.model.model.norm.register_forward_hook(lambda *given: calls.append(1))
    answers(llm, PROMPTS[:1], greedy(12))
    assert len(calls) >= 12 and llm.engine.runner.eager_reason == "modules of the model have hooks"
    hook.remove()
    answers(llm, PROMPTS[:1], greedy(12))
    assert llm.engine.runner.eager_reason is None and tapes(llm)[1] is not None


def test_work_that_no_one_sees_is_noticed_when_the_tape_is_tried():
    """A native call that does not record itself leaves NaN where its result should be."""
    x = torch.ones(1, 8)

    def run() -> torch.Tensor:
        y = torch.empty_like(x)
        memory = (y.data_ptr(), x.data_ptr())
        import ctypes

        ctypes.memmove(*memory, x.nbytes)
        return y + 1

    with pytest.raises(NotRepeatable, match="other logits"):
        record(run, run())


def test_torchs_own_operations_are_played_too():
    x = torch.ones(3, 4)

    def run() -> torch.Tensor:
        y = (x * 2).t().contiguous()
        y[0] += 1
        return torch.cat((y, y), dim=1).softmax(-1)

    tape = record(run, run())
    x.copy_(torch.randn(3, 4))
    expected = run()
    assert torch.equal(tape.play(), expected)
    assert torch.equal(tape.play(), expected)


def test_float32_logits_and_rows_of_a_table_need_no_torch():
    table, ids, x = torch.randn(9, 4), torch.tensor([3, -1]), torch.randn(2, 4).to(torch.bfloat16)

    def run() -> torch.Tensor:
        return torch.stack((x.float(), table[ids]))

    tape = record(run, run())
    assert len(tape.operations) == 1 and len(tape.native) == 2  # stack is torch's
    x.copy_(torch.randn(2, 4))
    ids.copy_(torch.tensor([-9, 8]))
    assert torch.equal(tape.play(), torch.stack((x.float(), table[ids])))


def test_other_numbers_of_threads_have_tapes_of_their_own():
    llm = LLM(dtype="float32")
    before = torch.get_num_threads()
    expected = answers(llm, PROMPTS)
    try:
        torch.set_num_threads(before + 1)
        assert answers(llm, PROMPTS) == expected
    finally:
        torch.set_num_threads(before)
    assert {threads for _, _, threads in llm.engine.runner._decoding} == {before, before + 1}


def test_recording_a_step_does_not_import_torchs_compiler():
    """It takes the better part of a second, in the middle of the first answer."""
    script = (
        "import sys, pymllm; llm = pymllm.LLM(); llm.generate([[5, 6, 7]]); "
        "assert any(batch.replay for batch in llm.engine.runner._decoding.values()); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert python("-c", script).returncode == 0


@needs_native
def test_tapes_of_all_batch_sizes_are_kept_up_to_a_bound_of_memory(monkeypatch):
    llm = LLM(dtype="float32")
    runner = llm.engine.runner

    def decode(requests):
        answers(llm, [[5, 6, 7 + row] for row in range(requests)], greedy(7))

    for requests in range(1, 11):
        decode(requests)
    assert sorted(rows for rows, _, _ in runner._decoding) == list(range(1, 11))
    assert all(batch.replay is not None and batch.bytes > 0 for batch in runner._decoding.values())
    # The last used stay: there is room for just two more like the largest.
    largest = max(batch.bytes for batch in runner._decoding.values())
    monkeypatch.setattr("pymllm.engine.runner.MAX_TAPE_BYTES", 2 * largest)
    decode(3)
    assert sum(batch.bytes for batch in runner._decoding.values()) <= 2 * largest
    assert list(runner._decoding)[-1][0] == 3 and runner._decoding[list(runner._decoding)[-1]].trusted
