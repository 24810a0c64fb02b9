"""Tokens to the ranks of their experts and back, over ranks simulated by threads."""

# T tokens, K experts a token, E experts, H hidden size

from __future__ import annotations

import sys
import types

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.moe import EPFusedMoE, NaiveA2ADispatcher, TopKOutput, build_token_dispatcher
from pymllm.moe.dispatcher import expert_range
from pymllm.parallel import Parallel, simulate


def tokens_of(rank, counts, experts, top_k=2, hidden=4, dtype=torch.float32):
    """A rank's own tokens and where they go."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(counts[rank], hidden, generator=generator).to(dtype)
    ids = torch.randint(0, experts, (counts[rank], top_k), generator=generator)
    weights = torch.rand(counts[rank], top_k, generator=generator)
    return x, TopKOutput(weights, ids, torch.zeros(counts[rank], experts))


@pytest.mark.parametrize("experts", (1, 3, 5, 8))
@pytest.mark.parametrize("counts", ((5,), (3, 4), (0, 6), (7, 0, 1, 0), (0, 0, 0, 0)))
def test_every_slot_reaches_its_expert_and_the_sums_come_back(counts, experts):
    """The expert e multiplies by e + 1, so that an answer tells who gave it."""

    def work(parallel):
        x, topk = tokens_of(parallel.rank, counts, experts)
        dispatcher = build_token_dispatcher("naive", parallel, experts)
        mine = expert_range(experts, parallel.rank, parallel.size)
        for phase in ("prefill", "decode"):  # and once more with the same dispatcher
            dispatcher.set_forward_phase(phase)
            sent = dispatcher.dispatch(x, topk)
            local = sent.recv_local_expert_ids
            assert local.numel() == sent.metadata.total_recv_slots == sent.recv_hidden_states.shape[0]
            assert bool(((local >= 0) & (local < len(mine))).all())
            factor = (local + mine.start + 1) * sent.recv_weights
            y = dispatcher.combine(sent.recv_hidden_states * factor.unsqueeze(-1))
        return y, x, topk

    for y, x, topk in simulate(len(counts), work):
        want = (x.double().unsqueeze(1) * ((topk.ids + 1) * topk.weights.double()).unsqueeze(-1)).sum(1)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts, size", ((8, 4), (5, 4), (3, 4), (1, 2), (60, 8)))
def test_experts_are_divided_as_evenly_as_can_be(experts, size):
    ranges = [expert_range(experts, rank, size) for rank in range(size)]
    assert [e for r in ranges for e in r] == list(range(experts))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_sums_are_taken_in_float32():
    """256 + 1 + 1 is 256 in bfloat16 if the ones are added one by one."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    topk = TopKOutput(torch.tensor([[256.0, 1.0, 1.0]]), torch.tensor([[0, 0, 0]]), torch.zeros(1, 1))
    dispatcher = NaiveA2ADispatcher(Parallel(), 1)
    sent = dispatcher.dispatch(x, topk)
    y = dispatcher.combine(sent.recv_hidden_states * sent.recv_weights.unsqueeze(-1))
    assert y.dtype is torch.bfloat16 and float(y) == 258.0


def test_a_call_out_of_turn():
    dispatcher = NaiveA2ADispatcher(Parallel(), 2)
    with pytest.raises(RuntimeError, match="awaits dispatch_a"):
        dispatcher.combine(torch.zeros(0, 4))
    x, topk = tokens_of(0, (3,), 2)
    dispatcher.dispatch_a(x, topk)
    with pytest.raises(RuntimeError, match="awaits dispatch_b"):
        dispatcher.dispatch_a(x, topk)
    dispatcher.dispatch_b()
    with pytest.raises(RuntimeError, match="awaits combine_a"):
        dispatcher.combine_b()
    with pytest.raises(ValueError, match=r"one answer for each slot, \[6, 4\]"):
        dispatcher.combine_a(torch.zeros(5, 4))
    dispatcher.combine_a(torch.zeros(6, 4))
    with pytest.raises(RuntimeError, match="awaits combine_b"):
        dispatcher.dispatch(x, topk)
    assert dispatcher.combine_b().shape == (3, 4)


@pytest.mark.parametrize(
    "change, named",
    (
        (lambda x, t: (x[0], t), "must be"),
        (lambda x, t: (x[:2], t), "2 tokens need expert ids"),
        (lambda x, t: (x, TopKOutput(t.weights[:, :1], t.ids, t.router_logits)), "3 tokens need expert ids"),
        (lambda x, t: (x, TopKOutput(t.weights, t.ids.float(), t.router_logits)), "integers"),
        (lambda x, t: (x, TopKOutput(t.weights, t.ids + 2, t.router_logits)), r"0\.\.1"),
        (lambda x, t: (x, TopKOutput(t.weights, t.ids - 2, t.router_logits)), r"0\.\.1"),
    ),
)
def test_tokens_that_cannot_be_dispatched(change, named):
    dispatcher = NaiveA2ADispatcher(Parallel(), 2)
    with pytest.raises(ValueError, match=named):
        dispatcher.dispatch(*change(*tokens_of(0, (3,), 2)))


def test_backends_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="naive or deepep"):
        build_token_dispatcher("nccl", Parallel(), 2)
    with pytest.raises(ConfigError, match="prefill or decode"):
        NaiveA2ADispatcher(Parallel(), 2).set_forward_phase("train")
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ConfigError, match="'deep_ep', which is not installed"):
        build_token_dispatcher("deepep", Parallel(), 2)
    package = types.ModuleType("deep_ep")
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    found = build_token_dispatcher("deepep", Parallel(), 2)
    with pytest.raises(ValueError, match="bfloat16 on a GPU"):
        found.dispatch(*tokens_of(0, (3,), 2))
    with pytest.raises(ConfigError, match="equally many experts"):
        build_token_dispatcher("deepep", Parallel(0, 2), 3)


def test_a_step_that_fails_leaves_the_dispatcher_ready_for_the_next_one(monkeypatch):
    block, x = EPFusedMoE(8, 16, 4, 2), torch.randn(3, 8)
    torch.nn.init.normal_(block.gate.weight)

    def fails(*_):
        raise MemoryError("no room for the experts")

    with monkeypatch.context() as patch:
        patch.setattr(block, "run_held", fails)
        with pytest.raises(MemoryError):
            block(x)
    monkeypatch.setattr(block, "run_held", lambda hidden, ids, weights: hidden * weights)
    torch.testing.assert_close(block(x)[0], x)  # the weights of a token sum to one
