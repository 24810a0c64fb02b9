"""How far `**` reaches in models of transformers: fused experts, scaled embeddings, and a reason for all that stays."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pymllm
from pymllm.errors import ConfigError, RuleError
from pymllm.kernels import registry
from pymllm.modules.experts import QuantizedExperts
from pymllm.modules.layers import QuantizedEmbedding, QuantizedLinear, QuantizedStack, quantized_layers
from pymllm.quantization import experts as quantization_experts

from ..checkpoints import random_model

IDS = torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(7))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GDN = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(
        **SIZES, head_dim=16, rotary_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SIZES,
        **MAMBA,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **SIZES,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZES, **GDN),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**SIZES, **GDN),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "gemma3n_text": lambda: transformers.Gemma3nTextConfig(
        **SIZES,
        head_dim=16,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **SIZES,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=48,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **{name: size for name, size in SIZES.items() if name != "num_attention_heads"},
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
        layers_block_type=["mamba", "moe", "attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=8,
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
TRANSPOSED = {"llama4_text", "gpt_oss"}  # whose stacks are [E, inputs, outputs]
INTERLEAVED = {"gpt_oss"}


@functools.cache
def _made(family: str) -> nn.Module:
    return random_model(CONFIGS[family]())


def made(family: str) -> nn.Module:
    return copy.deepcopy(_made(family))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def with_decoded_weights(family: str, quantised: nn.Module) -> nn.Module:
    """The model of transformers with each weight replaced by what the quantised one decodes."""
    plain = made(family)
    with torch.no_grad():
        stacks = [name for name, module in quantised.named_modules() if isinstance(module, QuantizedStack)]
        for name, module in quantised.named_modules():
            if any(name.startswith(f"{stack}.experts.") for stack in stacks):
                continue
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                own = plain.get_submodule(name).weight
                own.copy_(
                    module.weight.t()
                    if type(plain.get_submodule(name)).__name__ == "Conv1D"
                    else module.weight
                )
            if isinstance(module, QuantizedStack):
                plain.get_submodule(name).weight.copy_(module.weight)
            elif isinstance(module, QuantizedExperts):
                for stack in module.facts.names:
                    getattr(plain.get_submodule(name), stack).copy_(getattr(module, stack))
    return plain


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_runs_in_int8_or_has_a_row_with_its_reason(family):
    plain, model = made(family), made(family)
    pymllm.quantize_model(model, ["**=int8"], compute="exact")
    report = model.quantization
    matrices = {name: p for name, p in plain.named_parameters() if p.ndim > 1}
    total = sum(p.numel() for p in matrices.values())
    left = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    assert 1 - sum(p.numel() for p in left.values()) / total >= 0.95
    # What the rows say is what is so.
    assert report.share == pytest.approx(1 - sum(p.numel() for p in left.values()) / total)
    rows = {row.prefix: row for row in report.unreached}
    assert all(row.reason and row.bytes_after == row.bytes_before for row in rows.values())
    assert {name for name in left if name not in rows and name.removesuffix(".weight") not in rows} == set()
    assert sum(row.parameters for row in report) == total
    assert all(row.method == "int8" or row.method.startswith("int8") for row in report)
    assert f"{report.share:.2%}" in str(report) and all(row.prefix in str(report) for row in report)
    # And it computes what transformers computes with the weights that were packed.
    expected = logits(with_decoded_weights(family, model))
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert 0.9 < float(torch.cosine_similarity(expected.flatten(), logits(plain).flatten(), dim=0)) < 1 - 1e-9


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


def test_rules_name_stacks_and_their_module_and_the_first_one_wins():
    def methods(rules: list[str]) -> list[str]:
        model = pymllm.quantize_model(made("mixtral"), rules)
        named = [row for row in model.quantization if row.replaced and "layers.0" in row.prefix]
        return [row.method.split()[0] for row in named]

    assert methods(["**.mlp.experts=int8"]) == ["int8", "int8"]
    assert methods(["**.experts.down_proj=fp8", "**.mlp.experts=int8"]) == ["int8", "fp8"]
    assert methods(["**.experts=int8", "**.layers.**=fp8"]) == ["fp8"] * 4 + ["int8"] * 2
    with pytest.raises(RuleError, match="never applies"):
        pymllm.quantize_model(made("mixtral"), ["**.experts=int8", "**.experts.down_proj=fp8"])
    assert methods(["**.experts=none", "**.layers.**=fp8"]) == ["fp8"] * 4
    with pytest.raises(RuleError, match=r"experts\.down_proj"):
        pymllm.quantize_model(made("mixtral"), ["model.layers.0.mlp.experts.down_prj=int8"])


@pytest.mark.parametrize(
    ("family", "rule", "needles"),
    [
        (
            "minimax_m2",
            "**.mlp.gate=int8",
            ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "TopKRouter"],
        ),
        ("qwen3_next", "**.conv1d=int8", ["linear_attn.conv1d", "Conv1d"]),
        ("llama4_text", "model.layers.1.feed_forward.router=int8", ["a forward of its own", "tuple"]),
    ],
)
def test_a_rule_that_names_what_cannot_be_changed_is_one_error_that_lists_it(family, rule, needles):
    model = made(family)
    with pytest.raises(RuleError) as caught:
        pymllm.quantize_model(model, ["lm_head=int8", rule])
    assert all(needle in str(caught.value) for needle in needles)
    assert "=none" in str(caught.value) and "`**`" in str(caught.value)
    assert not list(quantized_layers(model)) and not hasattr(model, "quantization")
    pymllm.quantize_model(model, [rule.replace("int8", "none"), "**=int8"])
    assert not any(needles[0] in row.prefix for row in model.quantization)


def test_a_shape_that_a_method_cannot_pack_is_a_row_or_an_error_as_the_rule_says():
    model = nn.ModuleDict({"wide": nn.Linear(96, 8), "narrow": nn.Linear(40, 8)})
    with pytest.raises(ConfigError, match=r"narrow .*groups of 32"):
        pymllm.quantize_model(model, {"*": "int4:group_size=32"})
    pymllm.quantize_model(model, {"**": "int4:group_size=32"})
    assert [(row.prefix, row.replaced) for row in model.quantization] == [("narrow", False), ("wide", True)]
    assert model.quantization.share == pytest.approx(96 / 136)
    with pytest.raises(ConfigError, match="groups of 64"):  # nothing at all would change
        pymllm.quantize_model(nn.ModuleDict({"a": nn.Linear(40, 8)}), {"**": "int4:group_size=64"})


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Spelt(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class Masked(nn.Embedding):
    """A table of which one row, and only that, is not what it holds."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).masked_fill((ids == 71_003).unsqueeze(-1), 0.0)


