"""Linear layers: what the contract names, how full tensors are cut for a rank, and what a rank's forward gives."""

# T tokens, I in_features, O out_features

from __future__ import annotations

import pytest
import torch

from pymllm.errors import CheckpointError, ConfigError, ShardingError
from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    set_weight_attrs,
)
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.formats.fp8 import Fp8LinearMethod

from ..checkpoints import AWQ, FP8, CompressedFP8, Plain
from ..tensors import random

# Of each: the method, and the independent writer of its tensors.
METHODS = {
    "none": (UnquantizedLinearMethod(), Plain()),
    "awq": (AWQLinearMethod(32), AWQ(32)),
    "awq-row": (AWQLinearMethod(-1), AWQ(-1)),
    "fp8-block": (Fp8LinearMethod((64, 64), "group"), FP8((64, 64))),
    "fp8-tensor": (Fp8LinearMethod((0, 0), "token"), FP8(None)),
    "fp8-tensor-static": (Fp8LinearMethod((0, 0), "static"), FP8(None, static=True)),
    "fp8-channel": (Fp8LinearMethod((1, 0), "token"), CompressedFP8("channel", dtype=torch.float32)),
}
each_method = pytest.mark.parametrize("name", METHODS)


def filled(layer, weights, writer, biases=None, by=None):
    """Load one full tensor a part and pack.  by: shard ids, by default the indices.  Returns what the weights mean."""
    meant = []
    for index, weight in enumerate(weights):
        tensors, value = writer.encode(weight)
        meant.append(value)
        shard_id = index if by is None else by[index]
        for name, tensor in tensors.items():
            layer.weight_loader(getattr(layer, name), tensor, shard_id)
        if biases is not None:
            layer.weight_loader(layer.bias, biases[index], shard_id)
    layer.quant_method.process_weights_after_loading(layer)
    return meant


def assert_close(actual, x, weight, bias=None):
    """Against float64, to float32's rounding."""
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-4)


# --- what the contract names


def test_attributes_of_an_unsharded_layer():
    layer = Linear(24, 16, prefix="model.x")
    assert isinstance(layer, LinearBase) and ReplicatedLinear is Linear
    assert (layer.in_features, layer.out_features, layer.tp_rank, layer.tp_size) == (24, 16, 0, 1)
    assert layer.quant_method == UnquantizedLinearMethod() and layer.prefix == "model.x"
    assert layer.weight.shape == (16, 24) and layer.bias.shape == (16,)
    assert Linear(24, 16, bias=False).bias is None
    with Parallel(1, 2):
        assert Linear(24, 16).weight.shape == (16, 24), "every rank holds it whole"


def test_attributes_of_a_column_parallel_layer():
    with Parallel(1, 4):
        layer = ColumnParallelLinear(24, 32)
    assert (layer.in_features, layer.out_features, layer.gather_output) == (24, 32, True)
    assert (layer.out_features_per_partition, layer.output_start_index, layer.output_end_index) == (8, 8, 16)
    assert (
        (layer.tp_rank, layer.tp_size) == (1, 4)
        and layer.weight.shape == (8, 24)
        and layer.bias.shape == (8,)
    )


def test_attributes_of_a_row_parallel_layer():
    with Parallel(2, 4):
        layer = RowParallelLinear(32, 24)
    assert (layer.in_features_per_partition, layer.input_start_index, layer.input_end_index) == (8, 16, 24)
    assert layer.reduce_output and layer.weight.shape == (24, 8) and layer.bias.shape == (24,)


def test_attributes_of_a_qkv_layer():
    with Parallel(5, 8):
        layer = QKVParallelLinear(64, 16, 8, 2)
    assert (layer.num_heads_local, layer.num_kv_heads_local) == (1, 1)
    assert layer.weight.shape == (3 * 16, 64) and layer.out_features == (8 + 2 + 2) * 16
    assert QKVParallelLinear(64, 16, 8).total_num_kv_heads == 8


def test_a_layer_keeps_the_ranks_it_was_built_under():
    with Parallel(1, 2):
        layer = ColumnParallelLinear(8, 16)
    assert layer.parallel == Parallel(1, 2) and layer.tp_size == 2


def test_forward_of_the_base_is_abstract():
    class Own(LinearBase):
        def shard(self, rank, size):
            return Linear.shard(self, rank, size)

    with pytest.raises(NotImplementedError):
        Own(8, [8], False, None)(torch.zeros(1, 8))


class ByPrefix(QuantizationConfig):
    """FP8 for gate, nothing for the rest."""

    def __init__(self):
        self.asked = []

    @classmethod
    def get_name(cls):
        return "by-prefix"

    @classmethod
    def from_config(cls, config):
        return cls()

    def get_quant_method(self, layer, prefix):
        self.asked.append(prefix)
        return Fp8LinearMethod() if prefix.endswith("gate_proj") else None


