"""The first contact's real stages, without a GPU: a short rehearsal, machines on which nothing runs, wrong kernels."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.first_contact import models
from benchmarks.first_contact.driver import ROOT, Settings, run
from benchmarks.first_contact.kernel_tests import missing_package
from benchmarks.first_contact.notes import Notes, Task, WrongResult
from benchmarks.first_contact.place import Place
from benchmarks.first_contact.stages import CHILD, GROUPS, chosen
from benchmarks.first_contact.tables import SCRIPTS, START_S, budget_of
from pymllm import LLM

from ..processes import environment
from ..processes import run as run_command

PLACE = Place(rehearse=True)


def first_contact(folder, *arguments, **variables):
    """Run the command as a user does.  Returns its exit status, what it printed, and its results."""
    command = [sys.executable, "-m", "benchmarks.first_contact", "--out", str(folder / "out")]
    command += ["--work", str(folder / "work"), *arguments]
    done = run_command(command, cwd=ROOT, env=environment(**variables))
    rows = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, rows


def test_a_short_rehearsal_is_right_and_says_what_it_did(tmp_path):
    stages = "env checks end_to_end"
    status, printed, rows = first_contact(
        tmp_path, "--rehearse", "--seconds", "600", "--stages", stages, "--cpus", "1"
    )
    assert status == 0, printed
    assert "0 WRONG" in printed and "say nothing of a GPU" in printed and len(printed) < 10_000
    groups = {row["group"] for row in rows if row["stage"] == "checks"}
    assert groups == {"linear", "attention", "experts", "routing", "elementwise", "embedding", "recurrence"}
    kernels = {row["kernel"] for row in rows if "kernel" in row}
    assert {"triton_int", "triton_fp8_w8a8", "triton_experts"} <= kernels
    ran = {row["item"] for row in rows if row["stage"] == "end_to_end" and row["ok"]}
    assert ran == {"awq int4", "experts in awq", "gated delta rule", "decoded in blocks", "an adapter"}
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {"results.jsonl", "summary.txt", "failures.txt", "environment.txt"}
    assert {path.name for path in (tmp_path / "work").iterdir()} <= {"triton", "cc"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_what_to_run_instead(tmp_path):
    status, printed, _ = first_contact(tmp_path)
    assert status == 2
    said = [line for line in printed.splitlines() if " at most" not in line]
    assert len(said) == 1 and said[0].startswith("no GPU: torch") and said[0].endswith("--rehearse")


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_without_a_package_one_line_says_so(package, tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / f"{package}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    )
    path = f"{tmp_path / 'absent'}:{environment()['PYTHONPATH']}"
    status, printed, _ = first_contact(tmp_path, "--rehearse", PYTHONPATH=path)
    said = [line for line in printed.splitlines() if " at most" not in line]
    assert status == 2 and len(said) == 1 and said[0].startswith(f"{package} cannot be imported"), printed


# What it gives is wrong from the 128th row on, as a kernel for many rows would be that nobody had run.
WRONG_KERNEL = """
from benchmarks.first_contact import child
from pymllm.kernels.triton.int_weights import TritonInt
right = TritonInt.run
def run(self, packed, problem, x, bias):
    y = right(self, packed, problem, x, bias)
    y[127:, 3] += 0.5 * y.abs().mean()
    return y
