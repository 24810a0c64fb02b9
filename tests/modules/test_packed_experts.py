"""Experts that `quantize_model` packed: layouts, state dicts, casts, kernels, calibration."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

import pymllm
from pymllm.kernels import registry
from pymllm.modules.experts import QuantizedExperts
from pymllm.quantization import experts as quantization_experts

from .foreign_models import IDS, TRANSPOSED, batches, logits, made, with_decoded_weights


@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "gpt_oss", "nemotron_h", "jetmoe"])
def test_stacks_decode_to_within_half_a_step_of_the_floats_in_the_modules_own_layout(family):
    plain, model = made(family), pymllm.quantize_model(made(family), {"**": "int8"})
    stacks = 0
    for name, own in plain.named_parameters():
        if own.ndim != 3 or "conv" in name:
            continue
        parent, _, stack = name.rpartition(".")
        found = getattr(model.get_submodule(parent), stack)
        along = 1 if family in TRANSPOSED else 2
        step = own.detach().abs().amax(along, keepdim=True) / 127
        assert bool(((found - own).abs() <= 0.51 * step + 1e-3 * own.abs()).all())
        stacks += 1
    assert stacks >= 2


def test_experts_that_no_rule_rounds_are_exact_in_their_own_kernel():
    # A rule for one product packs both: the other keeps its floats.
    plain, model = made("mixtral"), made("mixtral")
    pymllm.quantize_model(model, {"**.experts.gate_up_proj": "int8"}, compute="exact")
    assert [row.prefix.rpartition(".")[2] for row in model.quantization] == ["gate_up_proj"] * 2
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    assert torch.equal(experts.down_proj, plain.model.layers[0].mlp.experts.down_proj)
    assert not torch.equal(experts.gate_up_proj, plain.model.layers[0].mlp.experts.gate_up_proj)
    expected = logits(with_decoded_weights("mixtral", model))
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("family", "method"), [("gpt_oss", "int4:group_size=32"), ("mixtral", "fp8"), ("jetmoe", "int8")]
)
def test_a_state_dict_restores_the_experts_of_another_model(family, method, tmp_path):
    model, other = made(family), made(family)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(-0.5)
    for each in (model, other):
        pymllm.quantize_model(each, {"**": method})
    expected = logits(model)
    assert not torch.equal(logits(other), expected)
    save_file({k: t.clone().contiguous() for k, t in model.state_dict().items()}, tmp_path / "s.safetensors")
    other.load_state_dict(load_file(tmp_path / "s.safetensors"), strict=True)
    assert torch.equal(logits(other), expected)
    third = pymllm.quantize_model(made(family), {"**": "int8" if method == "fp8" else "fp8"})
    with pytest.raises(RuntimeError, match=r"experts.*is not this layer's"):
        third.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kernel", ["reference", "linear"])
def test_experts_packed_for_one_kernel_are_read_by_another(kernel, monkeypatch):
    rules = {"**.experts": "int8"}
    fast = pymllm.quantize_model(made("gpt_oss"), rules)
    with monkeypatch.context() as patch:
        patch.setattr(
            quantization_experts, "select", lambda op, problem, _: registry.select(op, problem, kernel)
        )
        slow = made("gpt_oss")
        with torch.no_grad():
            for param in slow.parameters():
                param.mul_(0.5)
        pymllm.quantize_model(slow, rules)
        slow.load_state_dict(fast.state_dict(), strict=True)
    experts = [model.model.layers[0].mlp.experts for model in (fast, slow)]
    assert experts[1].bound.selection.kernel.name == kernel
    assert torch.equal(experts[0].gate_up_proj, experts[1].gate_up_proj)
    fast.load_state_dict(slow.state_dict(), strict=True)
    assert torch.equal(experts[0].down_proj, experts[1].down_proj)


def test_casting_moves_biases_and_repacks_the_experts():
    model = pymllm.quantize_model(made("gpt_oss"), {"**": "int8"})
    before, expected = model.model.layers[0].mlp.experts.down_proj, logits(model)
    clone = copy.deepcopy(model)
    model.to(torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    assert experts.bound.problem.dtype is torch.bfloat16 and experts.down_proj_bias.dtype is torch.bfloat16
    assert float(torch.cosine_similarity(logits(model).float().flatten(), expected.flatten(), dim=0)) > 0.99
    model.float()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)
    assert torch.equal(logits(clone), expected)


def test_generation_runs_the_packed_experts():
    model = made("mixtral")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    pymllm.quantize_model(model, {"**": "int8"}, compute="exact")
    plain = with_decoded_weights("mixtral", model)
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


class OwnExperts(nn.Module):
    """Experts as nobody else has them: names, sizes, activation and the order of arguments of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(6, 32, 96) * 32**-0.5)
        self.out_of = nn.Parameter(torch.randn(6, 32, 48) * 48**-0.5)

    def forward(self, tokens: Tensor, how_much: Tensor, which: Tensor) -> Tensor:
        first = torch.einsum("th,tkhi->tki", tokens, self.into[which])
        gate, up = first[..., ::2], first[..., 1::2]
        answers = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * up, self.out_of[which])
        return (answers * how_much.unsqueeze(-1)).sum(1)


