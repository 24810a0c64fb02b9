"""Real ranks: processes started by torchrun, joined by Gloo over the loopback interface."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..adapters.handwritten import random_adapter, with_deltas
from ..checkpoints import relative_error, write_checkpoint
from ..processes import SECONDS, environment, python

FORMATS = ("none", "awq-g32", "fp8-block")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(*arguments, ranks=2):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-addr", "127.0.0.1"]
    words += ["--master-port", free_port(), *arguments]
    return python(*words, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here")
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is named as Linux does")
def test_two_processes_give_the_logits_of_one(tmp_path):
    checkpoints = {
        fmt: write_checkpoint(tmp_path / fmt, "llama", fmt, num_key_value_heads=1) for fmt in FORMATS
    }
    adapted = checkpoints["awq-g32"]
    deltas = random_adapter(adapted.folder / "adapter", adapted, ("q_proj", "v_proj", "o_proj", "down_proj"))
    ids = adapted.ids
    script = Path(__file__).with_name("rank_logits.py")
    folders = [checkpoint.folder for checkpoint in checkpoints.values()]
    done = torchrun(script, tmp_path, json.dumps(ids.tolist()), *folders)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        logits = torch.load(tmp_path / f"rank{rank}.pt")
        for fmt, checkpoint in checkpoints.items():
            assert relative_error(logits[fmt], checkpoint.logits(ids)) <= 1e-5, (rank, fmt)
        assert relative_error(logits["adapter"], with_deltas(adapted, deltas)) <= 1e-4


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here")
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is named as Linux does")
def test_a_bad_checkpoint_ends_every_process_with_its_error(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32", num_hidden_layers=1)
    (checkpoint.folder / "model.safetensors").write_bytes(b"not a checkpoint")
    script = Path(__file__).with_name("rank_logits.py")
    done = torchrun(script, tmp_path, "[1]", checkpoint.folder)
    assert done.returncode != 0 and "CheckpointError" in done.stderr and "model.safetensors" in done.stderr


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here")
@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is named as Linux does")
def test_a_stopped_rank_is_told_to_the_others_which_end(tmp_path):
    ranks, script = [], Path(__file__).with_name("rank_that_stops.py")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for rank in range(2):
        variables = environment(**place, RANK=str(rank), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        ranks.append(subprocess.Popen([sys.executable, script, tmp_path], env=variables))
    try:
        assert ranks[0].wait(SECONDS / 2) == 1
        assert "rank 1 of 2 is lost; expected a sign of life" in (tmp_path / "told").read_text()
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
