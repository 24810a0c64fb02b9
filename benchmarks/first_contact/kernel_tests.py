"""The stage `tests`: the tests of the GPU kernels, compiled. pytest runs in this process; each test is an item.

A process that hangs or dies in a test, or whose device it broke, is begun again without the tests that it had begun.
"""

from __future__ import annotations

import re
from typing import Any

from .driver import ROOT
from .notes import Notes

# Those of ahead_of_time compile for minutes; those of the tables run in the interpreter alone.
FOLDER, WITHOUT = "tests/kernels/triton", ("test_ahead_of_time.py", "test_gpu_tables.py")
MORE = ("tests/kernels/test_hardware.py", "tests/engine/test_graphs.py")
REHEARSED = ("test_routing.py", "test_elementwise.py")  # of each, two tests
MISSING = re.compile(r"(?:ModuleNotFoundError: No module named|could not import) '([\w.]+)'")
OURS = ("pymllm", "tests", "benchmarks")


def files(rehearse: bool) -> list[str]:
    """Return the files of tests, from the root of the clone."""
    names = sorted(path.name for path in (ROOT / FOLDER).glob("test_*.py") if path.name not in WITHOUT)
    if rehearse:
        return [f"{FOLDER}/{name}" for name in names if name in REHEARSED]
    return [f"{FOLDER}/{name}" for name in names] + [name for name in MORE if (ROOT / name).exists()]


def missing_package(text: str) -> str | None:
    """Return the package whose absence made a test fail; None: it is no other's package, or another reason."""
    found = MISSING.search(text)
    name = found[1].partition(".")[0] if found else None
    return None if name in OURS else name


class Plugin:
    """The notes of each test, as pytest runs them."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self._problem: Any = None
        self._skipped: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep this process's share of what was not begun: neighbours in a file, which share compiled kernels."""
        task, by_file = self.notes.task, {}
        for item in items:
            by_file.setdefault(item.nodeid.partition("::")[0], []).append(item)
        kept = []
        for mine in by_file.values():
            if task.rehearse:
                mine = mine[:: max(1, len(mine) // 2)][:2]
            size = -(-len(mine) // task.parts)
            kept += mine[task.part * size : (task.part + 1) * size]
        self.notes.plan(len(kept))
        items[:] = [item for item in kept if item.nodeid not in self.notes.begun]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.notes.task.part == 0 and report.nodeid not in self.notes.begun:
            self._note(report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._problem = self._skipped = None
        self.notes.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self._problem is None:
            self._problem = report.longrepr
        elif report.skipped:
            self._skipped = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self._problem is not None:
            self._note(nodeid, str(self._problem))
        elif self._skipped is not None:
            self.notes.write(nodeid, None, why=self._skipped[-300:], group=_group(nodeid))
        else:
            self.notes.write(nodeid, True, group=_group(nodeid))

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        """Begin no test once the time is up."""
        return None if self.notes.task.left > 1 else True

    def _note(self, nodeid: str, text: str) -> None:
        package = missing_package(text)
        if package is not None:
            self.notes.write(nodeid, None, why=f"needs the package {package}", group=_group(nodeid))
            return
        self.notes.wrong(nodeid, FailedTest(text), group=_group(nodeid))


class FailedTest(Exception):
    """A test that failed, with pytest's words; the message is their last line of the error."""

    def __init__(self, text: str) -> None:
        errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "failed")
        super().__init__(f"{errors[0] if errors else last}\n{text[-1800:]}")


def _group(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")


def run(notes: Notes) -> None:
    try:
        import pytest
    except ImportError:
        notes.write("all tests", None, why="needs the package pytest")
        return
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--rootdir",
        str(ROOT),
        *files(notes.task.rehearse),
    ]
    status = pytest.main(arguments, plugins=[Plugin(notes)])
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        notes.write("pytest", False, why=f"ended with {pytest.ExitCode(status).name}: see what it printed")
