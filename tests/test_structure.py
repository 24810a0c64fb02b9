"""docs/structure.md and the linter's layers against the tree, and the rules that `structure.py` counts."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

from . import structure

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
TREE = PAGE.split("```")[1]
PARTS = re.findall(r"^  ([a-z_]+(?:\.py|/)) ", TREE, re.MULTILINE)  # what begins a line below pymllm/
PATH = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md|h))?|[\w-]+\.(?:py|md|h))(?![\w/])")


def parts_of_the_package() -> set[str]:
    """Modules and packages of pymllm/, and folders of data."""
    here = [path for path in (ROOT / "pymllm").iterdir() if not path.name.startswith(("__", "_native", "."))]
    folders = {f"{path.name}/" for path in here if path.is_dir() and any(path.iterdir())}
    return folders | {path.name for path in here if path.suffix == ".py"}


def test_the_page_has_every_part_of_the_package_once():
    assert sorted(PARTS) == sorted(parts_of_the_package())


def test_the_page_has_the_folders_of_the_repository():
    folders = {"kernels/", "quantization/", "tests/", "benchmarks/", "deploy/", "examples/"}
    assert set(re.findall(r"^([a-z]+/) ", TREE, re.MULTILINE)) == folders
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_every_file_that_the_page_names_is_there():
    files = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("*/**/*")
        if path.suffix in (".py", ".md", ".h", ".yaml")
    }
    places = {f"/{file}" for file in files} | {f"/{Path(file).parent.as_posix()}/" for file in files}
    named = {name.removeprefix("../") for name in PATH.findall(PAGE) if "<" not in name}
    assert len(named) > 60
    missing = [name for name in named if not any(place.endswith(f"/{name}") for place in places)]
    assert missing == []


def test_parts_are_listed_from_the_top_of_the_linter_s_layers_down():
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\nlayers = [")[1].split("\n]")[0]
    layers = [re.findall(r"\w+", line) for line in section.splitlines()]
    level = {part: index for index, layer in enumerate(layers) for part in layer}
    listed = [level[name] for part in PARTS if (name := part.removesuffix(".py").rstrip("/")) in level]
    assert listed == sorted(listed)
    assert set(level) == {part.removesuffix(".py").rstrip("/") for part in parts_of_the_package()} - {
        "shipped_model"
    }


def test_no_modules_and_no_rooms_import_each_other():
    graph = structure.imports(structure.modules())
    assert structure.circles(graph) == []
    assert structure.circles(structure.between_rooms(graph)) == []


def test_rooms_above_the_layers_ask_the_protocol_and_not_for_kinds():
    """`layers/held.py` is what planning, loading, checking, swapping and writing go by."""
    assert len(structure.kind_questions(structure.modules())) <= 7  # a module's own kinds, and calibration


def test_docstrings_of_functions_open_with_a_verb_and_of_classes_with_a_noun():
    """The rule and examples: CONTRIBUTING.md, "English". A verb that is missing goes into `VERB_NAMES`."""
    assert list(structure.odd_docstrings(structure.modules())) == []


def test_no_module_is_longer_than_500_lines():
    assert {name: count for name, count in structure.lines().items() if count > 500} == {}


CIRCLE = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
ODD = """
def what(): "What it does."
def the(): "The sum of two numbers."
def add(): "Add two numbers."
def shapes(): "x: [T, H].  Returns [T, H]."
class Reads: "Reads a file."
class Reader: "A reader of files."
class Which: "Which file is read."
class Prop:
    "A thing."
    @property
    def name(self): "The name."
    @property
    def why(self): "Why it has one."
"""


def test_the_counters_find_what_they_look_for():
    assert structure.circles(CIRCLE) == [["a", "b", "c"]]
    odd = [line.split(" ")[1].rstrip(":") for line in structure.odd_docstrings({"pymllm.m": ast.parse(ODD)})]
    assert sorted(odd) == sorted(["what", "the", "shapes", "Reads", "Which", "why"])
    asks = ast.parse("isinstance(x, (nn.Linear, RMSNorm))\nisinstance(x, dict)")
    assert structure.kind_questions({"pymllm.loading.m": asks}) == ["pymllm.loading.m:1 Linear"]
    assert structure.kind_questions({"pymllm.layers.m": asks}) == []
    lazy = "def f():\n    import pymllm.b\nif TYPE_CHECKING:\n    import pymllm.c\n"
    trees = {"pymllm.a": ast.parse(lazy), "pymllm.b": ast.parse(""), "pymllm.c": ast.parse("")}
    assert structure.imports(trees)["pymllm.a"] == {"pymllm.b"}


def test_what_scripts_outside_the_package_import_of_it_is_there():
    """Linters read the package alone, and many scripts need a GPU or another program to run."""
    missing = []
    for script in (*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("docs/**/*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pymllm":
                module = importlib.import_module(node.module)
                for name in {alias.name for alias in node.names} - {"_native"}:
                    if (
                        not hasattr(module, name)
                        and not (Path(module.__file__).parent / f"{name}.py").exists()
                    ):
                        missing.append(f"{script.relative_to(ROOT)}:{node.lineno} {node.module}.{name}")
    assert missing == []
