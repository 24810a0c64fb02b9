"""LoRA on single layers: matrices, scaling, merging, sharding, rows of a batch."""

# I in_features, O out_features, r rank

from __future__ import annotations

import logging

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    LoRAMixin,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from pymllm.layers.lora import AdapterBatch, use_adapters
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.formats.awq import AWQLinearMethod

from ..checkpoints import AWQ
from ..tensors import random

KINDS = {
    "linear": lambda: Linear(16, 24),
    "column": lambda: ColumnParallelLinear(16, 24),
    "row": lambda: RowParallelLinear(16, 24),
    "merged": lambda: MergedColumnParallelLinear(16, [8, 16]),
    "qkv": lambda: QKVParallelLinear(16, 4, 4, 1),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def fill(layer, seed=0):
    """The same full weight and bias whatever the ranks."""
    shape = layer.shape
    for param, full in (
        (layer.weight, random(shape.out_features, shape.in_features, seed=seed)),
        (layer.bias, random(shape.out_features, seed=seed + 1)),
    ):
        layer.weight_loader(param, full)


def set_b(layer, full):
    """This rank's rows of a full B [O, r], part by part."""
    rows, start = [], 0
    for span in layer.shape.outputs:
        rows.append(full[start + span.start : start + span.stop])
        start += span.total
    layer.lora_B.data.copy_(torch.cat(rows))


@each_kind
@pytest.mark.parametrize("stabilised", (False, True))
def test_a_fresh_adapter_has_random_a_zero_b_and_its_scaling(kind, stabilised):
    layer = KINDS[kind]()
    fill(layer)
    x = random(3, 16)
    before, count = layer(x), sum(1 for _ in layer.parameters())
    layer.init_lora(4, 6, rank_stabilised=stabilised)
    assert isinstance(layer, LoRAMixin) and layer.scaling == (3 if stabilised else 1.5)
    assert layer.lora_A.shape == (4, 16) and layer.lora_B.shape == (layer.out_features, 4)
    bound = (3 / 16) ** 0.5 * (2 / 6) ** 0.5  # Kaiming-uniform with a = √5: 1/√I
    assert 0.5 / 4 < float(layer.lora_A.abs().max()) <= 1 / 4 + 1e-6 and bound == pytest.approx(1 / 4)
    assert not layer.lora_B.any() and torch.equal(layer(x), before)
    assert sum(1 for _ in layer.parameters()) == count + 2


def test_rank_zero_adds_no_parameters():
    layer = Linear(16, 8)
    layer.init_lora(0, 8)
    assert len(list(layer.parameters())) == 2 and layer.lora_A is None and not layer.adapters
    with pytest.raises(ConfigError, match="negative"):
        layer.init_lora(-1, 8)


@each_kind
@pytest.mark.parametrize("size", (1, 2, 4))
def test_ranks_add_the_product_once(kind, size):
    """The row-parallel layer's is summed with the base, and its bias is added after."""
    inputs, b = random(5, 16, seed=3), random(24, 4, seed=4)
    whole = KINDS[kind]()
    fill(whole)
    whole.init_lora(4, 8)
    b = random(whole.out_features, 4, seed=4)
    weight = whole.weight.double() + 2 * b.double() @ whole.lora_A.double()
    expected = inputs.double() @ weight.t() + whole.bias.double()

    def work(parallel):
        layer = KINDS[kind]()
        fill(layer)
        layer.init_lora(4, 8)
        set_b(layer, b)
        span = layer.shape.inputs
        y = layer(inputs[:, span.start : span.stop])
        rows, start = [], 0
        for out in layer.shape.outputs:
            rows += range(start + out.start, start + out.stop)
            start += out.total
        return y, expected if y.shape[-1] == expected.shape[-1] else expected[:, rows]

    for y, wanted in simulate(size, work):
        assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5)


@each_kind
def test_merging_adds_the_product_and_unmerging_restores_every_bit(kind):
    layer = KINDS[kind]()
    fill(layer)
    layer.init_lora(4, 8)
    set_b(layer, random(layer.out_features, 4, seed=4))
    x = random(5, 16, seed=3)
    weight, unmerged = layer.weight.clone(), layer(x)
    assert layer.merge_lora() is None
    expected = weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.allclose(layer.weight.double(), expected, atol=1e-6)
    assert torch.allclose(layer(x), unmerged, atol=1e-5)
    again = layer.weight.clone()
    assert layer.merge_lora() is None and torch.equal(layer.weight, again)
    layer.unmerge_lora()
    layer.unmerge_lora()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), unmerged)


def test_a_packed_weight_merges_too():
    layer = Linear(16, 8)
    fill(layer)
    layer.init_lora(2, 2)
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    x = random(3, 16)
    expected = layer(x)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.merge_lora() is None
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_quantised_weight_keeps_the_adapter_beside_it_and_says_so(caplog):
    layer = Linear(64, 16, False, AWQLinearMethod(32), prefix="a.b")
    tensors, meant = AWQ(32).encode(random(16, 64))
    for name, tensor in tensors.items():
        layer.weight_loader(getattr(layer, name), tensor)
    layer.init_lora(2, 4)
    assert "quantised" in layer.merge_lora(), "before it is packed"
    layer.quant_method.process_weights_after_loading(layer)
    layer.lora_B.data.copy_(random(16, 2, seed=2))
    x = random(3, 64, seed=3)
    with caplog.at_level(logging.WARNING, logger="pymllm"):
        assert "quantised (awq" in layer.merge_lora()
    assert "a.b" in caplog.text and "stays unmerged" in caplog.text and layer.merged is None
    expected = x.double() @ (meant.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).t()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_only_one_adapter_is_merged_at_a_time():
    layer = Linear(16, 8)
    layer.init_lora(2, 2, name="one")
    layer.init_lora(2, 2, name="two")
    assert layer.active_adapter == "two"
    layer.merge_lora("one", keep_base=False)
    for call in (lambda: layer.merge_lora("two"), lambda: layer.detach_adapter("one")):
        with pytest.raises(ConfigError, match="merged"):
            call()
    with pytest.raises(ConfigError, match="not kept"):
        layer.unmerge_lora()