TritonInt.run = run
child.main()
"""


def test_a_kernel_that_is_wrong_in_a_few_elements_is_found_and_what_is_right_stays_so(tmp_path, capfd):
    [[checks]] = chosen(["checks"])
    broken = replace(checks, command=(sys.executable, "-c", WRONG_KERNEL), parts=lambda cpus: 1)
    [(tmp_path / name).mkdir() for name in ("out", "work")]
    settings = Settings(600, tmp_path / "out", tmp_path / "work", rehearse=True, cpus=1)
    assert run([[broken]], settings) == 1
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    [wrong] = [row for row in rows if row["ok"] is False]
    assert wrong["item"] == "linear int4 g32 asym, bfloat16, 130 x 96 x 256"
    assert wrong["why"].startswith("error ") and " above " in wrong["why"]
    assert capfd.readouterr().out.split("===")[1].startswith(" 1 WRONG")


def test_results_are_compared_row_by_row_and_element_by_element():
    expected = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)).double()
    assert PLACE.compare(expected.bfloat16(), expected)["error"] < 5e-3
    for change, said in (
        (lambda y: y[1999].neg_(), "in row 1999; 1 of 2000 rows"),
        (lambda y: y[7, 9].add_(0.5), "at row 7, column 9|in row 7;"),
        (lambda y: y[0, 0].fill_(float("nan")), "1 of 512000 numbers are not finite"),
        (lambda y: y.mul_(1.05), "2000 of 2000 rows so"),
    ):
        found = expected.clone()
        change(found)
        with pytest.raises(WrongResult, match=said):
            PLACE.compare(found, expected)
    with pytest.raises(WrongResult, match="shape"):
        PLACE.compare(expected[:, :255], expected)


CONFIGS = {"awq": lambda: models.awq(models.SIZES), "mixture": models.mixture, "hybrid": models.hybrid}
CONFIGS["in blocks"] = models.in_blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_random_models_have_all_that_a_checkpoint_of_their_config_needs(name, tmp_path):
    folder = models.write_model(tmp_path / "model", CONFIGS[name](), torch.device("cpu"))
    llm = LLM(folder, device="cpu", dtype="float32", progress=False)
    logits = llm.logits(list(range(20)))
    assert torch.isfinite(logits).all() and 0.1 < float(logits.std()) < 30


def test_the_8b_shapes_are_8b_of_weights():
    count = 0
    for name, shape, _ in models.tensors_of(models.awq(models.EIGHT_B)):
        size = torch.Size(shape).numel()
        count += 8 * size if name.endswith("qweight") else size if "embed" in name or "lm_head" in name else 0
    assert 8.0e9 < count < 8.1e9


@pytest.mark.parametrize("left", [30, 60, 110, 540])
def test_the_tables_leave_the_last_row_of_each_its_time(left, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_roofline import GRACE_S

    at = 0.0
    for name in SCRIPTS:
        budget = budget_of(name, left - at, GRACE_S)
        at += START_S + max(budget, 0.0)
        assert budget <= 0 or at + GRACE_S <= left + 1e-6
    assert left < 60 or at >= START_S * len(SCRIPTS), "each is run"


def test_a_test_that_needs_a_package_that_is_not_here_is_left_out_and_one_of_ours_is_wrong():
    missing = "E   ModuleNotFoundError: No module named 'transformers.models'"
    assert missing_package(f"...\n{missing}\n") == "transformers"
    assert missing_package(missing.replace("transformers.models", "pymllm.gone")) is None
    assert missing_package("E   AssertionError: No module") is None


def task(folder, **changes):
    told = {
        "stage": "checks",
        "part": 0,
        "parts": 1,
        "ends_at": float("inf"),
        "seconds": 9.0,
        "rehearse": True,
    }
    folders = {"rows": folder / "rows", "done": folder / "done", "out": folder, "work": folder}
    return Task(**{**told, **{name: str(path) for name, path in folders.items()}, **changes})


def test_what_was_begun_is_not_begun_again_and_nothing_is_without_time(tmp_path):
    (tmp_path / "done").write_text("first\n")
    notes = Notes(task(tmp_path))
    assert notes.run("first", dict) is False and notes.run("second", dict) is True
    late = Notes(task(tmp_path, ends_at=0.0))
    assert late.run("third", dict) is late.run("fourth", dict) is False
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 2 and rows[0] == {"begin": "second"} and rows[1]["item"] == "second"


def test_every_stage_has_a_module():
    from benchmarks.first_contact.child import MODULES

    names = [stage.name for group in GROUPS for stage in group]
    assert list(MODULES) == names and all(stage.command == CHILD for group in GROUPS for stage in group)
    assert all((ROOT / f"benchmarks/first_contact/{module}.py").exists() for module in MODULES.values())
    assert sum(max(stage.share for stage in group) for group in GROUPS) == 540
