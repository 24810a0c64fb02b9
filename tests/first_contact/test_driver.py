"""The first contact's driver, over stages that hang, die, print garbage or are stopped: each is told, the others go on.

A stage here is a few lines of Python, in a process of its own as the real ones are. No test waits for a time to pass:
what hangs is ended by the limit that is under test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.first_contact.__main__ import read_settings
from benchmarks.first_contact.driver import ROOT, Settings, run
from benchmarks.first_contact.stages import GROUPS, Stage, chosen
from benchmarks.first_contact.summary import LONGEST, write_summary

from ..processes import environment

NOTES = "from benchmarks.first_contact.notes import *; notes = open_notes(); "


def stage(name, code, each=60.0, parts=1):
    command = (sys.executable, "-c", NOTES + code)
    return Stage(name, f"the title of {name}", 10, each, lambda cpus: parts, command)


@pytest.fixture
def contact(tmp_path, capfd):
    """Runs groups of stages.  Returns the exit status, the results, and what was printed."""

    def contact(*groups, seconds=120.0):
        status = run(groups, Settings(seconds, made(tmp_path / "out"), made(tmp_path / "work"), cpus=1))
        lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
        return status, [json.loads(line) for line in lines], capfd.readouterr().out

    return contact


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def verdicts(rows, stage):
    return {row["item"]: row["ok"] for row in rows if row["stage"] == stage}


GOOD = stage("good", "notes.run('fine', lambda: {'say': 'it went well'})")


def between_two(bad):
    """Three items, of which the second does this."""
    return f"notes.run('first', dict); notes.run('second', lambda: {bad}); notes.run('third', dict)"


HANGS = between_two("threading.Event().wait()")
RAISES = between_two("{}['absent']")


def test_what_is_right_ends_with_zero_and_its_words_are_in_the_summary(contact, tmp_path):
    (made(tmp_path / "out") / "tiles.json").write_text("of a run before")
    status, rows, printed = contact((GOOD,))
    assert status == 0 and verdicts(rows, "good") == {"fine": True}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl",
        "failures.txt",
        "summary.txt",
    }
    assert "0 WRONG, 1 right, 0 left out" in printed and "  it went well" in printed


@pytest.mark.parametrize(
    ("code", "each", "why"),
    [
        (between_two("os.kill(os.getpid(), signal.SIGSEGV)"), 60, "its process was killed by SIGSEGV"),
        (HANGS, 2, "hung: no end after 2 s"),
        (RAISES, 60, "KeyError: 'absent'"),
        (between_two("exec('raise MemoryError(\"no room\")')"), 60, "MemoryError: no room"),
        (between_two("sys.exit(3)"), 60, "its process ended with status 3"),
        (between_two("exec('raise KeyboardInterrupt')"), 60, "its process was killed by SIGINT"),
    ],
    ids=["dies", "hangs", "raises", "memory", "exits", "interrupted"],
)
def test_an_item_that_goes_wrong_is_told_and_all_others_are_done(code, each, why, contact):
    status, rows, printed = contact((stage("bad", code, each),), (GOOD,))
    assert status == 1
    assert verdicts(rows, "bad") == {"first": True, "second": False, "third": True}
    assert [row["why"] for row in rows if row["ok"] is False] == [why]
    assert verdicts(rows, "good") == {"fine": True}
    wrong = next(line for line in printed.splitlines() if line.startswith("WRONG"))
    assert wrong == f"WRONG bad: second: {why}"


def test_where_a_process_hung_is_in_the_failures(contact, tmp_path):
    contact((stage("bad", f"hang_here = lambda: threading.Event().wait(); {HANGS}", 2),))
    said = (tmp_path / "out/failures.txt").read_text()
    assert "## bad: second" in said and "threading.py" in said and "in wait" in said


@pytest.mark.parametrize(
    ("code", "item", "why"),
    [
        ("import not_here", "a process", "ended with status 1 before its first item"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "a process", "was killed by SIGKILL"),
        ("pass", "a process", "ended, and said nothing"),
        ("open(notes.task.rows, 'wb').write(b'\\xff{garbage\\n')", "a process", "wrote what is no note"),
        (
            "open(notes.task.rows, 'w').write('[1, 2]\\n{}\\n{\"item\": 3}\\n')",
            "a process",
            "wrote what is no note",
        ),
        ("open(notes.task.rows, 'w').write('{\"item\": \"cut off')", "a process", "wrote what is no note"),
        ("notes.begin('x'); os._exit(0)", "x", "its process ended with status 0"),
    ],
)
def test_a_process_that_does_not_get_so_far_is_told_and_the_others_go_on(code, item, why, contact):
    status, rows, _ = contact((stage("bad", code),), (GOOD,))
    bad = [row for row in rows if row["stage"] == "bad"]
    assert status == 1 and bad and all(row["ok"] is False and row["item"] == item for row in bad)
    assert why in bad[0]["why"] and verdicts(rows, "good") == {"fine": True}


def test_a_stage_that_prints_without_end_of_any_bytes_does_no_harm(contact, tmp_path):
    noise = "[os.write(1, bytes(range(256)) * 256) for _ in range(500)]; "
    status, rows, printed = contact((stage("loud", noise + "notes.run('fine', lambda: {})"),))
    assert status == 0 and verdicts(rows, "loud") == {"fine": True} and len(printed) < 1000
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 10_000


def test_a_broken_device_ends_the_process_and_another_goes_on_behind_it(contact):
    code = "notes.healthy = lambda: 'an illegal memory access'; " + RAISES
    status, rows, _ = contact((stage("bad", code),))
    assert status == 1
    assert verdicts(rows, "bad") == {
        "first": True, "second": False, "second: the device": False, "third": True
    }  # fmt: skip


def test_the_time_of_a_stage_ends_it_with_all_that_it_began_and_the_next_has_its_own(contact, tmp_path):
    child = "subprocess.Popen(['sleep', '600']).pid"
    code = f"import subprocess; open({str(tmp_path / 'pid')!r}, 'w').write(str({child})); "
    code += "notes.plan(5); notes.run('first', lambda: {}); notes.run('endless', lambda: threading.Event().wait())"
    status, rows, printed = contact((stage("slow", code),), (GOOD,), seconds=20.0)
    assert status == 0, "what there was no time for is not wrong"
    assert verdicts(rows, "slow") == {"first": True, "endless": None, "the rest": None} and verdicts(
        rows, "good"
    ) == {"fine": True}
    assert "left out slow: the rest: 3 of 5 were not begun" in printed
    assert "left out slow: endless: the time of the stage was up in the middle of it" in printed
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(process):
    """Tell whether a process has ended; one that nobody has waited for is still listed, as a zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_parts_run_side_by_side_and_their_notes_are_all_kept(contact):
    code = "[notes.run(f'{notes.task.part} of {notes.task.parts}, {i}', lambda: {}) for i in range(40)]"
    status, rows, _ = contact((stage("many", code, parts=3), GOOD))
    assert status == 0 and len(verdicts(rows, "many")) == 120 and verdicts(rows, "good") == {"fine": True}


