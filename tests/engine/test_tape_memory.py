"""The one region of memory that all tapes share: tensors take the places of those that are gone, and no others."""

from __future__ import annotations

import pytest
import torch

from pymllm.engine.tape import NotRepeatable, record
from pymllm.engine.tape_memory import NoRoom, StepMemory

from ..kernels.integer_cases import needs_native


def test_a_tensor_takes_the_place_of_one_that_is_gone_with_all_its_views():
    memory = StepMemory(1 << 16)
    first, _ = memory.take(torch.ones(100))
    second, _ = memory.take(torch.ones(100))
    view, place = first[50:], first.data_ptr()
    del first
    third, _ = memory.take(torch.ones(100))
    assert len({place, second.data_ptr(), third.data_ptr()}) == 3
    del view
    fourth, _ = memory.take(torch.ones(90))
    assert fourth.data_ptr() == place and fourth in memory
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (second, third, fourth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_tensors_have_the_strides_of_others_and_stay_apart(dtype):
    memory = StepMemory(1 << 16)
    likes = [
        torch.ones(3, 4, dtype=dtype).t(),
        torch.ones(2, 8, dtype=dtype)[:, ::2],
        torch.ones((), dtype=dtype),
    ]
    made = [memory.take(like) for like in likes]
    for (tensor, spoil), like in zip(made, likes, strict=True):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), dtype)
        spoil()
        tensor.copy_(like)
        alias = memory.alias(tensor)
        assert (alias.data_ptr(), alias.stride()) == (tensor.data_ptr(), tensor.stride())
    assert all(torch.equal(tensor, like) for (tensor, _), like in zip(made, likes, strict=True))
    made[0][1]()
    assert made[0][0].float().isnan().any() or dtype in (torch.bool, torch.int64)
    assert torch.equal(made[1][0], likes[1])


def test_a_region_that_is_full_refuses():
    memory = StepMemory(1024)
    held = memory.take(torch.ones(200))
    with pytest.raises(NoRoom, match="more than"):
        memory.take(torch.ones(100))
    del held
    memory.take(torch.ones(256))


def chain(x: torch.Tensor, factors: list[float]) -> torch.Tensor:
    for factor in factors:
        x = (x * factor).tanh()
    return x + 1


@needs_native
def test_tapes_that_are_played_in_turn_do_not_disturb_one_another():
    memory = StepMemory(1 << 16)
    inputs = [torch.randn(rows, 64) for rows in (1, 5, 3)]
    runs = [lambda x=x: chain(x, [2.0, 0.5, 3.0, 0.25]) for x in inputs]
    tapes = [record(run, run(), None, memory) for run in runs]
    for _ in range(2):
        for x in inputs:
            x.copy_(torch.randn(x.shape))
        for tape, run in zip(tapes, runs, strict=True):
            assert torch.equal(tape.play(), run())


@needs_native
def test_a_step_needs_room_for_what_it_has_at_once():
    x = torch.randn(1, 64)
    run = lambda: chain(x, [1.5] * 100)  # noqa: E731  200 tensors, two or three at a time
    memory = StepMemory(3 * 256)
    tape = record(run, run(), None, memory)
    x.copy_(torch.randn(1, 64))
    assert torch.equal(tape.play(), run())
    with pytest.raises(NotRepeatable, match="take more than"):
        record(run, run(), None, StepMemory(256))


@needs_native
def test_what_nobody_sees_is_noticed_where_memory_is_used_again():
    """The tensor lies where another of the step was, whose numbers are as good as any: the trial spoils them."""
    import ctypes

    x, before = torch.ones(1, 64), torch.full((1, 64), 5.0)

    def run() -> torch.Tensor:
        y = x * 5
        z = y + 1
        del y
        unseen = torch.empty(1, 64)
        ctypes.memmove(unseen.data_ptr(), before.data_ptr(), before.nbytes)
        return unseen + z

    with pytest.raises(NotRepeatable, match="other logits"):
        record(run, run(), None, StepMemory(1 << 16))


@needs_native
def test_a_tensor_that_outlives_its_step_keeps_its_place():
    memory, kept = StepMemory(1 << 16), []

    def run() -> torch.Tensor:
        kept[:] = [torch.ones(1, 64) * 3]
        return kept[0] + 1

    record(run, run(), None, memory)
    assert kept[0] in memory
    other = record(lambda: torch.zeros(1, 64) + 1, torch.ones(1, 64), None, memory)
    assert torch.equal(other.play(), torch.ones(1, 64)) and torch.equal(kept[0], torch.full((1, 64), 3.0))


@needs_native
@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: x * int(torch.result_type(x, x.double()) is torch.float64), None),
        (lambda x: (x * 2).unsqueeze_(0), None),
        (lambda x: torch.cat((x, x[:0])), None),
        (lambda x: torch.stack(torch.max(x, 1)[:1]), None),
        (lambda x: x * float(torch.equal(x, x)), "depends on numbers"),
        (lambda x: (x * 2).resize_(1, 2), "other memory"),
        (lambda x: x * x.is_nonzero() if x.numel() == 1 else x * x.sum().item(), "depends on numbers"),
    ],
)
def test_what_gives_python_a_number_is_repeated_where_it_follows_from_shapes_and_types_alone(work, reason):
    x = torch.randn(2, 8)
    if reason is not None:
        with pytest.raises(NotRepeatable, match=reason):
            record(lambda: work(x), work(x))
        return
    tape = record(lambda: work(x), work(x))
    x.copy_(torch.randn(2, 8))
    assert torch.equal(tape.play(), work(x))
