"""Compiling for GPUs that are not here."""

import json

import pytest

from pymllm.kernels.hardware import ARCHITECTURES
from pymllm.kernels.triton.ahead_of_time import Built, gather_tasks

from ...processes import python

pytest.importorskip("triton")


def test_cases_launch_what_real_runs_launch_and_each_binary_counts_once():
    tasks = gather_tasks(["sm90"], only="triton_int")
    functions = {task.launch.kernel.name for task in tasks}
    assert {"multiply_tile", "add_splits", "expand", "gather_rows"} <= functions
    assert len({task.key for task in tasks}) == len(tasks)


def test_too_much_shared_memory_and_spills_in_hot_kernels_are_verdicts():
    good = Built("k", "f", "c", "sm86", 100, 0, 1000, 101376, 4, True, 0.1)
    assert good.verdict == "ok"
    assert "101377" in Built(**{**vars(good), "shared": 101377}).verdict
    assert "spills 8" in Built(**{**vars(good), "stack": 8}).verdict
    assert Built(**{**vars(good), "stack": 8, "hot": False}).verdict == "ok"
    assert "boom" in Built(**{**vars(good), "error": "boom"}).verdict


def test_the_command_compiles_for_nvidia_and_amd_and_says_what_came_out(tmp_path):
    """In a process of its own: this one may run Triton's interpreter."""
    command = ["-m", "pymllm", "kernels", "aot", "--arch", "sm90", "--arch", "gfx942"]
    command += ["--only", "triton_int", "--limit", "6", "--workers", "1", "--json"]
    launches = json.loads(python(*command, check=True, TRITON_INTERPRET=None).stdout)["launches"]
    assert {row["architecture"] for row in launches} == {"sm90", "gfx942"}
    for row in launches:
        assert row["verdict"] == "ok" and 0 < row["registers"] <= 255 * (
            2 if row["architecture"] == "gfx942" else 1
        )
        assert row["shared"] <= row["shared_limit"] == ARCHITECTURES[row["architecture"]].shared_bytes


def test_an_unknown_architecture_is_an_error_that_lists_the_known_ones(capsys):
    from pymllm.cli import main

    assert main(["kernels", "aot", "--arch", "sm91"]) == 1
    assert "sm90" in capsys.readouterr().err
