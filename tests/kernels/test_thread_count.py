"""The default number of threads: torch's, under the CPU quota, unless somebody chose."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

from pymllm.cli import main
from pymllm.kernels.native import thread_count
from pymllm.kernels.native.extension import probe


@pytest.fixture(autouse=True)
def machine(monkeypatch, torch_threads):
    """8 cores of 2 threads each, as torch finds them; no variable has chosen."""
    here = dataclasses.replace(probe(), physical_cores=8, logical_cpus=16)
    monkeypatch.setattr(thread_count, "probe", lambda: here)
    for name in thread_count.CHOOSERS:
        monkeypatch.delenv(name, raising=False)
    torch_threads(8)


def allow(monkeypatch, quota: float | None) -> None:
    monkeypatch.setattr(thread_count, "cpu_quota", lambda: quota)


@pytest.mark.parametrize(("quota", "threads"), ((0.5, 1), (2.0, 2), (2.5, 3), (8.0, 8), (64.0, 8), (None, 8)))
def test_torchs_own_choice_is_lowered_to_the_quota_and_said(quota, threads, monkeypatch, caplog):
    allow(monkeypatch, quota)
    described = thread_count.describe_threads()
    with caplog.at_level(logging.WARNING, logger="pymllm"):
        assert thread_count.lower_to_quota() == (threads if threads < 8 else None)
    assert torch.get_num_threads() == threads == described["count"]
    assert described["chosen_by"] == ("cpu quota" if threads < 8 else "torch")
    assert [f"{threads} instead of 8" in line for line in caplog.messages] == [True] * (threads < 8)
    # What was lowered is not lowered, nor said, again.
    assert thread_count.lower_to_quota() is None and len(caplog.messages) == (threads < 8)


@pytest.mark.parametrize("variable", thread_count.CHOOSERS)
def test_a_variable_decides_over_the_quota(variable, monkeypatch, caplog):
    allow(monkeypatch, 1.0)
    monkeypatch.setenv(variable, "8")
    assert thread_count.lower_to_quota() is None and torch.get_num_threads() == 8
    assert thread_count.describe_threads() == {"count": 8, "cpu_quota": 1.0, "chosen_by": variable}


@pytest.mark.parametrize(
    ("value", "chooses"), (("4,2", True), (" +8 ", True), ("0", False), ("many", False), ("", False))
)
def test_only_a_number_of_threads_is_a_choice(value, chooses, monkeypatch):
    """libgomp calls 0 and words invalid, and torch takes all cores."""
    allow(monkeypatch, 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    chosen_by = thread_count.describe_threads()["chosen_by"]
    assert chosen_by == ("OMP_NUM_THREADS" if chooses else "cpu quota")
    assert thread_count.lower_to_quota() == (None if chooses else 2)


def test_a_number_that_the_program_chose_stays(monkeypatch, torch_threads):
    allow(monkeypatch, 1.0)
    torch_threads(5)  # torch itself takes 8 or 16
    assert thread_count.lower_to_quota() is None and torch.get_num_threads() == 5
    assert thread_count.describe_threads()["count"] == 5


def test_loading_a_model_asks_once(monkeypatch):
    import pymllm

    allow(monkeypatch, 2.0)
    thread_count.lower_to_quota_once.cache_clear()
    pymllm.LLM(progress=False)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(8)  # after the first model, the program decides
    pymllm.LLM(progress=False)
    assert torch.get_num_threads() == 8


def test_doctor_tells_the_threads_and_the_quota(monkeypatch, capsys):
    allow(monkeypatch, 2.5)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cpu"]["threads"]
    assert found == {"count": 3, "cpu_quota": 2.5, "chosen_by": "cpu quota"}
    assert main(["doctor"]) == 0
    assert "3 (chosen by cpu quota); CPU quota of this container: 2.5" in capsys.readouterr().out
    allow(monkeypatch, None)
    assert main(["doctor"]) == 0
    assert "no CPU quota" in capsys.readouterr().out
