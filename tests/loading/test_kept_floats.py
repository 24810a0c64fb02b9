"""Float32 arithmetic over weights that stay in the checkpoint's 16 bits: the same values in half the memory."""

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.kernels.native import extension
from pymllm.kernels.native.float_linear import FAST_PATHS

from ..checkpoints import Plain, write_checkpoint

pytestmark = pytest.mark.skipif(
    not extension.native_available() or extension.probe().best_path not in FAST_PATHS,
    reason="no kernel here widens 16-bit weights faster than torch multiplies float32 ones",
)


@pytest.fixture(scope="module", params=(torch.float16, torch.bfloat16), ids=str)
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("narrow"), fmt=Plain(request.param))


@pytest.fixture
def folder(checkpoint):
    return checkpoint.folder


def test_weights_stay_as_stored_and_answers_are_those_of_float32_weights(checkpoint, folder):
    kept = pymllm.LLM(folder, dtype="float32")
    widened = pymllm.LLM(folder, dtype="float32", kernels={"linear": "torch"})
    assert {layer.kernel for layer in kept.plan.layers if layer.kind == "linear"} == {"native_bf16"}
    assert {layer.kernel for layer in widened.plan.layers if layer.kind == "linear"} == {"torch"}
    ids = list(range(2, 40))
    with torch.no_grad():
        expected = checkpoint.model(torch.tensor([ids])).logits[0]
    for llm in (kept, widened):
        assert torch.allclose(llm.logits(ids), expected, rtol=1e-5, atol=1e-5)
    half, whole = (
        sum(layer.bytes for layer in llm.plan.layers if layer.kind == "linear") for llm in (kept, widened)
    )
    assert whole == 2 * half
    assert pymllm.verify(folder, dtype="float32").ok


def test_a_swap_there_and_back_restores_them_bit_for_bit(folder):
    llm = pymllm.LLM(folder, dtype="float32")
    ids = list(range(2, 40))
    before = llm.logits(ids)
    swapped = pymllm.swap(llm, "**.mlp.**", "int8")
    assert not torch.equal(llm.logits(ids), before)
    swapped.undo()
    assert torch.equal(llm.logits(ids), before)


def test_rules_convert_them_as_they_convert_wide_ones(folder):
    rules = {"**.mlp.**": "int8", "model.layers.0.**": "none"}
    kept = pymllm.LLM(folder, rules, dtype="float32")
    widened = pymllm.LLM(folder, rules, dtype="float32", kernels={"linear": "reference"})
    ids = list(range(2, 40))
    assert torch.allclose(kept.logits(ids), widened.logits(ids), rtol=1e-4, atol=1e-4)


def test_an_adapter_keeps_its_own_precision(folder):
    llm = pymllm.LLM(folder, dtype="float32")
    layer = llm.model.model.layers[0].self_attn.qkv_proj
    layer.init_lora(4, 8.0)
    assert {p.dtype for name, p in layer.named_parameters() if "lora" in name.lower()} <= {torch.float32}
