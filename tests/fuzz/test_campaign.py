"""The harness finds what it should, makes it small, and keeps it."""

from __future__ import annotations

import json
import os
import signal

import pytest
from hypothesis import strategies as st

from pymllm.errors import CheckpointError

from . import children
from .campaign import run
from .children import Verdict
from .inputs import Input


class Sevens:
    """Numbers as files; those that hold a seven end badly."""

    name = "sevens"

    def __init__(self, end, meaning="breaks"):
        self.end, self.meaning = end, meaning

    def prepare(self, folder):
        """Nothing to make."""

    def inputs(self):
        numbers = st.integers(0, 10_000)
        return numbers.map(lambda n: Input("number", {"n": b"%d" % n}, f"now {n}", self.meaning))

    def judge(self, given, folder):
        text = given.write(folder).joinpath("n").read_text()
        if "7" not in text:
            raise CheckpointError("a number", code="number", file="n")
        return self.end()


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    while True:
        pass


def unforeseen():
    raise CheckpointError("what no check has foreseen", code="unforeseen", found="KeyError: 7, at a.py:7")


def panic():
    raise BaseException("a panic")


ENDS = {
    "crash: SIGSEGV": crash,
    "foreign: BaseException": panic,
    "foreign: unforeseen at a.py:7": unforeseen,
    "hang: ": hang,
    "memory: MemoryError": lambda: bytearray(1 << 40),
    "different": lambda: False,
}


@pytest.mark.parametrize("wanted", ENDS)
def test_what_ends_badly_is_found_and_made_small(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "CPU_SECONDS", 0.05)
    told = []
    tally = run(Sevens(ENDS[wanted]), 1, tmp_path, inputs=40, tell=told.append)
    (folder,) = tally.found.values()
    case = json.loads((folder / "case.json").read_text())
    assert case["verdict"].startswith(wanted) and told
    assert "7" in (folder / "files/n").read_text()
    assert tally.codes["number"]


def test_another_answer_to_a_file_that_says_something_else_is_no_finding(tmp_path):
    tally = run(Sevens(lambda: False, "means"), 1, tmp_path, inputs=100)
    assert not tally.found and tally.classes["means", "different"]


def test_the_same_seed_makes_the_same_inputs(tmp_path):
    class Noted(Sevens):
        def inputs(self):
            return super().inputs().map(lambda one: made.append(one.changed) or one)

    lists = []
    for seed in (1, 1, 2):
        made: list[str] = []
        run(Noted(lambda: True), seed, tmp_path, inputs=100)
        lists.append(made)
    assert lists[0] == lists[1] != lists[2]


def test_a_verdict_is_bad_by_what_the_change_means():
    given = {meaning: Input("s", {}, "c", meaning) for meaning in ("keeps", "breaks", "means")}
    for meaning, one in given.items():
        assert not Verdict("same").bad(one) and not Verdict("refused", "x").bad(one)
        assert Verdict("crash").bad(one) and Verdict("different").bad(one) == (meaning != "means")
