"""FP8 under `quant_method: fp8`: scales as the exponents of powers of two, in plain bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError

from ..checkpoints import FP8, relative_error, save_tensors, write_checkpoint
from ..forward import logits_of


@dataclass(frozen=True)
class ExponentBytes(FP8):
    """Scales rounded up to powers of two, and stored as their exponents plus 127 in `dtype`."""

    dtype: torch.dtype = torch.uint8

    def encode(self, weight):
        tensors, _ = super().encode(weight)
        name = "weight_scale_inv" if self.block else "weight_scale"
        exponents = tensors[name].log2().ceil()  # [O/b0, I/b1]
        height, width = self.block or weight.shape
        scales = 2.0 ** exponents.double()
        spread = scales.reshape(-1, 1 if self.block is None else exponents.shape[1])
        spread = spread.repeat_interleave(height, 0).repeat_interleave(width, 1)
        codes = (weight.double() / spread[: weight.shape[0], : weight.shape[1]]).float()
        codes = codes.to(torch.float8_e4m3fn)
        stored = (exponents + 127).to(torch.uint8).view(self.dtype)
        meant = codes.double() * spread[: weight.shape[0], : weight.shape[1]]
        return tensors | {"weight": codes, name: stored}, meant.float()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float8_e8m0fnu), ids=str)
@pytest.mark.parametrize("block", ((128, 128), (64, 32), None), ids=str)
def test_scales_that_are_exponents_in_bytes(tmp_path, block, dtype):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", ExponentBytes(block, dtype=dtype))
    model = pymllm.load_model(checkpoint.folder, dtype="float32", device="cpu")
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5


def test_an_exponent_that_is_no_number_is_refused_by_name(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", ExponentBytes())
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    scales = checkpoint.tensors[name].clone()
    scales[0, 0] = 255
    save_tensors(checkpoint.folder, checkpoint.tensors | {name: scales})
    with pytest.raises(CheckpointError, match="scales of 2 that are NaN") as error:
        pymllm.load_model(checkpoint.folder, device="cpu")
    assert name in str(error.value)


def test_scales_of_weights_that_the_writer_left_in_floats_are_skipped_for_a_reason(tmp_path):
    """transformers stores k_proj so, whose 64 rows blocks of 128 do not divide; the scales are uninitialised memory."""
    names = ("self_attn.k_proj", "self_attn.v_proj")
    checkpoint = write_checkpoint(
        tmp_path / "m", "llama", FP8(static=True), parts=dict.fromkeys(names, "none-bf16")
    )
    wild = {
        f"model.layers.{layer}.{name}.{scale}": value
        for layer in (0, 1)
        for name in names
        for scale, value in (
            ("weight_scale_inv", torch.tensor([[float("nan")]])),
            ("activation_scale", torch.tensor(-1e-4)),
        )
    }
    save_tensors(checkpoint.folder, checkpoint.tensors | wild)
    model = pymllm.load_model(checkpoint.folder, dtype="float32", device="cpu")
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5
    skipped = {r.name: r.reason for r in model.load_report.tensors if r.status == "skipped"}
    assert set(skipped) == set(wild) and "stored in floats" in skipped[next(iter(wild))]
