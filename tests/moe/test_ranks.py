"""Experts over two and four ranks, simulated by threads: shared (TP) or whole (EP), the logits are one rank's."""

from __future__ import annotations

import pytest

from pymllm.loading import load_model
from pymllm.parallel import simulate

from ..checkpoints import relative_error
from ..forward import logits_of
from ..moe_checkpoints import FAMILIES, write_moe

# The ranks' partial sums are added in another order: float32, measured below 1e-6.
TOLERANCE = 1e-5
FORMATS = ("none", "awq-g32", "fp8-block", "mxfp4")
CASES = [(f, fmt) for f in FAMILIES for fmt in FORMATS if f != "gpt_oss" or fmt in ("none", "mxfp4")]


def ranks_logits(folder, ids, size, expert_parallel, **options):
    return simulate(
        size,
        lambda _: logits_of(load_model(folder, device="cpu", dtype="float32", **options), ids),
        expert_parallel=expert_parallel,
    )


@pytest.mark.parametrize("expert_parallel", (False, True), ids=("tp", "ep"))
@pytest.mark.parametrize("family, fmt", CASES)
def test_ranks_give_the_logits_of_one(tmp_path, family, fmt, expert_parallel):
    """Five or six experts on four ranks: two on some, one on others; 24 tokens, and then only one."""
    checkpoint = write_moe(tmp_path / "m", family, fmt)
    for size in (2, 4):
        for ids in (checkpoint.ids, checkpoint.ids[:1]):  # of one token, all ranks but the first have none
            ranks = ranks_logits(checkpoint.folder, ids, size, expert_parallel)
            for rank, logits in enumerate(ranks):
                assert relative_error(logits, checkpoint.logits(ids)) <= TOLERANCE, f"rank {rank} of {size}"