def test_without_a_method_the_config_is_asked_with_each_parts_checkpoint_name():
    config = ByPrefix()
    layer = MergedColumnParallelLinear(
        8,
        [16, 16],
        False,
        part_names=("gate_proj", "up_proj"),
        prefix="a.b.gate_up_proj",
        quant_config=config,
    )
    assert config.asked == ["a.b.gate_proj", "a.b.up_proj"]
    assert [method.name for method in layer.quant_method.methods] == ["fp8", "none"]
    given = Linear(8, 8, False, UnquantizedLinearMethod(), prefix="gate_proj", quant_config=config)
    assert given.quant_method == UnquantizedLinearMethod() and len(config.asked) == 2


def test_a_method_refuses_at_construction_what_it_cannot_run():
    with pytest.raises(ConfigError, match=r"x\.q: groups of 48 .* 64 inputs"):
        Linear(64, 8, False, AWQLinearMethod(48), prefix="x.q")
    with pytest.raises(ConfigError, match="multiple of 8 outputs"):
        Linear(64, 12, False, AWQLinearMethod(32))


# --- loading


@each_method
def test_a_full_tensor_is_loaded_and_multiplied(name):
    method, writer = METHODS[name]
    layer = Linear(64, 128, True, method)
    bias = random(128, seed=1)
    (weight,) = filled(layer, [random(128, 64)], writer, [bias])
    for shape in ((5, 64), (1, 64), (0, 64), (2, 3, 64), (64,)):
        x = random(*shape, seed=2)
        assert_close(layer(x), x, weight, bias)


@each_method
@pytest.mark.parametrize("by", (None, ("gate_proj", "up_proj"), (0, 1)), ids=("whole", "names", "indices"))
def test_parts_of_a_merged_layer_are_loaded_by_name_by_index_or_all_at_once(name, by):
    method, writer = METHODS[name]
    layer = MergedColumnParallelLinear(
        64, [128, 64], True, quant_method=method, part_names=("gate_proj", "up_proj")
    )
    weights, biases = [random(128, 64), random(64, 64, seed=1)], [random(128, seed=2), random(64, seed=3)]
    if by is None:
        if name in ("fp8-tensor", "fp8-tensor-static"):
            pytest.skip("a fused tensor has one scale for both parts")
        tensors, meant = zip(*(writer.encode(weight) for weight in weights), strict=True)
        for key in tensors[0]:
            along_inputs_first = name.startswith("awq")
            full = torch.cat([part[key] for part in tensors], dim=1 if along_inputs_first else 0)
            layer.weight_loader(getattr(layer, key), full)
        layer.weight_loader(layer.bias, torch.cat(biases))
        layer.quant_method.process_weights_after_loading(layer)
    else:
        meant = filled(layer, weights, writer, biases, by)
    x = random(3, 64, seed=4)
    assert_close(layer(x), x, torch.cat(list(meant)), torch.cat(biases))


@each_method
@pytest.mark.parametrize("by", (("q", "k", "v"), ("v", "q", "k"), (0, 1, 2)), ids=str)
def test_parts_of_a_qkv_layer_are_loaded_in_any_order(name, by):
    method, writer = METHODS[name]
    layer = QKVParallelLinear(64, 32, 4, 2, True, method)
    sizes = {"q": 128, "k": 64, "v": 64}
    order = ["qkv"[shard_id] if isinstance(shard_id, int) else shard_id for shard_id in by]
    weights = {part: random(sizes[part], 64, seed=i) for i, part in enumerate("qkv")}
    biases = {part: random(sizes[part], seed=9 + i) for i, part in enumerate("qkv")}
    meant = filled(layer, [weights[part] for part in order], writer, [biases[part] for part in order], by)
    meant = dict(zip(order, meant, strict=True))
    x = random(3, 64, seed=4)
    assert_close(layer(x), x, torch.cat([meant[p] for p in "qkv"]), torch.cat([biases[p] for p in "qkv"]))


def test_a_float_of_another_dtype_is_converted():
    layer = Linear(8, 4, params_dtype=torch.bfloat16)
    weight = random(4, 8)
    layer.weight_loader(layer.weight, weight)
    layer.weight_loader(layer.bias, random(4).half())
    assert torch.equal(layer.weight, weight.bfloat16()) and layer.weight.dtype is torch.bfloat16


def test_a_scalar_scale_may_have_any_number_of_dimensions():
    for shape in ((), (1,), (1, 1)):
        layer = Linear(8, 4, False, Fp8LinearMethod((0, 0), "token"))
        layer.weight_loader(layer.weight_scale, torch.full(shape, 0.5))
        assert layer.weight_scale.tolist() == [0.5]


