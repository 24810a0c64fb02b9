"""Experts over two and four ranks, simulated by threads: shared (TP) or whole (EP), the logits are one rank's."""

from __future__ import annotations

import pytest

from pymllm.api import load_model
from pymllm.parallel import simulate

from ..checkpoints import relative_error
from ..forward import logits_of
from ..moe_checkpoints import FAMILIES, write_moe

# The ranks' partial sums are added in another order: float32, measured below 1e-6.
TOLERANCE = 1e-5
# test_torchrun has every format for three of the families.
CASES = [(f, fmt) for f in FAMILIES for fmt in ("none", "awq-g32" if f != "gpt_oss" else "mxfp4")]
CASES += [("qwen2_moe", "fp8-block"), ("deepseek_v2", "fp8-block"), ("olmoe", "mxfp4")]


@pytest.mark.parametrize("expert_parallel", (False, True), ids=("tp", "ep"))
@pytest.mark.parametrize("family, fmt", CASES)
def test_ranks_give_the_logits_of_one(tmp_path, family, fmt, expert_parallel):
    """Five or six experts on four ranks: two on some, one on others; 24 tokens, and then only one."""
    checkpoint = write_moe(tmp_path / "m", family, fmt)
    prompts = (checkpoint.ids, checkpoint.ids[:1])  # of one token, all ranks but the first have none
    expected = [checkpoint.logits(ids) for ids in prompts]

    def work(_):
        model = load_model(checkpoint.folder, device="cpu", dtype="float32")
        return [logits_of(model, ids) for ids in prompts]

    for size in (2, 4):
        for rank, found in enumerate(simulate(size, work, expert_parallel=expert_parallel)):
            for logits, want in zip(found, expected, strict=True):
                assert relative_error(logits, want) <= TOLERANCE, f"rank {rank} of {size}"
