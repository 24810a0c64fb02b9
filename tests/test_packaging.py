"""What the package index will be told: the name, the extras, the page; and what users are told to install."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from pymllm.errors import DISTRIBUTION, install_command

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REQUIRED = [
    "torch>=2",
    'fastapi>=0.115; extra == "server"',
    'uvicorn<0.55,>=0.30; extra == "server"',
    f'{DISTRIBUTION}[server]; extra == "ray"',
    'ray[serve]>=2.60; extra == "ray"',
    'elsewhere; sys_platform == "plan9" and extra == "ray"',
]


def test_the_name_is_one_and_its_extras_name_it():
    project = PYPROJECT["project"]
    assert project["name"] == DISTRIBUTION
    brought = [text for needed in project["optional-dependencies"].values() for text in needed]
    own = [text for text in brought if text.startswith("pymllm")]
    assert own and all(text.startswith(f"{DISTRIBUTION}[") for text in own)
    named = {extra for text in own for extra in re.search(r"\[(.*)\]", text)[1].split(",")}
    assert named <= project["optional-dependencies"].keys()


def test_types_travel_along():
    assert (ROOT / "pymllm/py.typed").is_file()


def test_a_missing_extra_is_installed_by_the_names_of_its_packages(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: REQUIRED if name == DISTRIBUTION else None
    )
    ask = install_command.__wrapped__
    assert ask("server") == "pip install 'fastapi>=0.115' 'uvicorn<0.55,>=0.30'"
    assert ask("ray") == "pip install 'fastapi>=0.115' 'ray[serve]>=2.60' 'uvicorn<0.55,>=0.30'"


def test_without_metadata_the_extra_itself_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert install_command.__wrapped__("plot") == f"pip install '{DISTRIBUTION}[plot]'"


def test_links_of_the_readme_live_on_an_index_page():
    """The substitutions of pyproject.toml, applied as the build applies them."""
    text = (ROOT / "README.md").read_text("utf-8")
    for one in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    source = PYPROJECT["project"]["urls"]["Source"]
    assert links and all(link.startswith(("https://", "#")) for link in links)
    for link in links:
        if link.startswith(
            (f"{source}/blob/main/", source.replace("github.com", "raw.githubusercontent.com"))
        ):
            path = link.partition("/main/")[2].partition("#")[0]
            assert (ROOT / path).exists(), link


READ = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "Makefile",
    *sorted((ROOT / "docs").glob("*.md")),
]
READ += [*sorted((ROOT / "deploy").iterdir()), *sorted((ROOT / "quantization").rglob("*.md"))]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_installs_another_project_s_package(page):
    """`pymllm` on the package index is not this project."""
    text = page.read_text("utf-8")
    assert not re.search(r"pip install (-\S+ )*'?pymllm(\b(?!-dispatch))", text)
    # Nor does the installed package have that name.
    assert not re.search(r"metadata\.\w+\([\"']pymllm[\"']\)", text)
