"""The embedding and the head: a vocabulary divided over ranks and padded; tied or not, quantised or not."""

# V vocabulary, H hidden size

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pymllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.formats.fp8 import Fp8LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod

from ..checkpoints import AWQ, FP8, CompressedFP8, Plain
from ..tensors import random

METHODS = {
    "none": (UnquantizedLinearMethod(), Plain()),
    "fp8-channel": (Fp8LinearMethod((1, 0), "token"), CompressedFP8("channel", dtype=torch.float32)),
    "fp8-tensor": (Fp8LinearMethod((0, 0), "token"), FP8(None)),
    "awq": (AWQLinearMethod(32), AWQ(32)),
}
each_method = pytest.mark.parametrize("name", METHODS)


def loaded(layer, tensors, bias=None):
    for key, tensor in tensors.items():
        layer.weight_loader(getattr(layer, key), tensor)
    if bias is not None:
        layer.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@each_method
@pytest.mark.parametrize("size", (1, 2))
def test_ids_of_any_shape_give_their_rows(name, size):
    method, writer = METHODS[name]
    tensors, table = writer.encode(random(64, 32))
    generator = torch.Generator().manual_seed(1)
    all_ids = [
        torch.randint(0, 64, shape, generator=generator) for shape in ((), (0,), (7,), (2, 3), (2, 1, 4))
    ]

    def work(_):
        embedding = loaded(VocabParallelEmbedding(64, 32, method), tensors)
        return [embedding(ids) for ids in all_ids]

    for results in simulate(size, work):
        for ids, rows in zip(all_ids, results, strict=True):
            assert rows.shape == (*ids.shape, 32)
            assert torch.allclose(rows, table[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocabulary", (97, 8, 5, 3, 1))
@pytest.mark.parametrize("size", (2, 3, 4))
def test_a_vocabulary_that_ranks_do_not_divide_is_padded(vocabulary, size):
    table, hidden, ids = random(vocabulary, 16), random(3, 16, seed=1), torch.arange(vocabulary)

    def work(_):
        embedding = loaded(VocabParallelEmbedding(vocabulary, 16), {"weight": table})
        head = loaded(ParallelLMHead(vocabulary, 16), {"weight": table})
        return (
            embedding(ids),
            head(hidden, gather_all=True),
            (embedding.vocab_start_index, embedding.vocab_end_index),
        )

    results = simulate(size, work)
    for rows, logits, _ in results:
        assert torch.equal(rows, table)
        assert torch.allclose(logits, hidden @ table.t(), atol=1e-5) and logits.shape == (3, vocabulary)
    spans = [span for _, _, span in results]
    assert spans[0][0] == 0 and spans[-1][1] == vocabulary
    assert all(before[1] == after[0] for before, after in pairwise(spans))


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Whatever nobody writes is NaN."""
    empty = torch.empty

    def poison(*args, **options):
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("rank", (0, 1, 2))
def test_padding_is_zero_on_layers_that_are_filled_one_by_one(rank, poisoned_memory):
    table = random(4, 16)
    with Parallel(rank, 3):
        head = ParallelLMHead(4, 16)
    head.weight_loader(head.weight, table)
    rows = table[2 * rank : 2 * rank + 2]
    assert torch.equal(head.weight[: len(rows)], rows) and not head.weight[len(rows) :].any()


def test_ids_of_other_ranks_contribute_zero():
    table = random(6, 4)
    table[2, 0], table[2, 1] = torch.inf, torch.nan  # what an id of another rank reads, and must not spread
    with Parallel(1, 3):
        embedding = loaded(VocabParallelEmbedding(6, 4), {"weight": table})
    alone = []
    object.__setattr__(
        embedding, "parallel", type("Alone", (), {"all_reduce": lambda _, x: alone.append(x) or x})()
    )
    embedding(torch.arange(6))
    expected = torch.zeros(6, 4)
    expected[2:4] = table[2:4]
    assert torch.equal(alone[0].nan_to_num(7.0), expected.nan_to_num(7.0))


def test_logits_go_to_rank_zero_or_to_all():
    table, hidden = random(10, 16), random(2, 3, 16, seed=1)

    def work(_):
        head = loaded(ParallelLMHead(10, 16), {"weight": table})
        return head(hidden), head(hidden, gather_all=True)

    for size in (1, 2, 4):
        for rank, (default, everywhere) in enumerate(simulate(size, work)):
            assert torch.allclose(everywhere, hidden @ table.t(), atol=1e-5)
            assert (default is None) == (rank > 0)
            assert rank > 0 or torch.equal(default, everywhere)


def test_a_heads_bias_is_divided_with_the_vocabulary():
    table, hidden, bias = random(10, 16), random(3, 16, seed=1), random(10, seed=2)

    def work(_):
        return loaded(ParallelLMHead(10, 16, bias=True), {"weight": table}, bias)(hidden, gather_all=True)

    for logits in (*simulate(1, work), *simulate(4, work)):
        assert torch.allclose(logits, hidden @ table.t() + bias, atol=1e-5)


def test_logits_are_float32_unless_asked_otherwise():
    table, hidden = random(8, 16).bfloat16(), random(3, 16).bfloat16()
    head = loaded(ParallelLMHead(8, 16, params_dtype=torch.bfloat16), {"weight": table})
    plain = loaded(ParallelLMHead(8, 16, params_dtype=torch.bfloat16, fp32_logits=False), {"weight": table})
    assert head(hidden).dtype is torch.float32 and plain(hidden).dtype is torch.bfloat16
    assert torch.equal(head(hidden), plain(hidden).float())


@each_method
@pytest.mark.parametrize("size", (1, 2))
def test_a_tied_head_multiplies_by_the_embeddings_table(name, size):
    method, writer = METHODS[name]
    tensors, table = writer.encode(random(64, 32))
    hidden = random(3, 32, seed=1)

    def work(_):
        embedding = loaded(VocabParallelEmbedding(64, 32, method, prefix="model.embed_tokens"), tensors)
        head = ParallelLMHead(64, 32, quant_method=method, tied_to=embedding, prefix="lm_head")
        assert head.shares_table and not list(head.parameters()), "it has no table of its own"
        assert embedding not in list(head.modules()), "the embedding is no child of the head"
        head.pack_tied()
        return head(hidden, gather_all=True), head, embedding

    for logits, head, embedding in simulate(size, work):
        assert torch.allclose(logits, hidden @ table.t(), atol=1e-4)
        if name == "none":
            tables = [bound_weight(layer).packed["weight"].data_ptr() for layer in (head, embedding)]
            assert tables[0] == tables[1], "one copy in memory"


def test_a_tied_head_with_a_method_of_its_own_reads_the_embeddings_tensor():
    embedding = VocabParallelEmbedding(64, 32, prefix="model.embed_tokens")
    head = ParallelLMHead(64, 32, quant_method=Fp8LinearMethod(), tied_to=embedding, prefix="lm_head")
    assert not head.shares_table
    assert head.weight.slots[0].tensor == "model.embed_tokens.weight"
    assert ParallelLMHead(64, 32, prefix="lm_head").weight.slots[0].tensor == "lm_head.weight"
