"""`pymllm serve` on several ranks, as processes: they answer as one, and come back however one of them is lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import openai
import pytest
import torch

import pymllm

from ..parallel.test_torchrun import free_port
from ..processes import SECONDS, environment

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]
ASKED = {"model": "pymllm-shipped", "prompt": "import os\n", "temperature": 0, "max_tokens": 12}
# It does not end by itself before a rank is lost.
LONG = {**ASKED, "prompt": ["import os\n"] * 16, "max_tokens": 900, "logit_bias": {"0": -100, "2": -100}}


class Server:
    """A `pymllm serve` and what it says."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pymllm", "serve", "--port", "0", "--dtype", "float32", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(OMP_NUM_THREADS="1"),
        )
        self.said = deque()
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def wait_for(self, pattern):
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None and not self.reader.is_alive()
            found = next((m for line in tuple(self.said) if (m := re.search(pattern, line))), None)
            if found:
                return found
            assert not ended, self.all_said
            time.sleep(0.05)
        raise AssertionError(self.all_said)

    @property
    def all_said(self):
        return "".join(self.said)

    @property
    def url(self):
        return self.wait_for(r"http://[\d.]+:\d+")[0]

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def health(self):
        """The status, and what is said."""
        try:
            with contextlib.closing(http.client.HTTPConnection(self.url[7:], timeout=SECONDS)) as asking:
                asking.request("GET", "/health")
                answer = asking.getresponse()
                return answer.status, json.load(answer)
        except (OSError, http.client.HTTPException):
            # A server that ends may do so in the middle of an answer.
            return 0, {}

    def wait_for_health(self, status):
        deadline = time.monotonic() + SECONDS
        while (found := self.health())[0] != status:
            assert self.process.poll() is None and time.monotonic() < deadline, self.all_said
            time.sleep(0.02)
        return found[1]

    def ranks(self):
        """The process ids: of rank 0, and of those that follow it."""
        (first,) = children(self.process.pid)
        return [first, *children(first)]

    def end(self):
        everyone = tree(self.process.pid)
        self.process.kill()
        self.process.wait()
        assert gone(everyone)


def children(parent):
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        state = stat(entry)
        if state and int(state[1]) == parent and state[0] != "Z":
            found.append(int(entry))
    return sorted(found)


def stat(pid):
    """The fields of /proc/PID/stat from the state on; None: there is no such process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def tree(pid):
    return [one for child in children(pid) for one in (child, *tree(child))]


def gone(pids):
    """Waits until these processes are no more."""
    deadline = time.monotonic() + SECONDS
    while any((state := stat(pid)) and state[0] != "Z" for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def server():
    running = Server("--tensor-parallel-size", "2")
    yield running
    running.end()


@pytest.fixture(scope="module")
def expected():
    llm = pymllm.LLM(dtype="float32", device="cpu")
    params = llm.default_params(max_tokens=ASKED["max_tokens"], temperature=0)
    return llm.generate(ASKED["prompt"], params)[0].text


def answered(server):
    return server.client.completions.create(**ASKED).choices[0].text


def test_ranks_answer_as_one_whole_and_streamed(server, expected):
    assert answered(server) == expected
    chunks = server.client.completions.create(stream=True, **ASKED)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert server.health() == (200, {"status": "ok"})
    assert len(server.ranks()) == 2


@pytest.mark.parametrize("rank, how", ((1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)))
def test_a_lost_rank_is_told_to_clients_and_the_server_comes_back(server, expected, rank, how):
    server.wait_for_health(200)
    before = server.ranks()
    stream = server.client.completions.create(stream=True, **LONG)
    next(stream)
    os.kill(before[rank], how)
    # Rank 0's clients see their connections end with it; those of others are told.
    error, reason = (openai.APIError, "rank 1 of 2 is lost") if rank else (openai.APIConnectionError, None)
    with pytest.raises(error, match=reason):
        for _ in stream:
            pass
    said = server.wait_for_health(503)
    # By the server that is lost, or by what stands in for it.
    assert said["status"] == "unavailable"
    assert ("rank 1 of 2 is lost" if rank else "signal 9") in said["reason"]
    assert gone(before)
    server.wait_for_health(200)
    assert answered(server) == expected
    assert not set(server.ranks()) & set(before)


def test_sigterm_answers_what_is_under_way_and_ends_every_process(server):
    server.wait_for_health(200)
    everyone = tree(server.process.pid)
    stream = server.client.completions.create(stream=True, **ASKED)
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(SECONDS) == 0
    assert gone(everyone)
    assert "Traceback" not in server.all_said


def test_machines_whose_options_differ_are_refused_on_both_sides():
    where = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-port", str(free_port()))
    first = Server(*where)
    second = Server(*where, "--node-rank", "1", "--quant", "**.mlp.**=int8")
    try:
        for node in (first, second):
            assert node.process.wait(SECONDS) == 1
            node.reader.join(SECONDS)
            assert "the rules (--quant): rank 0 has none, and rank 1 has **.mlp.**=int8" in node.all_said
            assert "Traceback" not in node.all_said
    finally:
        for node in (first, second):
            node.process.kill()


def test_another_machine_follows_and_ends_with_node_0(expected):
    where = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-port", str(free_port()))
    second = Server(*where, "--node-rank", "1")
    first = Server(*where)
    try:
        assert answered(first) == expected
        (lost,) = children(second.process.pid)
        os.kill(lost, signal.SIGKILL)
        assert "its connection has ended" in first.wait_for_health(503)["reason"]
        first.wait_for_health(200)
        assert answered(first) == expected
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(SECONDS) == 0
        assert second.process.wait(SECONDS) == 0
    finally:
        for node in (first, second):
            node.process.kill()
