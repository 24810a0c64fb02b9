"""docs/structure.md and the linter's layers against the tree."""

from __future__ import annotations

import re
from pathlib import Path

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
    folders = {"kernels/", "quantization/", "tests/", "benchmarks/", "examples/"}
    assert set(re.findall(r"^([a-z]+/) ", TREE, re.MULTILINE)) == folders
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_every_file_that_the_page_names_is_there():
    files = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("*/**/*")
        if path.suffix in (".py", ".md", ".h")
    }
    places = {f"/{file}" for file in files} | {f"/{Path(file).parent.as_posix()}/" for file in files}
    named = {name for name in PATH.findall(PAGE) if "<" not in name}
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
