"""Experts of a running model in another format, and back."""

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.api import load_model
from pymllm.checking.verify import verify
from pymllm.errors import ConfigError, RuleError
from pymllm.moe.experts import Experts

from ..checkpoints import relative_error
from ..forward import logits_of
from ..moe_checkpoints import write_moe


def load(checkpoint, quant=None):
    return load_model(checkpoint.folder, quant, device="cpu", dtype="float32")


def packed(model):
    return [t.clone() for m in model.modules() if isinstance(m, Experts) for t in m.bound.packed.values()]


@pytest.mark.parametrize("family, fmt", (("mixtral", "awq-g32"), ("gpt_oss", "mxfp4"), ("qwen3_moe", "none")))
@pytest.mark.parametrize("method", ("int8", "int4:group_size=32", "fp8:granularity=block"))
def test_swapped_experts_run_as_if_they_were_loaded_so(tmp_path, family, fmt, method):
    checkpoint = write_moe(tmp_path / "m", family, fmt)
    model = load(checkpoint)
    before, tensors = logits_of(model, checkpoint.ids), packed(model)
    swap = pymllm.swap(model, "**.experts.**", method)
    assert swap.changed and all(".experts." in name for name in swap.changed)
    after = logits_of(model, checkpoint.ids)
    assert (
        relative_error(after, logits_of(load(checkpoint, f"**.experts.**={method}"), checkpoint.ids)) <= 1e-6
    )
    assert relative_error(after, before) > 1e-4
    assert verify(model).ok
    swap.undo()
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(packed(model), tensors, strict=True)
    )
    assert torch.equal(logits_of(model, checkpoint.ids), before)


def test_a_pattern_for_everything_takes_the_experts_too_and_leaves_routers(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "qwen2_moe")
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    swap = pymllm.swap(llm, "**", "int8")
    methods = {layer.prefix: layer.method for layer in llm.plan.layers}
    assert methods["model.layers.0.mlp.experts.5.up_proj"] == "int8"
    assert methods["model.layers.0.mlp.gate"] == methods["model.layers.0.mlp.shared_expert_gate"] == "none"
    assert "model.layers.0.mlp.gate" not in (*swap.changed, *swap.unchanged)
    assert pymllm.swap(llm, "**.experts.**", "int8").nothing_to_do


@pytest.mark.parametrize("pattern", ("**.experts.3.**", "**.experts.*.gate_proj"))
def test_some_of_the_experts_alone_are_refused_and_nothing_changes(tmp_path, pattern):
    checkpoint = write_moe(tmp_path / "m", "qwen3_moe")
    model = load(checkpoint)
    before = logits_of(model, checkpoint.ids)
    with pytest.raises(ConfigError, match="swapped together"):
        pymllm.swap(model, pattern, "int8")
    assert torch.equal(logits_of(model, checkpoint.ids), before)
    with pytest.raises(RuleError, match="matches no weight"):
        pymllm.swap(model, "**.experts.77.**", "int8")
