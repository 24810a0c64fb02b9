"""The protocol of `pymllm.layers.held`: a new kind of layer is one file, and every model answers it completely."""

# T tokens, H hidden size, N heads, D head size

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import pymllm
from pymllm.api import load_model
from pymllm.attention.self_attention import SelfAttention
from pymllm.checking.verify import verify
from pymllm.errors import CheckpointError
from pymllm.kernels.native import extension
from pymllm.layers.held import Binder, PlainParameters, RevisedModule, WeightHolder, weight_holders
from pymllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from pymllm.loading.prepare import prepare
from pymllm.models import list_model_types
from pymllm.models.llama import Model
from pymllm.parallel import Parallel, current_parallel, simulate
from pymllm.quantization.parameters import add_weight
from pymllm.weights.spec import FLOATS, OUT, LinearShape, Span, WeightSpec

from ..block_checkpoints import FAMILIES as BLOCK_FAMILIES
from ..block_checkpoints import write_blocks
from ..checkpoints import FAMILIES, relative_error, save_tensors, write_checkpoint
from ..forward import logits_of
from ..moe_checkpoints import FAMILIES as MOE_FAMILIES
from ..moe_checkpoints import write_moe

NEW = "model.layers.1.self_attn"
H, N, D, TAPS = 128, 6, 16, 4


class Decaying(WeightHolder):
    """A layer of a kind that pymllm does not know.

    A_log [N] is divided over ranks as the heads are, the plain `skip` [H] is not; the convolution is torch's own.
    """

    def __init__(self, prefix, quant_config):
        super().__init__()
        self.prefix = prefix
        options = {"prefix": f"{prefix}.in_proj", "quant_config": quant_config}
        self.in_proj = ColumnParallelLinear(H, N * D, False, False, **options)
        options["prefix"] = f"{prefix}.out_proj"
        self.out_proj = RowParallelLinear(N * D, H, False, **options)
        self.conv1d = nn.Conv1d(H, H, TAPS, groups=H, bias=False)
        self.skip = nn.Parameter(torch.empty(H, dtype=torch.float32), requires_grad=False)
        parallel = current_parallel()
        heads = LinearShape(
            Span.full(1), (self.heads(parallel.rank, parallel.size),), (prefix,), torch.float32
        )
        add_weight(self, WeightSpec("A_log", torch.float32, (OUT,), accepts=FLOATS), heads)

    def heads(self, rank, size):
        return Span.even(N, rank, size, f"{self.prefix}, heads")

    def shares(self, rank, size):
        self.heads(rank, size)
        return ()

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """hidden: [T, H], of one request.  Returns [T, H]."""
        inner = self.in_proj(hidden).unflatten(-1, (-1, D)) * (-self.A_log.exp()).exp()[:, None]
        out = self.out_proj(inner.flatten(1)) + self.skip * hidden
        return self.conv1d(nn.functional.pad(out.t(), (TAPS - 1, 0))).t()


class Formula(nn.Module):
    """The same by the plain formula, in the place of transformers' attention."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def forward(self, hidden_states, **_):
        t = self.tensors
        x = hidden_states[0]
        inner = (x @ t["in_proj.weight"].t()) * torch.exp(-torch.exp(t["A_log"])).repeat_interleave(D)
        out = inner @ t["out_proj.weight"].t() + t["skip"] * x
        taps = t["conv1d.weight"][:, 0]  # [H, TAPS]
        padded = torch.cat((torch.zeros(TAPS - 1, H), out))
        return sum(padded[i : i + len(out)] * taps[:, i] for i in range(TAPS)).unsqueeze(0), None


@pytest.fixture
def family(monkeypatch):
    """Llama as a family whose second layer is of the new kind."""

    def make_attention(self, index, prefix, quant_config):
        if index == 1:
            return Decaying(prefix, quant_config)
        return SelfAttention(self.config, index, prefix=prefix, quant_config=quant_config)

    monkeypatch.setattr(Model, "make_attention", make_attention)


def written(folder, change=None):
    """A checkpoint of that family, and transformers' model of the same weights."""
    checkpoint = write_checkpoint(folder, "llama")
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(f"{NEW}.")}
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    own = {
        "A_log": noise(N) * 0.5,
        "skip": noise(H),
        "conv1d.weight": noise(H, 1, TAPS) * 0.5,
        "in_proj.weight": noise(N * D, H) * H**-0.5,
        "out_proj.weight": noise(H, N * D) * (N * D) ** -0.5,
    }
    checkpoint.model.model.layers[1].self_attn = Formula(own)
    tensors |= {f"{NEW}.{name}": tensor for name, tensor in own.items()}
    if change is not None:
        change(tensors)
    save_tensors(folder, tensors)
    checkpoint.__dict__.pop("tensors")
    return checkpoint


