"""`follow` in processes that others start, and what rank 0 says of one that fails while it loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pymllm import LLM
from pymllm.errors import PymllmError
from pymllm.parallel import Ranks

from ..checkpoints import write_checkpoint
from ..processes import SECONDS, environment
from .test_torchrun import free_port

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here"),
    pytest.mark.skipif(sys.platform != "linux", reason="ranks end with rank 0 as Linux has it"),
]
FOLLOW = "import sys\nfrom pymllm.follower import follow\n"
CALL = """
where = {"rank": 1, "size": 2, "host": "127.0.0.1", "port": int(sys.argv[2]), "key": "k"}
follow(sys.argv[1], **where, device="cpu", dtype="float32")
"""
FAILS = """
import pymllm.loading.load as load
def fail(*_):
    raise MemoryError("no room for a layer")
load._load_unit = fail
"""


@pytest.fixture
def ranks(tmp_path):
    """Starts rank 1, and has rank 0 beside it."""
    folder, started = write_checkpoint(tmp_path / "m", "llama").folder, []

    def start(code):
        port = free_port()
        command = [sys.executable, "-c", FOLLOW + code + CALL, str(folder), str(port)]
        started.append(subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1")))
        place = Ranks(port=port, key="k", started=0)
        return started[0], lambda: LLM(
            folder, device="cpu", dtype="float32", tensor_parallel_size=2, ranks=place
        )

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_follower_runs_until_it_is_over_and_returns(ranks):
    process, lead = ranks("")
    llm = lead()
    assert llm.logits([1, 2, 3]).isfinite().all() and set(llm.ping()) == {1}
    llm.close()
    assert process.wait(SECONDS) == 0


def test_a_rank_that_fails_while_it_loads_ends_the_others_with_its_reason(ranks):
    process, lead = ranks(FAILS)
    with pytest.raises(PymllmError, match=r"rank 1 of 2 has failed: loading .* has run out of memory"):
        lead()
    assert process.wait(SECONDS) == 1
