"""The ranks' pieces of a layer, put together, are the layer: every format, every way of dividing."""

# O out_features, I in_features

import pytest
import torch

from pymllm.errors import ShardingError
from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from pymllm.parallel import Parallel
from pymllm.weights.spec import Axis

from .vectors import all_vectors, load_layer, name_of, one_of_each_method, weight_of

METHODS = pytest.mark.parametrize("vector", one_of_each_method(), ids=name_of)
# Quarters of 512 are whole groups, words and blocks of every format; quarters of 256 lie within a block of 128,
# whose scale each of two ranks then holds.
SPLITS = pytest.mark.parametrize("width, size", ((512, 4), (256, 2), (256, 4)))


def ranks(size):
    return [Parallel(rank, size) for rank in range(size)]


def whole(vector, in_features, out_features, tensors):
    method = vector.method
    return weight_of(load_layer(lambda: Linear(in_features, out_features, False, method), [tensors]))


@METHODS
@SPLITS
def test_column_shards_concatenate_to_the_layer(vector, size, width):
    inputs = 384 * vector.coarseness
    tensors = vector.resampled(inputs, width, seed=1)
    pieces = [
        load_layer(
            lambda: ColumnParallelLinear(inputs, width, False, quant_method=vector.method), [tensors], rank
        )
        for rank in ranks(size)
    ]
    assert [piece.output_start_index for piece in pieces] == [rank * width // size for rank in range(size)]
    assert torch.equal(torch.cat([weight_of(p) for p in pieces]), whole(vector, inputs, width, tensors))


@METHODS
@SPLITS
def test_row_shards_concatenate_to_the_layer(vector, size, width):
    width *= vector.coarseness
    tensors = vector.resampled(width, 160, seed=2)
    pieces = [
        load_layer(lambda: RowParallelLinear(width, 160, False, quant_method=vector.method), [tensors], rank)
        for rank in ranks(size)
    ]
    assert [piece.input_start_index for piece in pieces] == [rank * width // size for rank in range(size)]
    assert torch.equal(torch.cat([weight_of(p) for p in pieces], dim=1), whole(vector, width, 160, tensors))


@METHODS
@pytest.mark.parametrize("size", (1, 4))
def test_merged_shards_hold_their_share_of_every_part(vector, size):
    parts, inputs = [512, 256, 512], 128 * vector.coarseness
    tensors = [vector.resampled(inputs, out, seed=10 + index) for index, out in enumerate(parts)]
    full = [whole(vector, inputs, out, part) for out, part in zip(parts, tensors, strict=True)]
    for rank in ranks(size):
        layer = load_layer(
            lambda: MergedColumnParallelLinear(inputs, parts, False, quant_method=vector.method),
            tensors,
            rank,
        )
        share = [out // size for out in parts]
        expected = [
            weight[rank.rank * rows : (rank.rank + 1) * rows]
            for weight, rows in zip(full, share, strict=True)
        ]
        assert torch.equal(weight_of(layer), torch.cat(expected))


@METHODS
@pytest.mark.parametrize("kv_heads, size", ((2, 1), (2, 2), (8, 4), (2, 4), (1, 4)))
def test_qkv_shards_hold_whole_heads_and_replicate_key_heads_where_ranks_are_more(vector, kv_heads, size):
    heads, head_size, inputs = 8, 64, 128 * vector.coarseness
    parts = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    tensors = [vector.resampled(inputs, out, seed=20 + index) for index, out in enumerate(parts)]
    full = [whole(vector, inputs, out, part) for out, part in zip(parts, tensors, strict=True)]
    for rank in ranks(size):
        layer = load_layer(
            lambda: QKVParallelLinear(inputs, head_size, heads, kv_heads, False, quant_method=vector.method),
            tensors,
            rank,
        )
        mine = heads // size
        queries = range(rank.rank * mine, (rank.rank + 1) * mine)
        # The key heads that this rank's queries attend to: query head h reads key head h * kv_heads / heads.
        keys = sorted({head * kv_heads // heads for head in queries})
        assert (layer.num_heads_local, layer.num_kv_heads_local) == (len(queries), len(keys))
        picked = [queries, keys, keys]
        expected = [
            weight.unflatten(0, (-1, head_size))[list(which)].flatten(0, 1)
            for weight, which in zip(full, picked, strict=True)
        ]
        assert torch.equal(weight_of(layer), torch.cat(expected))


@METHODS
@pytest.mark.parametrize("kv_heads, size", ((2, 1), (2, 2), (8, 4), (2, 4), (1, 4)))
def test_qkv_that_lies_in_one_tensor_is_cut_by_heads(vector, kv_heads, size):
    heads, head_size, inputs = 8, 64, 128 * vector.coarseness
    width = (heads + 2 * kv_heads) * head_size
    tensors = vector.resampled(inputs, width, seed=40)
    full = whole(vector, inputs, width, tensors).unflatten(0, (-1, head_size))
    for rank in ranks(size):
        layer = load_layer(
            lambda: QKVParallelLinear(
                inputs,
                head_size,
                heads,
                kv_heads,
                False,
                quant_method=vector.method,
                part_names=("qkv_proj",),
                prefix="m.qkv_proj",
            ),
            [tensors],
            rank,
        )
        mine = heads // size
        queries = range(rank.rank * mine, (rank.rank + 1) * mine)
        keys = sorted({head * kv_heads // heads for head in queries})
        picked = [*queries, *(heads + key for key in keys), *(heads + kv_heads + key for key in keys)]
        assert torch.equal(weight_of(layer), full[picked].flatten(0, 1))
        assert layer.kv_heads.start == keys[0] and layer.kv_heads.size == len(keys)
        assert layer.out_features == width and layer.shape.out_features == width


@METHODS
@pytest.mark.parametrize("size", (1, 4))
def test_gate_and_up_that_lie_in_one_tensor_are_each_divided(vector, size):
    inputs, width = 128 * vector.coarseness, 512
    tensors = vector.resampled(inputs, 2 * width, seed=50)
    gate, up = whole(vector, inputs, 2 * width, tensors).chunk(2)
    for rank in ranks(size):
        layer = load_layer(
            lambda: MergedColumnParallelLinear(
                inputs, [width, width], False, quant_method=vector.method, part_names=("gate_up_proj",)
            ),
            [tensors],
            rank,
        )
        rows = slice(rank.rank * width // size, (rank.rank + 1) * width // size)
        assert torch.equal(weight_of(layer), torch.cat((gate[rows], up[rows])))


@pytest.mark.parametrize("vector", all_vectors(), ids=name_of)
@pytest.mark.parametrize("layer_type", (ColumnParallelLinear, RowParallelLinear))
@pytest.mark.parametrize("size", (2, 3, 8))
def test_an_odd_shape_is_divided_rightly_or_refused(vector, layer_type, size):
    """Never a wrong piece: a cut through a word, a group or a block is an error that names both."""
    i, o = vector.in_features, vector.out_features
    tensors = {spec.name: vector.stored_for(spec) for spec in vector.method.weight_specs(vector.shape)}
    try:
        pieces = [
            weight_of(
                load_layer(
                    lambda: layer_type(i, o, False, quant_method=vector.method, prefix="m.x"), [tensors], rank
                )
            )
            for rank in ranks(size)
        ]
    except ShardingError as error:
        divided, other = (o, "outputs") if layer_type is ColumnParallelLinear else (i, "inputs")
        assert "m.x" in str(error), other
        # Shares that are whole blocks of 128 suit every format, but those whose blocks are longer.
        assert divided % size or (divided // size) % max(128, 64 * vector.coarseness)
        return
    axis = 0 if layer_type is ColumnParallelLinear else 1
    assert torch.equal(torch.cat(pieces, dim=axis), whole(vector, i, o, tensors))


@METHODS
@pytest.mark.parametrize("layer_type", (ColumnParallelLinear, RowParallelLinear))
def test_a_word_of_packed_codes_is_never_shared_between_ranks(vector, layer_type):
    """Unlike a scale, which ranks within its group or block may all hold, codes side by side in a word are data."""
    i, o = vector.in_features, vector.out_features
    axis, size = (Axis.OUT, o) if layer_type is ColumnParallelLinear else (Axis.IN, i)
    dims = [dim for spec in vector.method.weight_specs(vector.shape) for dim in spec.dims]
    if not any(dim.axis is axis and dim.apart and dim.of_rows(i).granule > 1 for dim in dims):
        pytest.skip("nothing is packed along this axis")
    with pytest.raises(ShardingError), Parallel(0, size):
        layer_type(i, o, False, quant_method=vector.method)
