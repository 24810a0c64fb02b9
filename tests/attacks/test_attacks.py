"""What was found once, and mended: each folder here is judged again, and ends as its case.json says.

`python -m tests.fuzz` writes such folders. files/: the input.  case.json: its kind, which good thing it was made from,
what was changed, what the change means, and the verdict: "same", or "refused: CODE".
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..fuzz.children import Child
from ..fuzz.inputs import Input
from ..fuzz.kinds import KINDS

HERE = Path(__file__).parent
CASES = sorted(path.parent for path in HERE.glob("*/case.json"))


@pytest.fixture(scope="session")
def children(tmp_path_factory):
    """A child of each kind, made when it is first asked for."""
    made = {}

    def child_of(name):
        if name not in made:
            kind = KINDS[name]()
            kind.prepare(tmp_path_factory.mktemp(name))
            made[name] = Child(kind)
        return made[name]

    yield child_of
    for child in made.values():
        child.stop()


def read(case: Path) -> Input:
    facts = json.loads((case / "case.json").read_text())
    files = case / "files"
    held = {
        path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
    }
    return Input(facts["subject"], held, facts["changed"], facts["meaning"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_attack_ends_as_it_must(case, children):
    facts = json.loads((case / "case.json").read_text())
    assert str(children(facts["kind"]).judge(read(case))) == facts["verdict"]


def test_no_attack_ends_badly():
    assert all(
        json.loads((case / "case.json").read_text())["verdict"].startswith(("same", "refused: "))
        for case in CASES
    )
