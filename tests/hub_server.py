"""A hub on this machine for tests: the few endpoints that huggingface_hub asks, and a count of the bytes it gave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Sparse:
    """A file of `size` bytes of which only the first ones can be read, as of a model that is too large to make."""

    def __init__(self, start: bytes, size: int) -> None:
        self.start, self.size = start, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        assert part.stop <= len(self.start), f"bytes {part.start} to {part.stop} were asked for"
        return self.start[part]


class MockHub:
    """A hub with repositories of files by name.

    repositories: files by name, by repository.  given: bytes of bodies by file.  faults: what a file's GET answers in
    place of its bytes: a status, "whole" (ignores ranges), "short", "elsewhere" (another range).
    gated: repositories that answer 403.  moved: new names of repositories.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, Any]]) -> None:
        self.repositories = {repo: dict(files) for repo, files in repositories.items()}
        self.given: Counter[str] = Counter()
        self.faults: dict[str, int | str] = {}
        self.gated: set[str] = set()
        self.moved: dict[str, str] = {}
        self.to_cdn = False
        self.authorized_cdn = 0  # requests that took the token to another host
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for a head and its body, or each waits for the other's acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
                self.send_response(status)
                headers.setdefault("Content_Length", len(body))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                self.wfile.flush()

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/cdn/"):
                    hub.authorized_cdn += "Authorization" in self.headers
                    path, at_cdn = path.removeprefix("/cdn"), True
                else:
                    at_cdn = False
                api = re.fullmatch(
                    r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/([^/]+).*)?)?", path
                )
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                found = api or file
                if found is None:
                    return self.reply(404)
                repo, revision = found[1], (found[3] if api else found[2]) or "main"
                if repo in hub.moved:
                    return self.reply(307, Location=self.path.replace(repo, hub.moved[repo]))
                if repo not in hub.repositories:
                    return self.reply(
                        401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                    )
                files = hub.repositories[repo]
                if api and api[2] == "refs":
                    refs = [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}]
                    listed = {"branches": refs, "tags": [], "converts": []}
                    return self.reply(200, json.dumps(listed).encode(), Content_Type="application/json")
                if revision not in ("main", COMMIT):
                    return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
                if api and api[2] == "tree":
                    tree = [
                        {"type": "file", "path": name, "size": len(data), "oid": _etag(repo, name, data)}
                        for name, data in files.items()
                    ]
                    return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
                if api:
                    listed = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                    info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": listed, "tags": [],
                            "private": False, "downloads": 0, "likes": 0, "gated": repo in hub.gated}  # fmt: skip
                    return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
                assert file is not None
                return self.give(repo, file[3], at_cdn)

            def give(self, repo: str, name: str, at_cdn: bool) -> None:
                if repo in hub.gated:
                    return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
                data = hub.repositories[repo].get(name)
                if data is None:
                    return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
                headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{_etag(repo, name, data)}"'}
                if self.command == "HEAD":
                    return self.reply(200, Content_Length=len(data), **headers)
                if hub.to_cdn and not at_cdn:
                    return self.reply(302, Location=f"{hub.cdn}{self.path}", **headers)
                fault = hub.faults.get(name)
                if isinstance(fault, int):
                    return self.reply(fault, **headers)
                asked = RANGE.fullmatch(self.headers.get("Range", ""))
                start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
                if fault == "whole":
                    start, stop, asked = 0, len(data), None
                if fault == "elsewhere":
                    start, stop = start + 1, min(stop + 1, len(data))
                part = bytes(data[start:stop])
                if asked:
                    headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                if fault == "short":
                    part = part[: len(part) // 2]
                hub.given[name] += len(part)
                self.reply(206 if asked else 200, part, **headers)

        return Handler


def _etag(repo: str, name: str, data: Any) -> str:
    head = bytes(data) if not isinstance(data, Sparse) else data.start
    return hashlib.sha1(f"{repo} {name}".encode() + head).hexdigest()