def test_experts_of_any_module_are_found_by_their_shapes_and_a_proof():
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": OwnExperts()})
    x, ids, weights = (
        torch.randn(9, 32),
        torch.stack([torch.randperm(6)[:2] for _ in range(9)]),
        torch.rand(9, 2),
    )
    plain = copy.deepcopy(model)
    pymllm.quantize_model(model, {"**": "int8"}, compute="exact")
    assert [row.prefix for row in model.quantization] == ["experts.into", "experts.out_of"]
    assert model.quantization.share == 1
    with torch.no_grad():
        plain["experts"].into.copy_(model["experts"].into)
        plain["experts"].out_of.copy_(model["experts"].out_of)
        expected = plain["experts"](x, weights, ids)
    torch.testing.assert_close(model["experts"](x, weights, ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model["experts"](x, which=ids, how_much=weights), expected, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(TypeError, match="which"):
        model["experts"](x, weights)


@torch.no_grad()
def test_a_clamp_that_kernels_do_not_have_runs_between_two_products():
    config = transformers.DeepseekV4Config(hidden_size=64, moe_intermediate_size=48, n_routed_experts=4)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    plain = nn.ModuleDict({"experts": DeepseekV4Experts(config)})
    for parameter in plain.parameters():
        parameter.normal_(std=0.5)
    model = pymllm.quantize_model(copy.deepcopy(plain), {"**": "int8"}, compute="exact")
    refusals = {refusal.kernel: refusal.why for refusal in model["experts"].bound.selection.refused}
    assert "these have DeepseekV4Experts" in refusals["native_experts"]
    for stack in ("gate_up_proj", "down_proj"):
        plain["experts"].get_parameter(stack).copy_(model["experts"].stack(stack))
    given = (20 * torch.randn(9, 64), torch.arange(18).view(9, 2) % 4, torch.rand(9, 2))
    expected = plain["experts"](*given)
    error = (model["experts"](*given) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-5
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone["experts"](*given), model["experts"](*given))


class Called(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


@pytest.mark.parametrize("method", ["int4:group_size=16", "int8:activations=static"])
def test_an_expert_that_no_token_reaches_is_rounded_by_itself_when_others_are_calibrated(method):
    torch.manual_seed(0)
    plain, fitted = Called(OwnExperts()), Called(OwnExperts())
    fitted.load_state_dict(plain.state_dict())
    x, ids = torch.randn(60, 32), torch.tensor([[0, 1], [1, 2], [2, 0]] * 20)
    pymllm.quantize_model(fitted, {"experts.**": method}, [(x, torch.rand(60, 2), ids)], compute="exact")
    pymllm.quantize_model(plain, {"**": method.partition(":activations")[0]}, compute="exact")
    assert {row.calibration_rows for row in fitted.quantization} == {120}
    mine, own = (model.experts.bound.canonical().products()["down"] for model in (fitted, plain))
    assert torch.equal(mine[5].codes, own[5].codes)
    assert not torch.equal(mine[0].codes, own[0].codes)
    if "static" in method:
        scales = [float(weight.input_scales) for weight in mine]
        assert scales[5] == max(scales) and min(scales) > 0


@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "jetmoe"])
@pytest.mark.parametrize("algorithm", ["gptq", "clip"])
@torch.no_grad()
def test_calibration_reaches_every_expert(family, algorithm):
    rules = {"**.experts.**": "int4:group_size=32", "**.input_linear": "int4:group_size=32"}
    rules.pop("**.experts.**" if family == "jetmoe" else "**.input_linear")
    own, plain, fitted = (made(family) for _ in range(3))
    calls: dict[str, tuple[Any, ...]] = {}
    for name, module in own.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: calls.__setitem__(name, args))
    logits(own)
    pymllm.quantize_model(plain, rules)
    pymllm.quantize_model(fitted, rules, [*batches(6), IDS], algorithm=algorithm)
    assert all(row.calibration_rows > 0 for row in fitted.quantization)
    if family == "mixtral":  # two experts a token, in every layer
        assert {row.calibration_rows for row in fitted.quantization} == {2 * (6 * 64 + 22)}
    # Every layer by itself, on the inputs that it has in floats.
    for row in fitted.quantization:
        name = row.prefix if family == "jetmoe" else row.prefix.rpartition(".")[0]
        expected = own.get_submodule(name)(*calls[name])
        errors = [
            float((model.get_submodule(name)(*calls[name]) - expected).norm()) for model in (plain, fitted)
        ]
        assert errors[1] < 0.97 * errors[0]


def test_static_scales_of_experts_are_the_largest_input_of_each(monkeypatch):
    from pymllm.modules import calibration as module_calibration

    peaks: dict[int, float] = {}
    own = made("mixtral")
    experts = own.model.layers[0].mlp.experts

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for expert in range(4):
            rows = args[0][(args[1] == expert).any(1)]
            peaks[expert] = float(rows.abs().max()) if len(rows) else 0.0

    experts.register_forward_pre_hook(note)
    logits(own)
    monkeypatch.setattr(
        module_calibration, "MOST_BYTES", 3 * 4 * 64 * 64
    )  # experts of one layer in several runs
    model = made("mixtral")
    pymllm.quantize_model(model, {"**.layers.0.**.experts": "int8:activations=static"}, [IDS])
    products = model.model.layers[0].mlp.experts.bound.canonical().products()
    found = {expert: float(products["gate_up"][expert].input_scales) for expert in range(4)}
    assert found == pytest.approx({expert: peak / 127.5 for expert, peak in peaks.items()}, rel=1e-5)
