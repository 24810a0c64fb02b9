"""Models with experts: logits equal transformers' own on the same (dequantised) weights, in float32."""

# T tokens, V vocabulary

from __future__ import annotations

import pytest

import pymllm

from ..checkpoints import relative_error
from ..moe_checkpoints import FAMILIES, write_moe

# Both sides compute in float32; two layers of other summation orders leave some 1e-6.
TOLERANCE = 1e-5
FORMATS = ("none", "none-bf16", "awq-g32", "fp8-block", "mxfp4", "ct-channel")


def logits_of(checkpoint, **options):
    options = {"device": "cpu", "dtype": "float32"} | options
    return pymllm.LLM(checkpoint.folder, **options).logits(checkpoint.ids.tolist())


def assert_equal_to_transformers(checkpoint, **options):
    assert relative_error(logits_of(checkpoint, **options), checkpoint.logits()) <= TOLERANCE


# gpt-oss has its experts in floats or MXFP4.
CASES = [
    (f, fmt) for f in FAMILIES for fmt in FORMATS if f != "gpt_oss" or fmt in ("none", "none-bf16", "mxfp4")
]


@pytest.mark.parametrize("family, fmt", CASES)
def test_logits_equal_transformers(tmp_path, family, fmt):
    assert_equal_to_transformers(write_moe(tmp_path / "m", family, fmt, shards=2))
