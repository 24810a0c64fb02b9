"""A model family whose modules resolve names of their own, through `pymllm.load_model`."""

from __future__ import annotations

import pytest
import torch

from pymllm.api import load_model
from pymllm.attention.self_attention import SelfAttention
from pymllm.checking.verify import verify
from pymllm.errors import CheckpointError, ConfigError
from pymllm.layers.mlp import GatedMLP
from pymllm.models.causal_lm import CausalLM
from pymllm.parallel import simulate
from pymllm.planning.make_plan import plan
from pymllm.weights.resolution import ResolvedWeight

from ..checkpoints import relative_error, save_tensors, write_checkpoint
from ..forward import logits_of


def resolve_attention(self, suffix, ctx):
    """q, k and v in one transposed tensor."""
    assert ctx.full_name.endswith(suffix) and ctx.config.size("hidden_size") == 128
    if suffix == "attention.wqkv":
        return ResolvedWeight(param=self.qkv_proj.weight, transform=torch.t)
    return None


def resolve_mlp(self, suffix, ctx):
    parts = {"w1": 0, "w3": "up_proj"}
    if suffix in parts:
        return ResolvedWeight(param=self.gate_up_proj.weight, shard_id=parts[suffix])
    if suffix == "w2":
        weight = self.down_proj.weight
        return ResolvedWeight(param=weight, loader=lambda t: weight.weight_loader(weight, t.flip(0)))
    return None


def resolve_root(self, suffix, ctx):
    if suffix == "final":
        return ResolvedWeight(param=self.model.norm.weight, loader=self.load_final)
    return ResolvedWeight(skip=True) if suffix.startswith("draft.") else None


def load_final(self, loaded):
    """A loader that writes by itself, and counts nothing."""
    self.model.norm.weight.data.copy_(loaded - 1)


@pytest.fixture
def family(monkeypatch):
    """Llama as a family that stores its weights so."""
    monkeypatch.setattr(SelfAttention, "resolve_checkpoint_weight", resolve_attention, raising=False)
    monkeypatch.setattr(GatedMLP, "resolve_checkpoint_weight", resolve_mlp, raising=False)
    monkeypatch.setattr(CausalLM, "resolve_checkpoint_weight", resolve_root, raising=False)
    monkeypatch.setattr(CausalLM, "load_final", load_final, raising=False)


