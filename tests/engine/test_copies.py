"""Copies between the host and a device, counted in steps over a device that only seems to have memory of its own."""

from __future__ import annotations

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.engine import choosing
from pymllm.engine.decoding import DecodingBatch
from pymllm.engine.request import Request
from pymllm.kernels import copies
from pymllm.kernels.aten import sampling
from pymllm.kernels.copies import Staged, upload

from .emulated_gpu import NoWaits
from .test_graphs import with_graphs

HERE = torch.device("cpu")


class Wire:
    """All copies.  sent: the bytes of each that went to the device.  received: how many came back.

    A device may read pinned memory until somebody waits for it: what was written to meanwhile is found out then.
    """

    def __init__(self):
        self.sent, self.received, self.reading, self.waits = [], 0, [], 0

    def send(self, there, here):
        there.copy_(here)
        self.sent.append(here.nbytes)
        self.reading.append((here, here.clone()))

    def settle(self):
        assert all(torch.equal(here, before) for here, before in self.reading), (
            "it is read, and was written to"
        )
        self.reading.clear()

    def receive(self, values):
        self.received += 1
        with torch.utils._python_dispatch._disable_current_modes():
            self.settle()
            return values.tolist()

    def record(self):
        pass

    def synchronize(self):
        self.waits += 1
        self.settle()

    def count(self):
        """The copies since the last time."""
        found = len(self.sent), self.received
        self.sent, self.received = [], 0
        return found


@pytest.fixture
def wire(monkeypatch):
    """Has the CPU copy as if it were a device, and counts."""
    made = Wire()
    for module in (copies, sampling, choosing):
        monkeypatch.setattr(module, "is_separate", lambda device: True)
    monkeypatch.setattr(copies, "make_pinned", lambda size, device: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(copies, "make_event", lambda: made)
    monkeypatch.setattr(copies, "send", made.send)
    monkeypatch.setattr(choosing, "receive", made.receive)
    return made


# Of a step: what goes to the device for its choice, beside the numbers that the model runs on.
CHOICES = {
    "greedy": ({}, 0),
    "drawn": ({"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3}, 1),
    "typical": ({"temperature": 0.8, "typical_p": 0.9, "seed": 3}, 1),
    "penalised": ({"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {7: 2.0}}, 1),
    "log-probabilities": ({"temperature": 0.8, "seed": 3, "logprobs": 4}, 1),
    "a grammar": ({"regex": "[a-z ]+", "temperature": 0.8, "seed": 3}, 2),
}
PROMPTS = [[5, 6, 7], [9] * 30, [11, 3, 200]]


def answered(llm, settings, count=20):
    params = SamplingParams(max_tokens=count, ignore_eos=True, **settings)
    return [(output.token_ids, output.logprobs) for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_brings_one_copy_back_and_sends_as_few_as_it_can(choice, wire, monkeypatch):
    settings, for_choice = CHOICES[choice]
    with monkeypatch.context() as plain:
        for module in (copies, sampling, choosing):
            plain.setattr(module, "is_separate", lambda device: False)
        expected = LLM(dtype="float32")
        expected.engine.sampling_kernel = sampling.TorchSampling()
        expected = answered(expected, settings)
    llm = with_graphs(LLM(dtype="float32"), [])
    engine = llm.engine
    engine.sampling_kernel = sampling.TorchSampling()
    choose, steps = engine.strategy.choose, []

    def watched(*given):
        with NoWaits():
            chosen = choose(*given)
        steps.append(wire.count())
        return chosen

    engine.strategy.choose = watched
    wire.count()
    assert answered(llm, settings) == expected
    reading, *decoding = steps
    assert reading == (1 + for_choice, 1)
    # A second one where a request has got another page.
    assert set(decoding) == {(1 + for_choice, 1), (2 + for_choice, 1)}
    assert decoding.count((2 + for_choice, 1)) <= 4


def batch_of(*requests):
    batch = DecodingBatch(4, 8, 16, 128, HERE)
    batch.fill(list(requests))
    return batch


def request(pages, computed=20):
    made = Request([1] * computed, SamplingParams(), 100, answer=[7], pages=pages)
    made.computed, made.running_sequence = computed, [computed]
    return made


def test_only_rows_whose_pages_have_changed_are_sent(wire):
    first, second, third = request([5, 3]), request([6, 4]), request([2, 1])
    batch = batch_of(first, second, third)
    (pages,) = batch._page_tables.there
    assert pages.tolist() == [[5, 3, *[0] * 6], [6, 4, *[0] * 6], [2, 1, *[0] * 6], [0] * 8]
    row = 8 * 4
    assert wire.sent[1:] == [3 * row]
    wire.count()
    batch.fill([first, second, third])
    assert len(wire.sent) == 1
    second.pages = [6, 4, 9]
    batch.fill([first, second, third])
    assert wire.sent[2:] == [row] and pages[1].tolist()[:3] == [6, 4, 9]


def test_what_the_device_still_reads_is_not_written_to(wire):
    """Steps after one another of which nobody waits for the result."""
    batch = batch_of(request([5, 3]))
    assert wire.waits == 0
    for computed in (21, 22, 23):
        batch.fill([request([5, 4], computed)])
        assert batch.positions[0] == computed
    assert wire.waits == 6
    wire.settle()


def test_the_wire_finds_out_what_is_written_too_early(wire, monkeypatch):
    monkeypatch.setattr(Staged, "open", lambda staged: None)
    batch = batch_of(request([5, 3]))
    batch.fill([request([5, 3], 21)])
    with pytest.raises(AssertionError, match="is read"):
        wire.settle()


def test_tensors_of_any_type_go_in_one_copy_and_come_out_as_they_were(wire):
    tensors = [
        torch.tensor([True, False, True]),
        torch.tensor([[1.5, 2.5]], dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([3, 4, 5], dtype=torch.int32),
        torch.arange(6).view(2, 3).t(),
        torch.tensor(7),
    ]
    found = upload(tensors, HERE)
    assert len(wire.sent) == 1
    for tensor, other in zip(tensors, found, strict=True):
        assert other.dtype is tensor.dtype and torch.equal(tensor, other)
        assert not tensor.numel() or other.data_ptr() != tensor.data_ptr()


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.arange(3)
    assert upload([tensor], HERE)[0] is tensor
    staged = Staged((((3,), torch.int64),), HERE)
    staged.open()
    staged.here[0][:] = 5
    staged.send()
    assert staged.there[0].tolist() == [5, 5, 5]
