"""Real ranks: processes joined by Gloo.  One launch for all models and formats of a size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..checkpoints import relative_error
from ..moe_checkpoints import write_moe
from ..parallel.test_torchrun import free_port, torchrun
from ..processes import SECONDS, environment

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
FORMATS = ("none-bf16", "awq-g32", "fp8-block", "mxfp4")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here"),
    pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is named as Linux does"),
]


def start_ranks(size, script, *arguments):
    """Start the processes, without torchrun, which would end all when one ends."""
    script, port = Path(__file__).with_name(script), str(free_port())
    command = [sys.executable, str(script), *map(str, arguments)]
    ranks = []
    for rank in range(size):
        env = environment(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo",
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(command, env=env, **pipes))
    return ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {
        f"{family}-{fmt}": write_moe(folder / f"{family}-{fmt}", family, fmt)
        for family in FAMILIES
        for fmt in FORMATS
    }


@pytest.mark.parametrize("size", (2, 4))
def test_processes_give_the_logits_of_one(tmp_path, checkpoints, size):
    ids = next(iter(checkpoints.values())).ids[:5]  # of four ranks, one has a single token, or none
    folders = [checkpoint.folder for checkpoint in checkpoints.values()]
    script = Path(__file__).with_name("rank_logits.py")
    done = torchrun(script, tmp_path, json.dumps(ids.tolist()), *folders, ranks=size)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(size):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert len(found) == 2 * len(checkpoints)
        for (name, expert_parallel), logits in found.items():
            error = relative_error(logits, checkpoints[name].logits(ids))
            assert error <= 1e-5, (rank, name, "EP" if expert_parallel else "TP")


@pytest.mark.parametrize("how, code", (("killed", "rank-lost"), ("hangs", "rank-timeout")))
def test_a_rank_that_fails_makes_the_others_fail_and_say_so(tmp_path, how, code):
    checkpoint = write_moe(
        tmp_path / "m", "mixtral", num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3
    )
    ranks = start_ranks(3, "rank_that_fails.py", how, checkpoint.folder)
    survivors = [rank for index, rank in enumerate(ranks) if index != 1]
    try:
        outputs = [rank.communicate(timeout=SECONDS)[0] for rank in survivors]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(survivors, outputs, strict=True):
        assert rank.returncode == 7, output[-3000:]
        said = re.search(r"RANK \d (\S+): (.*)", output)
        assert said is not None, output[-3000:]
        assert said[1] in (code, "rank-lost"), output  # who sees that another rank gave up has lost that one
        assert "another rank" in said[2] and "start all ranks again" in said[2]
    assert any(code in output for output in outputs)
