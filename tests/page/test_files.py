"""The page's files over HTTP: types, caching, headers, and what needs the key.  No browser is needed."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from pymllm.server.page_files import FOLDER, page_files
from tests.server.conftest import serve

FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def path_of(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/page/{file.name}"


@pytest.fixture(scope="module")
def locked(llm):
    with serve(llm, api_key="secret") as running, httpx.Client(base_url=running.url) as client:
        yield client


def test_every_file_is_served_without_a_key_and_with_its_type(locked):
    assert {file.path for file in page_files()} == {path_of(file) for file in FILES}
    for file in FILES:
        response = locked.get(path_of(file))
        assert (response.status_code, response.content) == (200, file.read_bytes())
        assert response.headers["content-type"].split(";")[0] == TYPES[file.suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert (
            policy["default-src"] == "'self'" and policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        )
        assert not re.search("unsafe|https?:|\\*", response.headers["content-security-policy"])


def test_a_file_that_is_known_is_not_sent_again(locked):
    for file in FILES:
        first = locked.get(path_of(file))
        assert "no-cache" in first.headers["cache-control"]
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"another", {tag}', "*"):
            again = locked.get(path_of(file), headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert locked.get(path_of(file), headers={"If-None-Match": '"another"'}).status_code == 200
    assert len({locked.get(path_of(file)).headers["etag"] for file in FILES}) == len(FILES)


def test_head_tells_what_get_would(locked):
    head, get = locked.head("/"), locked.get("/")
    assert head.content == b"" and head.headers["content-length"] == str(len(get.content))
    assert head.headers["etag"] == get.headers["etag"]


@pytest.mark.parametrize(
    "path",
    ["/plan", "/v1/models", "/page", "/page/", "/page/../plan", "/page/%2e%2e/plan", "/page/..%2fplan", "//",
     "/page/app.js/", "/page/app.js/../../plan", "/page/app.js%00", "/page/..%2f..%2fservice.py", "/PAGE/app.js"],
)  # fmt: skip
def test_nothing_else_is_open(locked, path):
    response = locked.get(
        httpx.URL(scheme="http", host="127.0.0.1", port=locked.base_url.port, raw_path=path.encode())
    )
    assert response.status_code == 401, path
    assert "llama" not in response.text


def test_the_plan_is_the_model_s(locked, llm):
    got = locked.get("/plan", headers={"Authorization": "Bearer secret"})
    assert got.json() == llm.plan.to_dict()


def test_the_page_asks_nobody_else_and_makes_no_html():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        urls = set(re.findall(r"https?://[\w.]+[^\s\"'`<>)]*", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, file.name
        made = r"(inner|outer|insertAdjacent)HTML|document\.write|eval\(|new Function|srcdoc|DOMParser|Fragment\("
        assert not re.search(made, text), file.name
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)


def test_every_module_is_asked_for_at_once_and_none_is_long():
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert {path.name for path in SCRIPTS} == set(re.findall(r"page/(\w+\.js)", html))
    assert {path.name for path in FILES if path.suffix == ".css"} == set(re.findall(r"page/(\w+\.css)", html))
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    known = {path.name for path in SCRIPTS}
    for path in SCRIPTS:
        assert set(re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))) <= known
