"""How far `**` reaches in models of transformers: fused experts, scaled embeddings, and a reason for all that stays."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymllm
from pymllm.errors import ConfigError, RuleError
from pymllm.modules.experts_job import ExpertsJob
from pymllm.modules.jobs import MatrixJob
from pymllm.modules.layers import QuantizedEmbedding, quantized_layers

from ..checkpoints import random_model
from .foreign_models import CONFIGS, IDS, logits, made, with_decoded_weights


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
    assert [(row.prefix, row.replaced) for row in model.quantization] == [("wide", True), ("narrow", False)]
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


@pytest.mark.parametrize("calibrated", [False, True])
def test_floats_of_a_module_are_freed_before_the_next_one_is_packed(calibrated, monkeypatch):
    model = random_model(CONFIGS["mixtral"]())
    held = [weakref.ref(weight) for weight in model.parameters() if weight.ndim > 1]
    alive: list[int] = []

    def counted(make: Any) -> Any:
        def replacement(job: Any, other: Any) -> Any:
            alive.append(sum(weight() is not None for weight in held))
            return make(job, other)

        return replacement

    for kind in (MatrixJob, ExpertsJob):
        monkeypatch.setattr(kind, "replacement", counted(kind.replacement))
    pymllm.quantize_model(model, {"**": "int8"}, [IDS] if calibrated else None)
    assert alive[0] == len(held)
    assert all(later < earlier for earlier, later in itertools.pairwise(alive))
    assert sum(weight() is not None for weight in held) == 2  # the routers'


def test_a_second_call_goes_on_with_the_same_report():
    model = made("mixtral")
    pymllm.quantize_model(model, {"**.layers.0.**": "int8"})
    first = model.quantization.share
    pymllm.quantize_model(model, {"**": "fp8"})
    assert len({row.prefix for row in model.quantization}) == len(model.quantization)
    assert first < 0.5 < 0.95 < model.quantization.share <= 1
    assert model(input_ids=IDS).logits.isfinite().all()


def test_layers_take_their_argument_by_the_name_that_the_module_had():
    model = pymllm.quantize_model(made("gpt2"), {"**": "int8"})
    layer, table = model.transformer.h[0].mlp.c_fc, model.transformer.wte
    x = torch.randn(3, 64)
    assert torch.equal(layer(x=x), layer(x)) and torch.equal(table(input=IDS), table(IDS))
