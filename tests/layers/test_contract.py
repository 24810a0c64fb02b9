"""What callers of the layers rely on: the order and defaults of arguments, aliases, and steps without a token."""

from __future__ import annotations

import inspect

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.layers.activation import GeluAndMul, SiluAndMul
from pymllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from pymllm.layers.rotary_embedding import get_gemma4_proportional_rope, get_rope
from pymllm.parallel import simulate
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.formats.fp8 import Fp8LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod

REQUIRED = inspect.Parameter.empty
# What may be given by position, in this order.
CONSTRUCTORS = {
    Linear: {"in_features": REQUIRED, "out_features": REQUIRED, "bias": True, "quant_method": None},
    ColumnParallelLinear: {
        "in_features": REQUIRED,
        "out_features": REQUIRED,
        "bias": True,
        "gather_output": True,
        "quant_method": None,
    },
    RowParallelLinear: {
        "in_features": REQUIRED,
        "out_features": REQUIRED,
        "bias": True,
        "reduce_output": True,
        "quant_method": None,
    },
    MergedColumnParallelLinear: {"in_features": REQUIRED, "output_sizes": REQUIRED},
    QKVParallelLinear: {
        "hidden_size": REQUIRED,
        "head_size": REQUIRED,
        "total_num_heads": REQUIRED,
        "total_num_kv_heads": None,
    },
    VocabParallelEmbedding: {"num_embeddings": REQUIRED, "embedding_dim": REQUIRED},
    ParallelLMHead: {"num_embeddings": REQUIRED, "embedding_dim": REQUIRED, "bias": False},
    RMSNorm: {"hidden_size": REQUIRED, "eps": 1e-6, "has_weight": True},
    get_rope: {
        "head_size": REQUIRED,
        "rotary_dim": REQUIRED,
        "max_position": REQUIRED,
        "base": REQUIRED,
        "rope_scaling": None,
        "rope_type": "default",
    },
}


@pytest.mark.parametrize("make", CONSTRUCTORS, ids=lambda make: make.__name__)
def test_arguments_have_their_order_and_defaults(make):
    parameters = inspect.signature(make).parameters.values()
    expected = CONSTRUCTORS[make]
    by_position = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert dict(list(by_position.items())[: len(expected)]) == expected
    assert ReplicatedLinear is Linear


class Everything(QuantizationConfig):
    """FP8 for all, noting who asks."""

    def __init__(self):
        self.asked = []

    @classmethod
    def get_name(cls):
        return "everything"

    @classmethod
    def from_config(cls, config):
        return cls()

    def get_quant_method(self, layer, prefix):
        self.asked.append((type(layer), prefix))
        return Fp8LinearMethod((0, 0), "token")


LAYERS = {
    Linear: ((16, 32), ["a.b"]),
    ColumnParallelLinear: ((16, 32), ["a.b"]),
    RowParallelLinear: ((16, 32), ["a.b"]),
    MergedColumnParallelLinear: ((16, [32, 16]), ["a.0", "a.1"]),
    QKVParallelLinear: ((16, 8, 2, 1), ["a.q", "a.k", "a.v"]),
    VocabParallelEmbedding: ((32, 16), ["a.b"]),
    ParallelLMHead: ((32, 16), ["a.b"]),
}
each_layer = pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)


@each_layer
def test_every_layer_asks_its_config_by_prefix_or_takes_a_method(cls):
    arguments, names = LAYERS[cls]
    config = Everything()
    layer = cls(*arguments, prefix="a.b", quant_config=config)
    assert config.asked == [(cls, name) for name in names] and layer.prefix == "a.b"
    assert layer.quant_method == Fp8LinearMethod((0, 0), "token")
    given = cls(*arguments, prefix="a.b", quant_config=config, quant_method=UnquantizedLinearMethod())
    assert given.quant_method == UnquantizedLinearMethod() and len(config.asked) == len(names)
    assert cls(*arguments).quant_method == UnquantizedLinearMethod(), "never None"