class Times(nn.Embedding):
    factor = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


def test_a_forward_of_its_own_is_replaced_only_where_it_is_proven_to_be_the_same():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "doubled": Doubled(32, 8),
            "spelt": Spelt(32, 8),
            "masked": Masked(80_000, 8),
            "times": Times(96, 32),
        }
    )
    x, ids = torch.randn(3, 32), torch.arange(96)
    expected = {"spelt": model["spelt"](x), "times": model["times"](ids)}
    pymllm.quantize_model(model, {"**": "int8"}, compute="exact")
    assert {row.prefix: row.replaced for row in model.quantization} == {
        "doubled": False,
        "masked": False,
        "spelt": True,
        "times": True,
    }
    assert all("forward of its own" in str(row.reason) for row in model.quantization.unreached)
    torch.testing.assert_close(model["spelt"](x), expected["spelt"], rtol=0.02, atol=0.02)
    torch.testing.assert_close(model["times"](ids), expected["times"], rtol=0.02, atol=0.05)
    assert torch.equal(model["times"](ids), 3 * model["times"].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_embedding_rounds_its_scale_as_the_module_did(dtype):
    model = made("gemma3n_text").to(dtype)
    plain = copy.deepcopy(model)
    pymllm.quantize_model(
        model, {"**.embed_tokens": "int8", "**.embed_tokens_per_layer": "int8"}, dtype=dtype
    )
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        found, own = model.model.get_submodule(name), plain.model.get_submodule(name)
        assert isinstance(found, QuantizedEmbedding)
        assert found.padding_idx == own.padding_idx
        own.weight.data.copy_(found.weight)
        assert torch.equal(found(IDS), own(IDS))


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


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 96, (4, 16), generator=generator) for _ in range(count)]


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
