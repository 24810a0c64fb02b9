"""Names that are not parameter names: resolvers, packed parts, exact names, in this order, each element once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pymllm.errors import CheckpointError, ConfigError
from pymllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from pymllm.parallel import Parallel
from pymllm.weights.module_loading import load_model
from pymllm.weights.resolution import (
    LoadContext,
    ResolvedWeight,
    apply_resolved_weight,
    default_weight_loader,
    resolve_weight_spec,
    try_load_direct,
    try_load_via_packed_mapping,
)

from ..tensors import random


class Inner(nn.Module):
    """Resolves `scale` and nothing else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("table", torch.zeros(2))
        self.asked = []

    def resolve_checkpoint_weight(self, suffix, ctx):
        self.asked.append((suffix, ctx))
        return ResolvedWeight(param=self.weight, transform=lambda t: t * 2) if suffix == "scale" else None


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.asked = []

    def resolve_checkpoint_weight(self, suffix, ctx):
        self.asked.append(suffix)
        return ResolvedWeight(skip=True) if suffix.endswith("unneeded") else None


def test_values_are_frozen():
    for value in (LoadContext(None, "a"), ResolvedWeight()):
        with pytest.raises(AttributeError):
            value.config = 1
        with pytest.raises(AttributeError):
            value.skip = True
    with pytest.raises(ConfigError, match="not to both"):
        ResolvedWeight(param=nn.Parameter(torch.zeros(1)), buffer=torch.zeros(1))


def test_the_longest_prefix_is_asked_first_and_the_first_answer_wins():
    model, config = Outer(), object()
    assert resolve_weight_spec(model, "inner.scale", config).param is model.inner.weight
    assert model.inner.asked == [("scale", LoadContext(config, "inner.scale"))] and not model.asked
    assert resolve_weight_spec(model, "inner.unneeded", config).skip
    assert model.asked == ["inner.unneeded"], "the root is asked with the whole name"
    assert resolve_weight_spec(model, "inner.deeper.x", config) is None
    assert model.inner.asked[-1][0] == "deeper.x" and model.asked[-1] == "inner.deeper.x"
    assert resolve_weight_spec(nn.Linear(2, 2), "weight") is None


def test_what_was_resolved_is_carried_out_in_its_order():
    param, buffer, taken = nn.Parameter(torch.zeros(2), requires_grad=False), torch.zeros(2), []
    ones = torch.ones(2)
    apply_resolved_weight(ResolvedWeight(param=param, loader=taken.append, skip=True), ones)
    assert not taken and not param.any()
    apply_resolved_weight(ResolvedWeight(param=param, loader=taken.append, transform=lambda t: t * 3), ones)
    assert taken[0].tolist() == [3, 3] and not param.any(), "a loader comes before the parameter"
    apply_resolved_weight(ResolvedWeight(param=param, transform=lambda t: t * 4), ones)
    assert param.tolist() == [4, 4]
    apply_resolved_weight(ResolvedWeight(buffer=buffer, transform=lambda t: t * 5), ones)
    assert buffer.tolist() == [5, 5]
    with pytest.raises(ValueError, match="no place to go"):
        apply_resolved_weight(ResolvedWeight(transform=lambda t: t), ones)


def test_a_shard_id_goes_to_the_parameters_own_loader():
    calls = []
    param = nn.Parameter(torch.zeros(2), requires_grad=False)
    param.weight_loader = lambda *arguments: calls.append(arguments)
    loaded = torch.ones(2)
    apply_resolved_weight(ResolvedWeight(param=param, shard_id="q"), loaded)
    assert calls == [(param, loaded, "q")]
    with pytest.raises(ConfigError, match="no part 'q'"):
        apply_resolved_weight(
            ResolvedWeight(param=nn.Parameter(torch.zeros(2), requires_grad=False), shard_id="q"), loaded
        )


def test_the_default_loader_takes_the_same_shape_and_kind_once():
    param = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    default_weight_loader(param, torch.ones(2, 2, dtype=torch.bfloat16))
    assert bool((param == 1).all())
    with pytest.raises(CheckpointError, match=r"expected \[2, 2\], found \[4\]"):
        default_weight_loader(param, torch.ones(4))
    with pytest.raises(CheckpointError, match="dtype"):
        default_weight_loader(param, torch.ones(2, 2, dtype=torch.int32))


def test_exact_names_reach_parameters_and_buffers():
    model = Outer()
    assert try_load_direct(model, "inner.weight", torch.ones(3)) and bool((model.inner.weight == 1).all())
    assert try_load_direct(model, "inner.table", torch.ones(2)) and bool((model.inner.table == 1).all())
    for name in ("inner.bias", "inner", "outer.weight", "inner.weight.x", "weight"):
        assert not try_load_direct(model, name, torch.ones(3))


