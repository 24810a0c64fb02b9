"""`make faults-check` runs tests under `python -O`, which leaves out pymllm's asserts; the tests' own have to stay."""

from __future__ import annotations

import dis

import pytest

from pymllm.server import gate

from . import processes

REASON = "LOAD_ASSERTION_ERROR"


def test_asserts_of_tests_and_of_what_they_import_always_fail():
    with pytest.raises(AssertionError):
        assert dis is None
    with pytest.raises(AssertionError):
        processes.python("-c", "raise SystemExit(1)", check=True)


def test_asserts_of_pymllm_are_out_under_optimised_python_and_there_in_any_other():
    instructions = {step.opname for step in dis.get_instructions(gate.HANDLERS[gate.PymllmError])}
    assert (REASON in instructions) == __debug__
