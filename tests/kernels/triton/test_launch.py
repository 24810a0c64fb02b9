"""Launches: their kernels' declarations, and, in a process that compiles, what reaches the driver."""

from pathlib import Path

import pytest
import torch

from pymllm.cli import doctor
from pymllm.kernels.triton.bound import why_not_bound
from pymllm.kernels.triton.launch import kernel, recording

from ...processes import ROOT, python

pytest.importorskip("triton")


def test_bound_launches_are_given_to_the_driver_as_triton_gives_them(tmp_path):
    file = Path(__file__).with_name("compiled_launches.py")
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    "version, bound",
    (
        ("3.6.0", True),
        ("3.7.1+git1234", True),
        ("3.5.1", False),
        ("3.8.0", False),
        ("4.0.0", False),
        ("x", False),
    ),
)
def test_launches_are_bound_under_the_versions_of_triton_whose_path_is_known(version, bound):
    reason = why_not_bound(version)
    assert reason is None if bound else version in reason


@pytest.mark.parametrize("version", ("3.7.1", "3.99.0"))
def test_doctor_says_whether_launches_are_bound_where_there_is_a_gpu(version):
    report = doctor.examine()
    report["versions"]["triton"] = version
    text = "\n".join(doctor.lines(report | {"gpus": []}))
    assert "launches" not in text
    gpu = {"device": "cuda:0", "name": "a GPU", "capability": [9, 0], "memory_bytes": 1, "free_bytes": None}
    text = "\n".join(doctor.lines(report | {"gpus": [gpu]}))
    assert ("go straight" in text) == (version == "3.7.1") == ("not 3.99.0" not in text)


def test_what_varies_must_be_an_argument():
    with pytest.raises(TypeError, match="no argument tokenz; it has x, tokens"):

        @kernel(varying=("tokenz",))
        def made(x, tokens): ...


def test_a_launch_has_a_tensor_first_when_it_is_recorded_too():
    @kernel
    def made(x, y): ...

    with recording() as found:
        made.launch((1,), torch.empty(1, device="meta"), None)
        with pytest.raises(AttributeError, match="is_meta"):
            made.launch((1,), None, torch.empty(1, device="meta"))
    assert len(found) == 1


def test_the_cost_of_launches_is_measured_for_every_call_of_a_layer():
    """In a process of its own: this one may run Triton's interpreter, which launches nothing."""
    command = ("benchmarks/gpu_launch_cost.py", "--batches", "1", "--dry-run")
    printed = python(*(ROOT / command[0], *command[1:]), check=True, TRITON_INTERPRET=None).stdout
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    calls = {row[0]: int(row[1]) for row in rows}
    assert {"norm of a sum", "qkv", "rotary and KV store", "attention", "down"} < calls.keys()
    assert calls["rotary and KV store"] == 1 and calls.pop("all") == sum(calls.values())