class Packed(nn.Module):
    """gate and up in one layer, beside one whose name contains a part's."""

    packed_modules_mapping = {"gate_proj": ("gate_up_proj", 0), "mlp.up_proj": ("gate_up_proj", "up_proj")}

    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            4, [2, 6], False, part_names=("gate_proj", "up_proj"), prefix="mlp.gate_up_proj"
        )
        self.my_gate_proj = nn.Linear(4, 4, bias=False)


def test_packed_parts_are_found_by_whole_segments():
    model = Packed()
    mapping = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    gate, up = random(2, 4), random(6, 4, seed=1)
    assert try_load_via_packed_mapping(model, mapping, "mlp.gate_proj.weight", gate)
    assert try_load_via_packed_mapping(model, mapping, "mlp.up_proj.weight", up, config=None)
    assert torch.equal(model.mlp.gate_up_proj.weight, torch.cat((gate, up)))
    for name in ("my_gate_proj.weight", "mlp.gate_proj.bias", "gate_proj.weight", "mlp.gate_proj"):
        assert not try_load_via_packed_mapping(model, mapping, name, gate)
    with pytest.raises(CheckpointError, match="written already"):
        try_load_via_packed_mapping(model, mapping, "mlp.gate_proj.weight", gate)


# --- a whole checkpoint


class Whole(Packed):
    """Everything at once: packed parts, a resolver with a transform, a loader, a buffer, a skipped name."""

    skipped_tensors = {r".*\.inv_freq": "follows from the config"}

    def __init__(self):
        super().__init__()
        self.down = RowParallelLinear(8, 4, False, prefix="down")
        self.norm = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("table", torch.zeros(2))

    def resolve_checkpoint_weight(self, suffix, ctx):
        if suffix == "w2":
            return ResolvedWeight(param=self.down.weight, transform=torch.t)
        if suffix == "gain":
            return ResolvedWeight(param=self.norm, loader=lambda t: self.norm.data.copy_(t + 1))
        return ResolvedWeight(skip=True) if suffix == "draft" else None


TENSORS = {
    "mlp.gate_proj.weight": random(2, 4),
    "mlp.up_proj.weight": random(6, 4, seed=1),
    "my_gate_proj.weight": random(4, 4, seed=2),
    "w2": random(8, 4, seed=3),
    "gain": random(3, seed=4),
    "table": random(2, seed=5),
    "draft": random(1),
    "rotary.inv_freq": random(1),
}


def folder_of(tmp_path, **changes):
    tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_whole_checkpoint_is_loaded_and_accounted_for(tmp_path):
    model = Whole()
    report = load_model(model, SimpleNamespace(model=str(folder_of(tmp_path))))
    x = random(5, 4, seed=9)
    expected = x @ torch.cat((TENSORS["mlp.gate_proj.weight"], TENSORS["mlp.up_proj.weight"])).t()
    assert torch.allclose(model.mlp.gate_up_proj(x), expected, atol=1e-6), "packed by now"
    y = random(5, 8, seed=9)
    assert torch.allclose(model.down(y), y @ TENSORS["w2"], atol=1e-6)
    assert torch.equal(model.my_gate_proj.weight, TENSORS["my_gate_proj.weight"])
    assert torch.equal(model.norm, TENSORS["gain"] + 1) and torch.equal(model.table, TENSORS["table"])
    statuses = {record.name: record.status for record in report.tensors}
    assert set(statuses) == set(TENSORS) and statuses["draft"] == statuses["rotary.inv_freq"] == "skipped"
    assert sum(status == "loaded" for status in statuses.values()) == 6 and report.bytes_read > 0


def test_a_rank_gets_its_share(tmp_path):
    with Parallel(1, 2):
        model = Whole()
    load_model(model, folder_of(tmp_path))
    bound = model.down.bound.canonical().weight
    assert torch.equal(bound, TENSORS["w2"].t()[:, 4:])


@pytest.mark.parametrize(
    "changes, needles",
    (
        ({"mlp.up_proj.weight": None}, ["half-written", "mlp.gate_up_proj.weight"]),
        ({"my_gate_proj.weight": None}, ["my_gate_proj.weight: missing"]),
        ({"my_gate_prj.weight": torch.ones(1)}, ["my_gate_prj.weight: unexpected", "Nearest: my_gate_proj"]),
        ({"w2": random(4, 8)}, ["w2", "shape"]),
        ({"mlp.gate_up_proj.weight": random(8, 4)}, ["written already", "mlp.g"]),
        ({"down.weight": random(4, 8)}, ["written already"]),
        ({"norm": random(3)}, ["written already"]),
    ),
)
def test_what_is_wrong_with_a_checkpoint_is_an_error_that_names_it(tmp_path, changes, needles):
    with pytest.raises(CheckpointError) as caught:
        load_model(Whole(), folder_of(tmp_path, **changes))
    assert all(needle in str(caught.value) for needle in needles), str(caught.value)


def test_a_config_must_say_where_the_checkpoint_is(tmp_path):
    load_model(Whole(), {"path": folder_of(tmp_path)})
    with pytest.raises(ConfigError, match="where the checkpoint is"):
        load_model(Whole(), SimpleNamespace(other=1))
