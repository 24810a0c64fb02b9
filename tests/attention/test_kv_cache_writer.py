"""A checkpoint with a KV cache scheme by compressed-tensors itself answers as its own model does."""

from __future__ import annotations

import pytest
import torch

import pymllm

from ..checkpoints import random_model, relative_error, tiny_config

WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("strategy", ("tensor", "attn_head"))
@pytest.mark.parametrize("kind", ("float", "int"))
def test_logits_equal_the_writers_own(tmp_path, kind, strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = random_model(tiny_config("llama"))
    scheme = WEIGHTS | {"type": kind, "strategy": strategy}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        kv_cache_scheme=scheme,
        ignore=["lm_head"],
        quantization_status="initialized",
    )
    apply_quantization_config(model, config)
    largest, generator = 448 if kind == "float" else 127, torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 448)
        for name in ("k_scale", "v_scale"):
            if hasattr(module, name):  # values up to 3 to 5, of a distribution that goes a little further
                scale = getattr(module, name).data
                scale.copy_((3 + 2 * torch.rand(scale.shape, generator=generator)) / largest)
                module.quantization_status = QuantizationStatus.FROZEN
    ids = torch.arange(24) * 3 % 97
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)

    def logits(**options):
        return pymllm.LLM(tmp_path, device="cpu", **options).logits(ids.tolist())

    # A code on a boundary may fall to the other side: see test_kv_cache.py.
    assert relative_error(logits(), expected) <= 2e-3
    assert relative_error(logits(kv_cache="none"), expected) > 5e-3, "rounding must matter"
