"""transformers' classes with fused products, norms and gated MLPs of ours: the same numbers, and only where proven."""

# T tokens, H hidden size, I intermediate size

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm import LLM, plan, swap
from pymllm.adapters.loading import load_lora_weights
from pymllm.errors import ConfigError
from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.models.generic.fast import put_fast
from pymllm.models.generic.fused import FusedLinear, FusedPart, Siblings, find_siblings
from pymllm.models.generic.gated import Gated, GenericGatedMLP, find_gated
from pymllm.models.generic.norms import GenericLayerNorm, make_norm
from pymllm.models.generic.probe import Probe
from pymllm.models.generic.rotary import Rotation, halves_are_alike, rotates_halves

from ..adapters.handwritten import random_adapter, with_deltas
from ..checkpoints import FAMILIES, relative_error, write_checkpoint
from ..engine.answers import answers, greedy
from ..forward import TOLERANCE, assert_equal_to_transformers, llm_logits_of
from ..kernels.integer_cases import needs_native
from ..moe_checkpoints import FAMILIES as MOE_FAMILIES
from ..moe_checkpoints import write_moe

THEIRS = {"definition": "transformers"}
PROMPTS = [[5, 6, 7], [9] * 30, [11, 3, 20, 17, 8]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ("none", "awq-g64"))
def test_every_family_with_a_page_runs_as_well_by_transformers_class(tmp_path, family, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", family, fmt)
    assert_equal_to_transformers(checkpoint, **THEIRS)
    notes = plan(checkpoint.folder, device="cpu", **THEIRS).notes
    assert any(note.endswith(f"runs in place of the page {family!r}") for note in notes)


@pytest.mark.parametrize("family", ("mixtral", "qwen2_moe", "deepseek_v3"))
def test_mixtures_run_as_well_by_transformers_class(tmp_path, family):
    assert family in MOE_FAMILIES
    assert_equal_to_transformers(write_moe(tmp_path / "m", family, "awq-g32"), **THEIRS)


def test_a_definition_of_another_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected auto or transformers"):
        LLM(write_checkpoint(tmp_path / "m").folder, definition="theirs")


@pytest.mark.parametrize("fmt", ("awq-g64", "fp8-block", "ct-channel"))
@pytest.mark.parametrize(
    "settings", ({}, {"attention_bias": True, "mlp_bias": True}), ids=("plain", "biases")
)
def test_what_is_called_with_one_tensor_is_one_product(tmp_path, fmt, settings):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt, **settings)
    llm = LLM(checkpoint.folder, device="cpu", dtype="float32", **THEIRS)
    rows = {row.prefix: tuple(row.fused_with) for row in llm.plan.layers}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert rows[f"{attention}.k_proj"] == (f"{attention}.q_proj", f"{attention}.v_proj")
    assert rows[f"{mlp}.up_proj"] == (f"{mlp}.gate_proj",)
    assert isinstance(llm.model.get_submodule(mlp), GenericGatedMLP)
    assert not any(type(module).__name__ == "LlamaRMSNorm" for module in llm.model.modules())
    assert not any("by themselves" in note for note in llm.plan.notes)
    assert relative_error(llm.logits(checkpoint.ids.tolist()), checkpoint.logits()) <= TOLERANCE