def test_a_machine_on_which_nothing_runs_is_one_line_and_two(contact):
    code = "notes.write('this machine', False, why='no GPU', fatal='no GPU: run the rehearsal')"
    status, rows, printed = contact((stage("env", code),), (GOOD,))
    assert status == 2 and verdicts(rows, "good") == {}
    assert [line for line in printed.splitlines() if "GPU" in line] == ["no GPU: run the rehearsal"]


ALONE = """
import sys
from pathlib import Path
from benchmarks.first_contact.driver import Settings, run
from tests.first_contact.test_driver import GOOD, stage
endless = stage("endless", "notes.run('wait', lambda: threading.Event().wait())")
out = Path(sys.argv[1])
[(out / name).mkdir() for name in ("out", "work")]
sys.exit(run([(endless,), (GOOD,)], Settings(600, out / "out", out / "work", cpus=1)))
"""


@pytest.fixture
def endless(tmp_path):
    """A driver in a process of its own, in the middle of an endless stage."""
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) as driver:
        signalled = next((tmp_path / "work").glob("*/*.done"), None)
        while (signalled is None or not signalled.read_text()) and driver.poll() is None:
            time.sleep(0.02)
            signalled = next((tmp_path / "work").glob("*/*.done"), None)
        yield driver
        driver.kill()