@each_method
def test_a_shape_that_does_not_fit_names_layer_tensor_expected_and_found(name):
    method, writer = METHODS[name]
    layer = ColumnParallelLinear(
        64, 128, False, quant_method=method, prefix="model.layers.0.self_attn.o_proj"
    )
    wrong, _ = writer.encode(random(192, 128))
    right, _ = writer.encode(random(128, 64))
    for key, tensor in wrong.items():
        if tensor.numel() == 1:
            continue
        with pytest.raises(CheckpointError) as caught:
            layer.weight_loader(getattr(layer, key), tensor)
        error = caught.value
        assert error.code == "shape" and error.tensor == f"model.layers.0.self_attn.o_proj.{key}"
        assert error.expected == str(list(right[key].shape)) and error.found == str(list(tensor.shape))
        assert "model.layers.0.self_attn.o_proj" in str(error)


@each_method
def test_a_transposed_tensor_never_fits(name):
    method, writer = METHODS[name]
    layer = Linear(64, 128, False, method)
    for key, tensor in writer.encode(random(128, 64))[0].items():
        if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
            with pytest.raises(CheckpointError):
                layer.weight_loader(getattr(layer, key), tensor.t())


@each_method
def test_a_dtype_that_does_not_fit_is_named(name):
    method, writer = METHODS[name]
    layer = Linear(64, 128, False, method, prefix="model.x")
    for key, tensor in writer.encode(random(128, 64))[0].items():
        with pytest.raises(CheckpointError) as caught:
            layer.weight_loader(getattr(layer, key), torch.zeros(tensor.shape, dtype=torch.int16))
        assert caught.value.code == "dtype" and caught.value.found == "int16"
        assert caught.value.tensor == f"model.x.{key}" and caught.value.expected


@each_method
def test_a_second_write_to_the_same_place_is_refused(name):
    method, writer = METHODS[name]
    layer = MergedColumnParallelLinear(64, [64, 64], False, quant_method=method, prefix="m.gate_up")
    for key, tensor in writer.encode(random(64, 64))[0].items():
        param = getattr(layer, key)
        layer.weight_loader(param, tensor, 0)
        before = param.clone()
        with pytest.raises(CheckpointError) as caught:
            layer.weight_loader(param, tensor, 0)
        assert caught.value.code == "written-twice" and key in caught.value.tensor
        if tensor.ndim == 2:  # both parts at once, one of which is there
            both = torch.cat([tensor, tensor], dim=1 if name.startswith("awq") else 0)
            with pytest.raises(CheckpointError):
                layer.weight_loader(param, both)
        assert torch.equal(param.view(torch.uint8), before.view(torch.uint8)), "nothing was half-written"
        layer.weight_loader(param, tensor, 1)


@pytest.mark.parametrize("shard_id", ("gate", "q", 2, -1, "", "gate_up_proj"))
def test_an_unknown_part_lists_the_parts(shard_id):
    layer = MergedColumnParallelLinear(
        8, [8, 8], False, part_names=("gate_proj", "up_proj"), prefix="mlp.gate_up_proj"
    )
    with pytest.raises(ConfigError) as caught:
        layer.weight_loader(layer.weight, torch.zeros(8, 8), shard_id)
    assert caught.value.code == "shard-id" and "gate_proj or up_proj" in str(caught.value)
    assert "mlp.gate_up_proj" in str(caught.value)


def test_a_fused_tensor_of_the_wrong_total_is_refused():
    layer = MergedColumnParallelLinear(8, [8, 16], False, prefix="mlp.gate_up")
    with pytest.raises(CheckpointError) as caught:
        layer.weight_loader(layer.weight, torch.zeros(23, 8))
    assert caught.value.expected.startswith("8 + 16") and caught.value.found == "[23, 8]"


def test_loader_metadata_is_attached_once():
    param = torch.nn.Parameter(torch.zeros(2))
    set_weight_attrs(param, {"output_dim": 0})
    assert param.output_dim == 0
    for again in ({"output_dim": 0}, {"data": 1}, {"shape": 1}):
        with pytest.raises(ConfigError) as caught:
            set_weight_attrs(param, again)
        assert caught.value.code == "attribute-overwritten" and next(iter(again)) in str(caught.value)
    set_weight_attrs(param, None)


def test_extra_attributes_reach_every_parameter():
    layer = torch.nn.Module()
    AWQLinearMethod(32).create_weights(layer, 64, [16], 64, 16, torch.float32, note="here")
    assert {name: param.note for name, param in layer.named_parameters()} == dict.fromkeys(
        ("qweight", "qzeros", "scales"), "here"
    )