def test_an_unknown_adapter_cannot_be_merged():
    layer = Linear(16, 8)
    layer.init_lora(2, 2, name="two")
    with pytest.raises(ConfigError, match=r"no adapter 'twos'.*Nearest: two"):
        layer.merge_lora("twos")


@each_kind
def test_each_row_gets_its_adapter(kind):
    layer = KINDS[kind]()
    fill(layer)
    for seed, name in enumerate(("one", "t.w/o")):
        layer.init_lora(2 + seed, 4, name=name)
        set_b(layer, random(layer.out_features, 2 + seed, seed=seed))
    layer.active_adapter = None
    x = random(5, 16, seed=3)
    names = ["t.w/o", None, "one", "t.w/o", "unknown here"]
    with use_adapters(AdapterBatch.of(names, torch.device("cpu"))):
        y = layer(x)
    plain = layer(x)
    for row, name in enumerate(names):
        layer.active_adapter = name
        assert torch.allclose(y[row], layer(x[row]), atol=1e-5)
    layer.active_adapter = None
    assert torch.equal(layer(x), plain) and not torch.allclose(y[0], plain[0])
    assert layer(x[:0]).shape == (0, layer.out_features)


MASKED = [*KINDS, "embedding"]


@pytest.mark.parametrize("kind", MASKED)
def test_rows_that_are_marked_get_what_rows_that_are_named_get(kind):
    """As a captured step has it: every row is multiplied by every adapter, and keeps one."""
    layer = VocabParallelEmbedding(10, 24) if kind == "embedding" else KINDS[kind]()
    if kind == "embedding":
        layer.weight_loader(layer.weight, random(10, 24))
    else:
        fill(layer)
    for seed, name in enumerate(("one", "two", "active")):
        layer.init_lora(2 + seed, 4, name=name)
        for part in layer.adapters[name].parts:
            part.A.data.copy_(random(*part.A.shape, seed=seed))
            part.B.data.copy_(random(*part.B.shape, seed=seed + 5))
    x = torch.tensor([3, 0, 9, 3, 5]) if kind == "embedding" else random(5, 16, seed=3)
    names = (None, "one", "two")
    for places in ([2, 0, 1, 2, 0], [1, 1, 1, 1, 1], [0, -1, -1, 2, 1]):
        rows = [names[place] if place >= 0 else "none of them" for place in places]
        with use_adapters(AdapterBatch.of(rows, torch.device("cpu"))):
            expected = layer(x)
        with use_adapters(AdapterBatch.masked(names, torch.tensor(places))):
            assert torch.allclose(layer(x), expected, atol=1e-5)


def test_what_is_infinite_in_another_row_s_adapter_stays_there():
    layer = Linear(16, 24)
    fill(layer)
    layer.init_lora(2, 2, name="one")
    set_b(layer, random(24, 2))
    layer.active_adapter = None
    x = random(3, 16)
    plain = layer(x)
    layer.adapters["one"].parts[0].A.data.fill_(float("inf"))
    with use_adapters(AdapterBatch.masked((None, "one"), torch.tensor([0, 1, -1]))):
        y = layer(x)
    assert torch.equal(y[[0, 2]], plain[[0, 2]]) and not y[1].isfinite().all()


@pytest.mark.parametrize("size", (1, 2, 4))
def test_an_embedding_adds_rows_of_a_times_b(size):
    """A vocabulary of 10 that four ranks cannot share evenly: the last one has none of it."""
    table, ids = random(10, 6), torch.tensor([[0, 9, 3], [3, 5, 7]])
    full_a, b = random(3, 10, seed=1), random(6, 3, seed=2)
    expected = table[ids] + 0.5 * (full_a.t()[ids] @ b.t())

    def work(_):
        layer = VocabParallelEmbedding(10, 6)
        layer.weight_loader(layer.weight, table)
        layer.init_lora(3, 1.5)
        assert not layer.lora_A.any(), "starts without effect, as PEFT's does"
        share = layer.shape.outputs[0]
        layer.lora_A.data[:, : share.stop - share.start] = full_a[:, share.start : share.stop]
        layer.lora_B.data.copy_(b)
        return layer(ids)

    for y in simulate(size, work):
        assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("size", (1, 4))
def test_a_head_adds_the_product_over_its_share_of_the_vocabulary(size):
    weight, x, b = random(10, 6), random(4, 6, seed=1), random(10, 2, seed=2)

    def work(_):
        layer = ParallelLMHead(10, 6)
        layer.weight.data.zero_()
        layer.weight_loader(layer.weight, weight)
        layer.init_lora(2, 2)
        share = layer.shape.outputs[0]
        layer.lora_B.data[: share.stop - share.start] = b[share.start : share.stop]
        return layer(x, gather_all=True), layer.lora_A.clone()

    for logits, a in simulate(size, work):
        assert torch.allclose(logits, x @ (weight + b @ a).t(), atol=1e-5)


def test_fresh_matrices_are_the_same_on_every_rank():
    whole = RowParallelLinear(16, 8, prefix="x")
    whole.init_lora(4, 4)
    with Parallel(1, 2):
        layer = RowParallelLinear(16, 8, prefix="x")
    layer.init_lora(4, 4)
    assert torch.equal(layer.lora_A, whole.lora_A[:, 8:]) and layer.lora_B.shape == (8, 4)