def test_ctrl_c_ends_the_stage_and_the_next_one_runs(endless):
    endless.send_signal(signal.SIGINT)
    printed, _ = endless.communicate()
    assert endless.returncode == 0, printed
    assert "left out endless: wait: Ctrl+C ended the stage in the middle of it" in printed
    assert "1 right" in printed and "it went well" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_with_the_summary(number, endless, tmp_path):
    endless.send_signal(number)
    printed, _ = endless.communicate()
    assert endless.returncode == 128 + number, printed
    assert f"{number.name} ended the run" in printed and "it went well" not in printed
    assert list((tmp_path / "work").iterdir()) == []


def test_processes_end_when_their_driver_is_killed(endless, tmp_path):
    [notes] = (tmp_path / "work").glob("*/*.notes.log")
    child = int(
        subprocess.run(["pgrep", "-P", str(endless.pid)], capture_output=True, text=True).stdout.split()[0]
    )
    endless.kill()
    while not is_gone(child):
        time.sleep(0.05)
    assert "the driver is gone" in notes.read_text()


def test_the_summary_begins_with_what_is_wrong_joins_what_is_alike_and_stays_short():
    rows = [
        {"stage": "checks", "item": f"good {i}", "ok": True, "group": "linear", "error": i / 1e4}
        for i in range(5)
    ]
    rows += [
        {
            "stage": "checks",
            "item": f"bad {i}",
            "ok": False,
            "group": "linear",
            "why": "the device answers no more",
        }
        for i in range(300)
    ]
    rows += [{"stage": "tests", "item": f"other {i}", "ok": False, "why": f"error {i}"} for i in range(300)]
    rows += [{"stage": "tables", "item": str(i), "ok": True, "say": "x" * 400} for i in range(300)]
    lines = write_summary(rows, {"checks": "C", "tests": "T", "tables": "B"}, "/out").splitlines()
    assert lines[0].startswith("=== 600 WRONG, 305 right, 0 left out")
    assert lines[1] == "WRONG checks: bad 0 (and 299 more): the device answers no more"
    assert lines[-1] == "Everything is in /out" and sum(map(len, lines)) + len(lines) <= LONGEST + 1
    assert "  linear: 5 of 305 right, largest error 0.0004 (good 4)" in lines


def test_stages_are_chosen_by_name_in_their_own_order():
    groups = chosen(["tests", "env"])
    assert [[stage.name for stage in group] for group in groups] == [["env"], ["tests"]]
    assert chosen([]) == [tuple(group) for group in GROUPS]
    with pytest.raises(ValueError, match="no stage 'chekcs': choose among env, checks"):
        chosen(["chekcs"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", "all"], "there is no stage 'all'"),
        (["--seconds", "3"], "--seconds 3: expected 20 or more"),
        (["--seconds", "nan"], "--seconds nan: expected 20 or more"),
        (["--cpus", "0"], "--cpus 0: expected 1 or more"),
    ],
)
def test_a_bad_option_is_answered_by_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        read_settings(arguments)
    assert end.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_the_driver_needs_no_package():
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'triton', 'numpy', 'pymllm'))\n"
    code += "import benchmarks.first_contact.__main__, benchmarks.first_contact.child"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
