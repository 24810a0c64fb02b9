"""The one line about slow kernels: native ones that are missing, and references."""

from __future__ import annotations

import logging
import sys

import pytest

from pymllm import LLM, plan
from pymllm.api import shipped_model
from pymllm.cli import doctor
from pymllm.kernels.native import extension
from pymllm.kernels.registry import select
from pymllm.planning import slow_kernels


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine where pymllm was installed without a compiler."""
    monkeypatch.setitem(sys.modules, "pymllm._native", None)
    monkeypatch.setattr(slow_kernels, "_told", set())
    extension._load_native.cache_clear()
    select.cache_clear()  # kernels are chosen once a process
    yield
    extension._load_native.cache_clear()
    select.cache_clear()


def test_missing_kernels_are_said_once_for_a_model(no_kernels, caplog):
    for _ in range(2):
        LLM(device="cpu", kv_memory="1MB")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "pymllm"
    for needle in (
        "42 x linear (awq int4 g128) by torch_int4pack",
        "not built",
        "make native",
        "pip install",
    ):
        assert needle in record.message


def test_doctor_is_not_all_well_without_kernels(no_kernels):
    report = doctor.examine()
    lines = doctor.lines(report)
    assert not any(line.startswith("all well") for line in lines)
    assert any(line.startswith("SLOW") for line in lines)
    usable = [line.partition("; not on")[0] for line in lines if line.startswith("kernels ")]
    assert not any("native" in line for line in usable)


def test_a_reference_kernel_is_said_unless_it_was_asked_for():
    forced = plan(shipped_model(), device="cpu", kernels={"linear": "reference"})
    said = slow_kernels.describe_slow_kernels(forced)
    assert said is not None and "43 of 50 layers" in said and "plan MODEL --why" in said
    assert slow_kernels.describe_slow_kernels(forced, frozenset({"reference"})) is None
    assert slow_kernels.describe_slow_kernels(plan(shipped_model(), device="cpu")) is None