@each_layer
@pytest.mark.parametrize("size", (1, 2))
def test_no_tokens_give_no_rows_and_every_rank_joins(cls, size):
    arguments, _ = LAYERS[cls]

    def work(_):
        layer = cls(*arguments)
        if isinstance(layer, ParallelLMHead):
            return layer(torch.zeros(0, 16)), layer(torch.zeros(0, 16), gather_all=True)
        if isinstance(layer, VocabParallelEmbedding):
            return (layer(torch.zeros(0, dtype=torch.int64)),)
        return (layer(torch.zeros(0, layer.shape.in_features_local)),)

    for rank, (first, *rest) in enumerate(simulate(size, work)):
        if cls is ParallelLMHead:
            assert (first is None) == (rank > 0) and rest[0].shape == (0, 32)
        else:
            assert first.shape[0] == 0


def test_blocks_without_weights_take_no_tokens():
    x = torch.zeros(0, 8)
    assert RMSNorm(8)(x).shape == (0, 8) and SiluAndMul()(x).shape == GeluAndMul()(x).shape == (0, 4)
    assert [t.shape for t in RMSNorm(8)(x, x)] == [(0, 8)] * 2
    q, k = get_rope(8, 8, 16, 1e4)(torch.zeros(0, dtype=torch.int64), x, x)
    assert q.shape == k.shape == (0, 8)


def test_a_norm_without_weight_has_no_parameter():
    norm = RMSNorm(8, has_weight=False)
    assert norm.weight is None and not list(norm.parameters())
    assert list(dict(RMSNorm(8).named_parameters())) == ["weight"]


def test_partial_sums_of_a_row_parallel_layer_have_its_bias_once():
    """reduce_output False: rank 0 alone adds it, so that whoever sums the ranks' outputs gets the layer's."""
    weight, bias = torch.arange(8.0).view(2, 4), torch.tensor([10.0, 20.0])
    x = torch.ones(1, 4)

    def work(parallel):
        layer = RowParallelLinear(4, 2, reduce_output=False)
        layer.weight_loader(layer.weight, weight)
        layer.weight_loader(layer.bias, bias)
        return layer(x[:, layer.input_start_index : layer.input_end_index])

    parts = simulate(2, work)
    assert torch.equal(sum(parts), x @ weight.t() + bias)
    assert torch.equal(parts[1], x[:, 2:] @ weight[:, 2:].t()), "no bias on the others"
    (alone,) = simulate(1, work)
    assert torch.equal(alone, x @ weight.t() + bias)


def test_the_rotary_type_may_stand_among_the_settings():
    scaling = {"type": "linear", "factor": 2.0}
    named = get_rope(8, 8, 16, 1e4, scaling)
    assert named is get_rope(8, 8, 16, 1e4, scaling, "linear")
    assert torch.allclose(named.inverse_frequencies * 2, get_rope(8, 8, 16, 1e4, None).inverse_frequencies)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Linear(0, 4), "0"),
        (lambda: Linear(4, -1), "-1"),
        (lambda: ColumnParallelLinear("8", 4), "'8'"),
        (lambda: RowParallelLinear(8, 4.0), "4.0"),
        (lambda: MergedColumnParallelLinear(8, []), "none"),
        (lambda: MergedColumnParallelLinear(8, [4, 0]), "0"),
        (lambda: QKVParallelLinear(16, 4, 4, 0), "0"),
        (lambda: VocabParallelEmbedding(0, 8), "0"),
        (lambda: ParallelLMHead(8, 2.5), "2.5"),
    ],
)
def test_a_size_that_no_layer_can_have_is_refused(make, found):
    with pytest.raises(ConfigError, match="whole number of at least 1") as error:
        make()
    assert error.value.found == found


@pytest.mark.parametrize("make", (get_rope, get_gemma4_proportional_rope))
@pytest.mark.parametrize("rotary_dim", (0, 3, 10))
def test_a_rotated_part_that_no_head_can_have_is_refused(make, rotary_dim):
    with pytest.raises(ConfigError, match="even number up to 8"):
        make(8, rotary_dim, 16, 1e4)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("size", (1, 2))
def test_a_tied_head_works_before_the_table_is_packed_and_after(packed, size):
    table, x = torch.randn(11, 6), torch.randn(3, 6)

    def work(_):
        embedding = VocabParallelEmbedding(11, 6)
        head = ParallelLMHead(11, 6, tied_to=embedding)
        embedding.weight_loader(embedding.weight, table)
        if packed:
            embedding.quant_method.process_weights_after_loading(embedding)
        return head(x, gather_all=True)

    for logits in simulate(size, work):
        torch.testing.assert_close(logits, x @ table.t())
