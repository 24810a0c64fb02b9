"""Replicas on a real Ray: the server as clients see it, and what a lost machine takes along.

Ray takes a quarter of a minute to start, so one server answers most questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray")

from tests.processes import ROOT, SECONDS, environment, python

pytestmark = pytest.mark.slow

# Without an end, until so many tokens are there.
ENDLESS = {"prompt": "import os\n", "temperature": 0, "logit_bias": {"0": -100, "2": -100}}


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it says so."""
    command = [sys.executable, "-m", "pymllm", "serve", "--ray", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(RAY_ADDRESS=None))
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if address := re.search(r"Serving pymllm-shipped at (http://[\d.]+:\d+/v1) on Ray", line):
                break
        else:
            raise AssertionError(said)
        yield process, address[1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS)
        finally:
            process.kill()
            process.stderr.close()


def client(address: str, key: str = "k") -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0, timeout=SECONDS)


def free(address: str) -> None:
    """Ask until each of two replicas of one place has taken a request: a leaving client is seen a moment later."""
    with contextlib.ExitStack() as streams:
        for _ in range(2):
            while True:
                with contextlib.suppress(openai.InternalServerError):
                    streams.enter_context(
                        client(address).completions.create(
                            model="pymllm-shipped", stream=True, max_tokens=900, **ENDLESS
                        )
                    )
                    break
                time.sleep(0.1)


def test_replicas_answer_as_one_server_does():
    few = ("--max-running", "1", "--max-waiting", "0")
    with started("--replicas", "2", "--cpus-per-rank", "0.5", "--api-key", "k", *few) as (process, address):
        assert [model.id for model in client(address).models.list().data] == ["pymllm-shipped"]
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        # Both replicas give the same answer, whole or in pieces.
        answers = {
            client(address)
            .completions.create(model="pymllm-shipped", max_tokens=8, **ENDLESS)
            .choices[0]
            .text
            for _ in range(8)
        }
        stream = client(address).completions.create(
            model="pymllm-shipped", stream=True, max_tokens=8, **ENDLESS
        )
        pieces = [chunk.choices[0] for chunk in stream]
        assert pieces[-1].finish_reason == "length"
        assert answers == {"".join(piece.text for piece in pieces)}
        with pytest.raises(openai.BadRequestError) as refused:
            client(address).completions.create(model="pymllm-shipped", max_tokens=-1, prompt="x")
        assert refused.value.param == "max_tokens"
        # A replica has one place. Whoever leaves gives it back; whoever finds none is told so in JSON, and until when.
        free(address)
        free(address)
        with contextlib.ExitStack() as streams:
            refusals = []
            for _ in range(6):
                try:
                    streams.enter_context(
                        client(address).completions.create(
                            model="pymllm-shipped", stream=True, max_tokens=900, **ENDLESS
                        )
                    )
                except openai.InternalServerError as error:
                    refusals.append(error)
            assert len(refusals) >= 4
            assert all(error.status_code == 503 and error.code == "overloaded" for error in refusals)
            assert all(int(error.response.headers["retry-after"]) >= 1 for error in refusals)
        free(address)
        # What is under way at the end is finished.
        stream = client(address).completions.create(
            model="pymllm-shipped", stream=True, max_tokens=600, **ENDLESS
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(SECONDS) == 0


def followers(top: int) -> list[int]:
    """List the processes below `top` that follow a rank 0."""
    parents, found = {}, [top]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    ranks = []
    for process in found:
        # It may have ended in the meantime.
        with contextlib.suppress(OSError):
            if b"pymllm.follower" in Path(f"/proc/{process}/cmdline").read_bytes():
                ranks.append(process)
    return ranks


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_replica_that_has_lost_a_rank_is_replaced():
    with started("--tensor-parallel-size", "2", "--cpus-per-rank", "0.5", "--api-key", "k") as (
        process,
        address,
    ):
        stream = client(address).completions.create(
            model="pymllm-shipped", stream=True, max_tokens=900, **ENDLESS
        )
        next(stream)
        (rank,) = followers(process.pid)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="rank 1 of 2 is lost"):
            list(stream)
        deadline = time.monotonic() + SECONDS
        while True:
            assert time.monotonic() < deadline
            with contextlib.suppress(openai.APIStatusError):
                answer = client(address).completions.create(model="pymllm-shipped", max_tokens=4, **ENDLESS)
                break
            time.sleep(0.5)
        assert answer.choices[0].finish_reason == "length"
        assert followers(process.pid) not in ([], [rank])
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert followers(os.getpid()) == []


def test_an_error_of_the_model_is_the_server_s_own():
    done = python("-m", "pymllm", "serve", "--ray", "--port", "0", "/no/such/model", RAY_ADDRESS=None)
    assert done.returncode == 1
    assert "'/no/such/model' is neither a local folder" in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_replicas_that_do_not_fit_are_refused_before_any_starts():
    done = python("-m", "pymllm", "serve", "--ray", "--port", "0", "--replicas", "4000", RAY_ADDRESS=None)
    assert done.returncode == 1 and "do not fit" in done.stderr


def test_a_lost_machine_takes_its_own_requests_along_and_no_others(tmp_path):
    script = ROOT / "benchmarks" / "ray_failover.py"
    python(script, "--rounds", "1", "--clients", "4", "--results", tmp_path, check=True, RAY_ADDRESS=None)
    (found,) = json.loads((tmp_path / "ray_failover.json").read_text())["rounds"]
    assert found["under way on the dead replica"] + found["under way on the other replica"] >= 2
    assert found["its requests lost"] == found["under way on the dead replica"]
    assert found["the other's requests finished"] == found["under way on the other replica"]
    assert found["its requests hung"] == 0
    assert found["begun after the kill"] > 0
    assert found["first answer of the new one, s"] is not None
