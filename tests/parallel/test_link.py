"""Messages between ranks, steps as numbers, and the last words of a process."""

from __future__ import annotations

import json
import random
import socket
import struct

import numpy as np
import pytest

from pymllm.engine.runs import Run
from pymllm.errors import ConfigError, RankError
from pymllm.parallel.children import Child
from pymllm.parallel.link import PING, Link, decode, encode
from pymllm.parallel.process_group import choose_backend
from pymllm.parallel.ranks import ranks_of_node

from ..processes import SECONDS


def test_messages_come_whole_and_in_order_however_they_are_cut():
    odds = random.Random(1)
    sent = [
        ({"do": "step", "n": n, "x": 0.1 + n}, [odds.randint(-(2**63), 2**63 - 1) for _ in range(n)])
        for n in range(6)
    ]
    data = b"".join(encode(message, integers) + encode(PING) for message, integers in sent)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    found = []
    with theirs:
        link = _link(ours)
        while data:
            piece = odds.randint(1, 40)
            theirs.sendall(data[:piece])
            data = data[piece:]
            found += [(message, integers.tolist()) for message, integers in link.receive()]
        theirs.close()
        with pytest.raises(EOFError):
            list(link.receive())
    assert found == sent
    link.close()


def _link(connection):
    """A link over a socket that knows nothing of TCP."""
    link = Link.__new__(Link)
    link.connection, link.heard, link._came = connection, 0.0, bytearray()
    return link


@pytest.mark.parametrize(
    "data",
    (
        struct.pack("<IQ", 1 << 31, 0),
        struct.pack("<IQ", 2, 1 << 60),
        struct.pack("<IQ", 4, 0) + b"null",
        struct.pack("<IQ", 2, 0) + b"\x80\x04",
        struct.pack("<IQ", 40000, 0) + b"[" * 40000,
        b"GET / HTTP/1.1\r\n\r\n",
    ),
)
def test_what_is_no_message_is_refused_before_it_is_awaited(data):
    with pytest.raises(RankError, match="no message"):
        decode(bytearray(data))


def test_a_stranger_cannot_announce_integers():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        link = _link(ours)
        theirs.sendall(encode({}, [1, 2])[:20])
        with pytest.raises(RankError, match="2 integers"):
            list(link.receive(4096, 0))


def test_a_step_is_the_same_after_its_way_as_numbers():
    run = Run(
        tokens=[[1, 2, 3], [7], [5, 6]],
        starts=[0, 40, 16],
        pages=[[3], [9, 8, 7], [2, 4]],
        rows=[[], [0], [0, 1]],
        prefilling=[True, False, True],
        adapters=["b", None, "a"],
        slots=[2, 0, 1],
        scored=[range(0, 3), range(0), range(16, 17)],
    )
    integers, names = run.to_integers()
    message, words = decode(bytearray(encode({"adapters": names}, integers)))
    assert Run.from_integers(words, json.loads(json.dumps(message))["adapters"]) == run
    alone = Run([[4]], [0], [[0]], [[0]], [True], [None], None, [range(0)])
    assert Run.from_integers(*alone.to_integers()) == alone
    assert isinstance(integers, np.ndarray)


@pytest.mark.parametrize(
    "code, end",
    (
        (
            "import os\nos.write(2, b'first\\n\\nlast words\\n')\nos.abort()",
            "SIGABRT, after writing: first | last words",
        ),
        ("raise SystemExit(9)", "it has ended with code 9"),
    ),
)
def test_how_a_process_has_ended_is_told_with_its_last_words(code, end):
    assert end in Child(["-c", code], {}).describe_end(SECONDS)


def test_machines_share_ranks_evenly_or_not_at_all():
    assert [list(ranks_of_node(4, 2, node)) for node in range(2)] == [[0, 1], [2, 3]]
    for size, nodes, node in ((3, 2, 0), (4, 2, 2), (2, 1, -1)):
        with pytest.raises(ConfigError, match="shared evenly"):
            ranks_of_node(size, nodes, node)


def test_ranks_on_gpus_have_one_each_and_models_on_the_cpu_none(monkeypatch):
    assert choose_backend("cpu", 9) == "gloo"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (choose_backend("auto", 2), choose_backend("cpu", 3)) == ("nccl", "gloo")
    with pytest.raises(ConfigError, match="fewer GPUs"):
        choose_backend("cuda", 3)