def test_a_rule_for_one_part_changes_that_part_alone(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m")
    rules = {"**.k_proj": "int8", "**.up_proj": "int4:group_size=32"}
    ours, theirs = (llm_logits_of(checkpoint, quant=rules, definition=d) for d in ("auto", "transformers"))
    assert relative_error(theirs, checkpoint.logits()) > 1e-4
    assert relative_error(theirs, ours) <= TOLERANCE


def test_a_part_is_swapped_by_its_name(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m")
    llm = LLM(checkpoint.folder, device="cpu", dtype="float32", **THEIRS)
    swap(llm, "**.v_proj", "int8")
    expected = llm_logits_of(checkpoint, quant={"**.v_proj": "int8"})
    assert relative_error(llm.logits(checkpoint.ids.tolist()), expected) <= TOLERANCE


def test_an_adapter_names_the_parts(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m")
    deltas = random_adapter(tmp_path / "a", checkpoint, ("q_proj", "v_proj", "gate_proj", "down_proj"))
    llm = LLM(checkpoint.folder, device="cpu", dtype="float32", **THEIRS)
    load_lora_weights(llm.model, tmp_path / "a")
    expected = with_deltas(checkpoint, deltas)
    assert relative_error(llm.logits(checkpoint.ids.tolist()), expected) <= TOLERANCE


@needs_native
@pytest.mark.parametrize(
    "family, dtype", (("qwen3", "float32"), ("qwen3", "bfloat16"), ("qwen3_moe", "float32"))
)
def test_decoding_steps_are_played_from_a_tape(tmp_path, family, dtype):
    write = write_moe if family in MOE_FAMILIES else write_checkpoint
    llm = LLM(write(tmp_path / "m", family, "awq-g32").folder, device="cpu", dtype=dtype, **THEIRS)
    expected = [answers(llm, [prompt], greedy(2))[0] for prompt in PROMPTS]
    found = answers(llm, PROMPTS, greedy(20))
    assert [answer[:2] for answer in found] == expected
    batches = llm.engine.runner._decoding
    assert batches[3, 1, torch.get_num_threads()].replay is not None
    assert llm.engine.runner.eager_reason is None


@pytest.mark.parametrize("flattened", (False, True))
def test_a_class_that_needs_outputs_without_gaps_gets_them(tmp_path, monkeypatch, flattened):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).view(-1).view(*x.shape[:-1], -1)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    if flattened:
        monkeypatch.setattr(LlamaMLP, "forward", forward)
    checkpoint = write_checkpoint(tmp_path / "m")
    llm = LLM(checkpoint.folder, device="cpu", dtype="float32", **THEIRS)
    products = [module for module in llm.model.modules() if isinstance(module, FusedLinear)]
    assert products and all(product.contiguous is flattened for product in products[:1])
    assert relative_error(llm.logits(checkpoint.ids.tolist()), checkpoint.logits()) <= TOLERANCE


# Parts that are asked for one by one


def fused(contiguous: bool = False) -> tuple[FusedLinear, list[nn.Linear]]:
    torch.manual_seed(0)
    linears = [nn.Linear(8, size, bias=False) for size in (6, 3, 5)]
    layer = FusedLinear(Siblings("block", ("q", "k", "v")), linears, contiguous, None)
    layer.weight.data.copy_(torch.cat([linear.weight for linear in linears]))
    layer.finish()
    return layer, linears


def run(layer: FusedLinear, linears: list[nn.Linear], calls: list[tuple[int, Tensor]]) -> int:
    """Call parts, compare each with its own layer's formula, and return how many products that took."""
    products = []
    layer.register_forward_hook(lambda *_: products.append(1))
    for index, x in calls:
        found = layer.part(index, x)
        expected = x.double() @ linears[index].weight.double().t()
        assert torch.allclose(found.double(), expected, atol=1e-6)
    return len(products)


X, Y = torch.randn(2, 4, 8), torch.randn(2, 4, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    "order, products",
    (
        ([(0, X), (1, X), (2, X)], 1),
        ([(2, X), (0, X), (1, X)], 1),
        ([(0, X), (1, X), (2, X), (0, X)], 2),
        ([(0, X), (0, X), (1, X)], 2),
        ([(0, X), (1, Y), (2, X)], 3),
        ([(0, X), (1, X.clone())], 2),
    ),
)
def test_parts_are_right_in_any_order(order, products):
    assert run(*fused(), order) == products


@torch.no_grad()
def test_a_part_of_a_tensor_that_was_written_to_since_is_computed_anew():
    layer, linears = fused()
    x = X.clone()
    assert run(layer, linears, [(0, x)]) == 1
    x.add_(1)
    assert run(layer, linears, [(1, x), (2, x)]) >= 1


@torch.no_grad()
def test_nothing_is_kept_once_the_last_part_is_taken():
    layer, _ = fused(contiguous=True)
    assert all(layer.part(index, X).is_contiguous() for index in range(3))
    assert not layer._state


def test_the_weight_of_a_part_can_be_read_once_it_is_packed():
    layer, linears = fused()
    for index, linear in enumerate(linears):
        part = FusedPart(layer, index)
        assert torch.equal(part.weight.decoded(), linear.weight)
        assert part.weight.shape == linear.weight.shape and part.bias is None
    unpacked = FusedLinear(Siblings("", ("a", "b")), linears[:1] * 2, False, None)
    assert not hasattr(FusedPart(unpacked, 0), "weight")


class Block(nn.Module):
    """Linear layers, of which one has another bias, and one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)
        self.c, self.d = nn.Linear(8, 4, bias=False), nn.Linear(8, 8)


def test_what_is_not_fused_is_said():
    x, y = torch.empty(1, 8), torch.empty(1, 8)
    block = Block()
    inputs = {"0.a": [x], "0.b": [x], "0.c": [x], "0.d": [x, y]}
    found = Probe(13, inputs=inputs, versions={name: [0] * len(called) for name, called in inputs.items()})
    groups, notes = find_siblings(nn.ModuleList([block]), found, ())
    assert groups == [Siblings("0", ("a", "b"))]
    assert len(notes) == 3
    assert any("0.c: by themselves, as they have biases" in note for note in notes)
    assert any("0.d: by themselves, as they are called several times" in note for note in notes)
    assert find_siblings(nn.ModuleList([block]), found, ("0.a",))[0] == []


def test_a_tensor_written_to_between_two_calls_is_not_one_input():
    x = torch.empty(1, 8)
    found = Probe(13, inputs={"0.a": [x], "0.b": [x]}, versions={"0.a": [0], "0.b": [1]})
    assert find_siblings(nn.ModuleList([Block()]), found, ())[0] == []


# Norms


class Norm(nn.Module):
    """RMSNorm by its formula, with the changes that a case asks for."""

    def __init__(self, kind: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.eps, self.other = kind, eps, 0.5
        self.weight = None if kind == "bare" else nn.Parameter(torch.empty(24, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.kind == "centred":
            values = values - values.mean(-1, keepdim=True)
        normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "bare":
            return normed.to(x.dtype)
        assert self.weight is not None
        if self.kind == "offset":
            return (normed * (1 + self.weight.float())).to(x.dtype)
        if self.kind == "late":
            return (normed * self.weight.float()).to(x.dtype)
        scale = self.other if self.kind == "scaled" else 1
        return self.weight * normed.to(x.dtype) * scale


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("plain", "offset", "late", "bare"))
def test_a_norm_is_recognised_with_its_eps_and_rounding(kind, dtype):
    theirs = Norm(kind).to(dtype) if kind != "bare" else Norm(kind)
    ours = make_norm(theirs, dtype)
    assert ours is not None and ours.eps == 1e-5
    x = torch.randn(3, 5, 16 if kind == "bare" else 24).to(dtype)
    if kind != "bare":
        weight = torch.randn(24).to(dtype)
        theirs.weight = nn.Parameter(weight)
        ours.to_empty(device="cpu").weight.data.copy_(weight)
        ours.finish()
    assert torch.allclose(ours(x).float(), theirs(x).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours(hidden_states=x), ours(x))


def test_a_norm_that_does_more_is_left_alone():
    module = Norm("scaled")
    assert make_norm(module, torch.float32) is None
    assert module.weight.is_meta  # as it was


def test_a_layer_norm_without_a_bias_is_one_operation():
    theirs = Norm("centred")
    ours = make_norm(theirs, torch.float32)
    assert isinstance(ours, GenericLayerNorm) and ours.eps == 1e-5
    theirs.weight = ours.weight = nn.Parameter(torch.randn(24))
    x = torch.randn(3, 5, 24)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_other_modules_are_no_norms():
    others = (nn.LayerNorm(24), nn.SiLU(), nn.Dropout(0.5), nn.Linear(24, 24), nn.Embedding(3, 24))
    assert all(make_norm(module, torch.float32) is None for module in others)


# Gated MLPs


class MLP(nn.Module):
    """A gated MLP by its formula, with the changes that a case asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 12, device="meta"), nn.Linear(12, 8, device="meta")
        if kind == "joined":
            self.up = nn.Linear(8, 24, device="meta")
        else:
            self.gate = nn.Linear(8, 12, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "joined":
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        gate, up = self.gate(x), self.up(x)
        if self.kind == "limited":
            gate = gate.clamp(max=7)
        if self.kind == "tanh":
            return self.down(F.gelu(gate, approximate="tanh") * up)
        if self.kind == "relu":
            return self.down(F.relu(gate) ** 2 * up)
        if self.kind == "reversed":
            return self.down(F.silu(up) * gate)
        return self.down(F.silu(gate) * up) * (0.5 if self.kind == "scaled" else 1)


def seen(names: tuple[str, ...], module: str = "0") -> Probe:
    x = torch.empty(1, 8)
    paths = [f"{module}.{name}" for name in names]
    return Probe(
        13,
        inputs={path: [x] for path in paths},
        versions={path: [0] for path in paths},
        given={path: [1] for path in (module, *paths)},
    )


@pytest.mark.parametrize(
    "kind, expected",
    (
        ("plain", Gated(("gate", "up"), "silu", "down")),
        ("reversed", Gated(("up", "gate"), "silu", "down")),
        ("tanh", Gated(("gate", "up"), "gelu_tanh", "down")),
        ("joined", Gated(("up",), "silu", "down")),
        ("limited", None),
        ("relu", None),
        ("scaled", None),
    ),
)
def test_a_gated_mlp_is_recognised_by_what_a_copy_computes(kind, expected):
    module = MLP(kind)
    names = tuple(module._modules)
    assert find_gated(module, "0", seen(names)) == expected
    assert all(param.is_meta for param in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ("plain", "reversed", "tanh", "joined"))
def test_our_gated_mlp_computes_what_theirs_does(kind):
    theirs = MLP(kind).to_empty(device="cpu")
    for param in theirs.parameters():
        param.copy_(torch.randn(param.shape))
    model = nn.ModuleList([MLP(kind)])
    put_fast(model, seen(tuple(theirs._modules)), (), torch.float32, None)
    ours = model[0].to_empty(device="cpu")
    assert isinstance(ours, GenericGatedMLP)
    first, second = (ours._modules[name] for name in ours.names)
    parts = {"joined": ["up"], "reversed": ["up", "gate"]}.get(kind, ["gate", "up"])
    for name in ("weight", "bias"):
        stored = torch.cat([getattr(theirs._modules[part], name) for part in parts])
        getattr(first, name).data.copy_(stored)
        getattr(second, name).data.copy_(getattr(theirs.down, name))
    for layer in (first, second):
        layer.finish()
    x = torch.randn(2, 3, 8)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_an_mlp_that_is_given_more_than_rows_is_left_alone():
    module = MLP("plain")
    found = seen(tuple(module._modules))
    found.given["0"] = [2]
    assert find_gated(module, "0", found) is None


# Rotations


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def by_halves(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin


def by_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def test_a_function_that_rotates_otherwise_is_left_alone():
    assert rotates_halves(by_halves)
    assert not rotates_halves(by_pairs)
    assert not rotates_halves(lambda q, k, cos, sin: by_halves(q, k, cos, -sin))
    assert not rotates_halves(lambda q, k, cos, sin: by_halves(q, q, cos, sin))
    assert not rotates_halves(lambda q, k: (q, k))


class Angles(nn.Module):
    """Cosines and sines of positions, in like halves or repeated in pairs."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs, self.inv_freq = pairs, torch.tensor([1.0, 0.1, 0.01, 0.001])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * self.inv_freq
        angles = angles.repeat_interleave(2, -1) if self.pairs else torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def test_cosines_whose_halves_differ_are_no_tables_of_ours():
    assert halves_are_alike(nn.ModuleList([Angles(False)]))
    assert not halves_are_alike(nn.ModuleList([Angles(False), Angles(True)]))
    assert not halves_are_alike(nn.ModuleList([nn.Linear(2, 2)]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_rotation_gives_what_the_function_gives_whatever_it_is_called_with(dtype):
    calls = []

    def original(*args, **named):
        calls.append(1)
        return by_halves(*args, **named)

    rotate = Rotation(original, TorchElementwise())
    q, k = (torch.randn(1, 5, heads, 8).to(dtype).transpose(1, 2) for heads in (3, 2))
    for shift in (0, 7):
        cos, sin = (table.to(dtype) for table in Angles(False)(q, torch.arange(5)[None] + shift))
        for found, expected in zip(rotate(q, k, cos, sin), by_halves(q, k, cos, sin), strict=True):
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == (0 if dtype is torch.float32 else 2)
    wide = (x.transpose(1, 2) for x in (q, k))
    for found, expected in zip(
        rotate(*wide, cos, sin, unsqueeze_dim=2), by_halves(q, k, cos, sin), strict=True
    ):
        assert torch.equal(found.transpose(1, 2), expected)


def test_the_class_keeps_its_own_function(tmp_path):
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    checkpoint = write_checkpoint(tmp_path / "m")
    llm = LLM(checkpoint.folder, device="cpu", dtype="float32", **THEIRS)
    attention = llm.model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention.forward.__globals__["apply_rotary_pos_emb"], Rotation)
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == before