@each_method
def test_a_layer_that_is_not_packed_says_so_or_runs_plain(name):
    method, _ = METHODS[name]
    layer = Linear(64, 128, False, method, prefix="model.x")
    if name == "none":
        layer.weight_loader(layer.weight, random(128, 64))
        x = random(3, 64, seed=1)
        assert_close(layer(x), x, random(128, 64))
        return
    with pytest.raises(ConfigError) as caught:
        layer(torch.zeros(1, 64))
    assert caught.value.code == "not-packed" and "model.x" in str(caught.value)


@each_method
def test_packing_twice_changes_nothing(name):
    method, writer = METHODS[name]
    layer = Linear(64, 128, False, method)
    filled(layer, [random(128, 64)], writer)
    x = random(3, 64, seed=1)
    before, bound = layer(x), layer.bound
    method.process_weights_after_loading(layer)
    assert layer.bound is bound and torch.equal(layer(x), before)


# --- ranks


def on_ranks(size, make, weights, writer, biases, x_of):
    """Every rank's output: `make()` a layer, load the full tensors, run it on `x_of(layer)`."""

    def work(_):
        layer = make()
        filled(layer, weights, writer, biases)
        return layer(x_of(layer))

    return simulate(size, work)


@each_method
@pytest.mark.parametrize("size", (1, 2, 4))
def test_a_column_parallel_layer_gathers_or_keeps_its_share(name, size):
    method, writer = METHODS[name]
    weight, bias, x = random(256, 64), random(256, seed=1), random(3, 64, seed=2)
    meant = writer.encode(weight)[1]
    for gather in (True, False):
        outputs = on_ranks(
            size,
            lambda gather=gather: ColumnParallelLinear(64, 256, True, gather, quant_method=method),
            [weight],
            writer,
            [bias],
            lambda _: x,
        )
        if gather:
            for output in outputs:
                assert_close(output, x, meant, bias)
        else:
            assert {output.shape[-1] for output in outputs} == {256 // size}
            assert_close(torch.cat(outputs, dim=-1), x, meant, bias)


@each_method
@pytest.mark.parametrize("size", (2, 4))
def test_a_gathered_merged_layer_has_its_parts_in_order(name, size):
    method, writer = METHODS[name]
    weights, biases, x = (
        [random(256, 64), random(128, 64, seed=1)],
        [random(256), random(128)],
        random(3, 64, seed=2),
    )
    meant = torch.cat([writer.encode(weight)[1] for weight in weights])
    outputs = on_ranks(
        size,
        lambda: MergedColumnParallelLinear(64, [256, 128], True, True, quant_method=method),
        weights,
        writer,
        biases,
        lambda _: x,
    )
    for output in outputs:
        assert_close(output, x, meant, torch.cat(biases))


@each_method
@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("reduce", (True, False))
def test_a_row_parallel_layer_has_its_bias_once(name, size, reduce):
    """Added after the sum; where the caller sums, the ranks' outputs must have it once together."""
    method, writer = METHODS[name]
    weight, bias, x = random(64, 256), 100 + random(64, seed=1), random(3, 256, seed=2)
    meant = writer.encode(weight)[1]
    outputs = on_ranks(
        size,
        lambda: RowParallelLinear(256, 64, True, reduce, quant_method=method),
        [weight],
        writer,
        [bias],
        lambda layer: x[:, layer.input_start_index : layer.input_end_index],
    )
    for output in outputs if reduce else [torch.stack(outputs).sum(0)]:
        assert_close(output, x, meant, bias)


def test_every_part_must_shard_not_only_the_sum():
    with Parallel(0, 4), pytest.raises(ShardingError) as caught:
        MergedColumnParallelLinear(8, [6, 2], False, prefix="mlp.gate_up")
    assert (
        "mlp.gate_up" in str(caught.value) and "6" in str(caught.value) and "1, 2, 3, 6" in str(caught.value)
    )


@pytest.mark.parametrize(
    "layer, words",
    (
        (lambda: ColumnParallelLinear(8, 10, prefix="m.x"), "output features: 10"),
        (lambda: RowParallelLinear(10, 8, prefix="m.x"), "input features: 10"),
        (lambda: QKVParallelLinear(8, 4, 6, 3, prefix="m.x"), "query heads: 6"),
        (lambda: QKVParallelLinear(8, 4, 12, 3, prefix="m.x"), "3 key heads"),
        (lambda: QKVParallelLinear(8, 4, 12, 6, prefix="m.x"), "key heads: 6"),
    ),
)
def test_a_size_that_does_not_divide_names_what_and_how_many(layer, words):
    with Parallel(0, 4), pytest.raises(ShardingError) as caught:
        layer()
    assert caught.value.code == "tp-size" and "m.x" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("rank, size", ((2, 2), (-1, 2), (0, 0)))
def test_a_rank_outside_its_group_is_refused(rank, size):
    with pytest.raises(ShardingError):
        Parallel(rank, size)