def renamed(folder, change=None):
    """A checkpoint of that family, and transformers' model of the same weights."""
    checkpoint = write_checkpoint(folder, "llama")
    tensors = dict(checkpoint.tensors)
    for index in range(2):
        prefix = f"model.layers.{index}"
        qkv = [tensors.pop(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"{prefix}.self_attn.attention.wqkv"] = torch.cat(qkv).t()
        for new, old in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            tensor = tensors.pop(f"{prefix}.mlp.{old}_proj.weight")
            tensors[f"{prefix}.mlp.{new}"] = tensor.flip(0) if new == "w2" else tensor
    tensors["final"] = tensors.pop("model.norm.weight") + 1
    tensors["draft.x"] = torch.zeros(3)
    if change is not None:
        change(tensors)
    save_tensors(folder, tensors)
    return checkpoint


@pytest.mark.parametrize("size", (1, 2, 4))
def test_resolvers_are_honoured_on_every_rank(tmp_path, family, size):
    checkpoint = renamed(tmp_path)
    expected = checkpoint.logits()

    def work(_):
        model = load_model(tmp_path, device="cpu", dtype="float32")
        return logits_of(model, checkpoint.ids), model.load_report

    for logits, report in simulate(size, work):
        assert relative_error(logits, expected) <= 1e-5
        skipped = {record.name: record.reason for record in report.tensors if record.status == "skipped"}
        assert skipped == {"draft.x": "the model's resolver skips it"}
        names = [record.name for record in report.tensors if record.status == "loaded"]
        assert len(names) == len(set(names)) and "model.layers.1.mlp.w3" in names


def test_resolved_weights_are_planned_verified_and_converted(tmp_path, family):
    checkpoint = renamed(tmp_path)
    assert plan(tmp_path, device="cpu").layer("model.layers.0.self_attn.q_proj").bytes > 0
    logits = logits_of(
        load_model(tmp_path, quant="**.self_attn.**=int8", device="cpu", dtype="float32"), checkpoint.ids
    )
    assert 0 < relative_error(logits, checkpoint.logits()) < 0.1
    with pytest.raises(ConfigError, match=r"mlp\.w2.*cannot be read again"):
        verify(tmp_path, device="cpu")


def test_attention_that_is_resolved_without_a_loader_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(SelfAttention, "resolve_checkpoint_weight", resolve_attention, raising=False)

    def only_attention(tensors):
        for index in range(2):
            for new, old in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                tensor = tensors.pop(f"model.layers.{index}.mlp.{new}")
                tensors[f"model.layers.{index}.mlp.{old}_proj.weight"] = tensor
        tensors["model.norm.weight"] = tensors.pop("final")
        del tensors["draft.x"]

    renamed(tmp_path, only_attention)
    report = verify(tmp_path, device="cpu", dtype="float32")
    assert report.ok and any("self_attn.k_proj" in layer.prefix for layer in report.layers)


@pytest.mark.parametrize(
    "change, needles",
    (
        (lambda t: t.pop("model.layers.1.mlp.w3"), ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (lambda t: t.pop("model.layers.0.self_attn.attention.wqkv"), ["self_attn.v_proj.weight", "missing"]),
        (
            lambda t: t.update({"model.layers.1.mlp.gate_proj.weight": torch.zeros(256, 128)}),
            ["model.layers.1.mlp.gate_proj.weight", "unexpected"],
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.w1": torch.zeros(3, 128)}),
            ["mlp.w1", "expected [256, 128], found [3, 128]"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(128)}),
            ["unexpected, a module's resolver fills its place"],
        ),
    ),
)
def test_what_resolvers_leave_open_is_an_error(tmp_path, family, change, needles):
    renamed(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, device="cpu")
    assert all(needle in str(caught.value) for needle in needles), str(caught.value)


def test_two_tensors_for_one_place_are_an_error(tmp_path, family, monkeypatch):
    def both(self, suffix, ctx):
        known = {"w1": 0, "again": 0, "w3": 1}
        if suffix in known:
            return ResolvedWeight(param=self.gate_up_proj.weight, shard_id=known[suffix])
        return resolve_mlp(self, suffix, ctx)

    monkeypatch.setattr(GatedMLP, "resolve_checkpoint_weight", both)
    renamed(tmp_path, lambda t: t.update({"model.layers.0.mlp.again": torch.zeros(256, 128)}))
    with pytest.raises(CheckpointError, match="a second tensor for a place"):
        load_model(tmp_path, device="cpu")


def test_a_resolver_without_a_place_is_an_error(tmp_path, family, monkeypatch):
    def nowhere(self, suffix, ctx):
        return ResolvedWeight(loader=print) if suffix == "final" else resolve_root(self, suffix, ctx)

    monkeypatch.setattr(CausalLM, "resolve_checkpoint_weight", nowhere)
    renamed(tmp_path)
    with pytest.raises(CheckpointError, match="final: its resolver names no parameter"):
        load_model(tmp_path, device="cpu")


def test_a_buffer_can_be_filled(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    tensors = dict(checkpoint.tensors) | {"model.layers.0.self_attn.table": torch.arange(4.0)}
    save_tensors(tmp_path, tensors)
    before = SelfAttention.__init__

    def with_table(self, *arguments, **options):
        before(self, *arguments, **options)
        self.register_buffer("table", torch.zeros(4))

    def resolve(self, suffix, ctx):
        return ResolvedWeight(buffer=self.table, transform=lambda t: t * 2) if suffix == "table" else None

    monkeypatch.setattr(SelfAttention, "__init__", with_table)
    monkeypatch.setattr(SelfAttention, "resolve_checkpoint_weight", resolve, raising=False)
    model = load_model(tmp_path, device="cpu", dtype="float32")
    assert model.model.layers[0].self_attn.table.tolist() == [0, 2, 4, 6]
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5