def load(folder, *rules):
    return load_model(folder, list(rules) or None, device="cpu", dtype="float32")


@pytest.mark.parametrize("size", (1, 2))
def test_a_new_kind_of_layer_is_loaded_on_every_rank(tmp_path, family, size):
    checkpoint = written(tmp_path)
    expected = checkpoint.logits()

    def work(_):
        model = load(tmp_path)
        return logits_of(model, checkpoint.ids), model.load_report, model.model.layers[1].self_attn.A_log

    for rank, (logits, report, a_log) in enumerate(simulate(size, work)):
        assert relative_error(logits, expected) <= 1e-5
        assert {r.name for r in report.tensors if r.status == "loaded"} == set(checkpoint.tensors)
        share = N // size
        stored = checkpoint.tensors[f"{NEW}.A_log"]
        assert torch.equal(a_log, stored[rank * share : (rank + 1) * share])


@pytest.mark.parametrize("size", (1, 2))
def test_its_bytes_are_counted(tmp_path, family, size):
    checkpoint = written(tmp_path)
    with Parallel(size=size):
        planned = pymllm.plan(tmp_path, device="cpu", dtype="float32")
    rows = {row.prefix: row for row in planned.layers}
    assert {f"{NEW}.in_proj", f"{NEW}.out_proj"} < set(rows)
    assert rows[f"{NEW}.in_proj"].shape_local == [N * D // size, H]
    plain = {name: t.nbytes for name, t in checkpoint.tensors.items() if name.rpartition(".")[0] not in rows}
    assert {f"{NEW}.A_log", f"{NEW}.skip", f"{NEW}.conv1d.weight"} < set(plain)
    plain[f"{NEW}.A_log"] //= size
    assert planned.totals["weight_bytes"] == sum(row.bytes for row in rows.values()) + sum(plain.values())
    loaded = simulate(size, lambda _: load(tmp_path).load_report.final_bytes)
    assert loaded[0] == planned.totals["weight_bytes"]


def test_it_says_which_sizes_divide_it(tmp_path, family):
    """Four ranks divide everything but its six heads."""
    written(tmp_path)
    parallel = pymllm.plan(tmp_path, device="cpu").tensor_parallel
    assert parallel["legal_sizes"] == [1, 2]
    assert f"{NEW}, heads" in parallel["refused_sizes"]["4"]


def test_layers_of_one_kind_are_asked_for_their_sizes_one_by_one(tmp_path, family, monkeypatch):
    """A layer that says nothing of its likeness is like no other."""
    written(tmp_path)
    asked = []
    monkeypatch.setattr(WeightHolder, "shares", lambda self, rank, size: asked.append(self) or ())
    model = prepare(tmp_path, device="cpu").model
    pymllm.loading.tensor_parallel.legal_tp_sizes(model)
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert len(norms) == 5 and set(norms) < set(asked)


@pytest.mark.parametrize("name", ("A_log", "skip", "conv1d.weight", "in_proj.weight", "out_proj.weight"))
def test_what_its_checkpoint_lacks_or_has_too_much_is_reported(tmp_path, family, name):
    full = f"{NEW}.{name}"

    def missing(tensors):
        tensors[f"{NEW}.more"] = tensors.pop(full)

    written(tmp_path / "missing", missing)
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load(tmp_path / "missing")
    assert all(
        f"{stem}: {text}" in str(caught.value) for stem, text in ((full, "miss"), (f"{NEW}.more", "unexp"))
    )

    written(tmp_path / "shape", lambda tensors: tensors.update({full: torch.zeros(3, 5, 7)}))
    with pytest.raises(CheckpointError, match=r"found \[3, 5, 7\]") as caught:
        load(tmp_path / "shape")
    assert full in str(caught.value)

    written(tmp_path / "dtype", lambda tensors: tensors.update({full: tensors[full].to(torch.int32)}))
    with pytest.raises(CheckpointError, match="int32") as caught:
        load(tmp_path / "dtype")
    assert full in str(caught.value)


def test_the_linear_layers_in_it_are_verified_and_follow_rules_and_swaps(tmp_path, family):
    checkpoint = written(tmp_path)
    model = load(tmp_path, "**.in_proj=int8")
    report = verify(model)
    assert report.ok
    checked = {layer.prefix: layer.method for layer in report.layers}
    assert "int8" in checked[f"{NEW}.in_proj"] and "int8" not in checked[f"{NEW}.out_proj"]
    before = logits_of(model, checkpoint.ids)
    assert 1e-4 < relative_error(before, checkpoint.logits()) < 0.1
    swap = pymllm.swap(model, "**.out_proj", "int8")
    assert swap.changed == [f"{NEW}.out_proj"] and verify(model).ok
    assert not torch.equal(logits_of(model, checkpoint.ids), before)
    swap.undo()
    assert torch.equal(logits_of(model, checkpoint.ids), before)


def test_a_verified_layer_in_it_can_fail(tmp_path, family):
    """Otherwise the test above would say nothing."""
    written(tmp_path)
    model = load(tmp_path)
    next(iter(model.model.layers[1].self_attn.out_proj.bound.packed.values())).mul_(1.5)
    report = verify(model)
    assert [layer.prefix for layer in report.layers if not layer.ok] == [f"{NEW}.out_proj"]


def test_a_quantised_checkpoint_of_it_is_written(tmp_path, family):
    checkpoint = written(tmp_path / "m")
    pymllm.quantize_checkpoint(tmp_path / "m", tmp_path / "out", {"**.out_proj": "int8"}, progress=False)
    model = load(tmp_path / "out")
    assert torch.equal(model.model.layers[1].self_attn.A_log, checkpoint.tensors[f"{NEW}.A_log"])
    expected = logits_of(load(tmp_path / "m", "**.out_proj=int8"), checkpoint.ids)
    assert relative_error(logits_of(model, checkpoint.ids), expected) <= 1e-5


# --- what is recorded of a model is stale after a change


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models that have every kind of holder, among them a layer whose parts have different methods."""
    folder = tmp_path_factory.mktemp("holders")
    tied = write_checkpoint(folder / "llama", "llama", tie_word_embeddings=True)
    experts = write_moe(folder / "qwen2_moe", "qwen2_moe")
    return load(tied.folder, "**.q_proj=int8"), load(experts.folder)


def test_putting_a_state_in_place_is_a_revision(models):
    seen = set()
    for model in models:
        for name, holder in weight_holders(model):
            state = holder.packed_state()
            if state is None:
                continue
            seen.add((type(holder).__name__, holder.split))
            assert state.same_as(holder.packed_state()) and state.layer is holder
            before = RevisedModule.revision
            state.install()
            assert RevisedModule.revision > before, name
            assert holder.packed_state().same_as(state), name
    assert seen == {
        *(("QKVParallelLinear", True), ("QKVParallelLinear", False), ("MergedColumnParallelLinear", False)),
        *(("RowParallelLinear", False), ("VocabParallelEmbedding", False), ("ParallelLMHead", False)),
        *(("RouterLinear", False), ("Experts", False)),
    }


def test_asking_is_no_revision(models):
    for model in models:
        binder = Binder(model.prepared.execution)
        before = RevisedModule.revision
        for name, holder in weight_holders(model):
            for question in (
                "parts",
                "held",
                "methods",
                "likeness",
                "kept_bytes",
                "loaded_bytes",
                "packed_state",
            ):
                getattr(holder, question)()
            list(holder.places(name))
            list(holder.shares(0, 1))
            list(holder.describe(binder))
            list(holder.selections(binder))
        assert RevisedModule.revision == before


def test_setting_what_a_new_kind_of_layer_has_is_a_revision(tmp_path, family):
    layer = load(written(tmp_path).folder).model.layers[1].self_attn
    before = RevisedModule.revision
    layer.out_proj = layer.out_proj
    assert RevisedModule.revision > before


@pytest.mark.skipif(not extension.native_available(), reason=str(extension.native_missing_reason()))
def test_a_step_that_was_recorded_with_other_experts_is_not_played(tmp_path):
    folder = write_moe(tmp_path, "qwen2_moe").folder
    greedy = pymllm.SamplingParams(max_tokens=24, ignore_eos=True)
    prompt = [[5, 6, 7]]

    def made():
        return pymllm.LLM(folder, {"**.experts.**": "int8"}, device="cpu", dtype="float32")

    def answer(llm):
        return llm.generate(prompt, greedy)[0].token_ids

    def tapes(llm):
        return [batch.replay for batch in llm.engine.runner._decoding.values()]

    llm, fresh = made(), made()
    before = answer(llm)
    (recorded,) = tapes(llm)
    assert recorded is not None
    swap, other = (pymllm.swap(one, "**.experts.**", "int4:group_size=32") for one in (llm, fresh))
    assert answer(llm) == answer(fresh) != before
    assert recorded not in tapes(llm)
    swap.undo()
    assert answer(llm) == before
    other.commit()


# --- every model answers completely

CASES = [(family, fmt) for family in FAMILIES for fmt in ("none", "awq-g32")]
CASES += [(family, fmt) for family in MOE_FAMILIES for fmt in ("none", "awq-g32") if family != "gpt_oss"]
CASES += [("gpt_oss", "none"), ("gpt_oss", "mxfp4")]
CASES += [(family, "none") for family in BLOCK_FAMILIES] + [("llada2_moe", "awq-g32")]


def test_every_model_type_is_a_case():
    encoders = {"bert", "roberta", "xlm_roberta", "modernbert"}  # in tests/embedding
    assert {family for family, _ in CASES} | encoders == set(list_model_types())


@pytest.mark.parametrize("family, fmt", CASES)
def test_every_tensor_has_one_place_and_every_weight_one_name(tmp_path, family, fmt):
    write = write_blocks if family in BLOCK_FAMILIES else write_moe
    checkpoint = (write_checkpoint if family in FAMILIES else write)(tmp_path, family, fmt)
    prepared = prepare(tmp_path, device="cpu", dtype="float32")
    holders, tensors = list(weight_holders(prepared.model)), checkpoint.tensors.keys()
    slots = [place.slot for name, holder in holders for place in holder.places(name)]
    found = Counter(name for slot in slots for name in set(slot.names) & tensors)
    assert found == Counter(tensors)
    assert len(slots) == len(found), "every slot has one tensor"
    parts = [part.name for _, holder in holders for part in holder.parts()]
    assert parts and len(parts) == len(set(parts))
    binder = Binder(prepared.execution)
    rows = [row for _, holder in holders for row in holder.describe(binder)]
    assert sorted(row.name for row in rows if row.kind not in ("attention", "recurrence")) == sorted(parts)
    stored = {part.stored for _, holder in holders for part in holder.parts()}
    assert all(any(name.startswith(stem) for name in found) for stem in stored)


@pytest.mark.parametrize("family, plain", (("llama", 0), ("gpt_oss", 2)))
def test_the_holders_of_a_model_are_the_same_after_loading(tmp_path, family, plain):
    """plain: how many modules have plain parameters and are no holders themselves: the attention blocks with sinks."""
    folder = (write_checkpoint if family in FAMILIES else write_moe)(tmp_path, family).folder
    before = [(name, type(holder)) for name, holder in weight_holders(prepare(folder, device="cpu").model)]
    assert sum(kind is PlainParameters for _, kind in before) == plain
    assert [(name, type(holder)) for name, holder in weight_holders(load(folder))] == before
