"""The files of the page at `/` (`page/`), with the headers that keep it to itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"

# Not the system's table: on some systems that says text/plain for scripts, which browsers then refuse.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The page asks nobody but this server, and no text becomes HTML or a script, whatever a model answers.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, but asked for anew by its ETag, so that another version of the package shows at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page.  path: where it is served.  etag: changes with the content."""

    path: str
    content: bytes
    media_type: str
    etag: str

    @property
    def headers(self) -> dict[str, str]:
        return {**HEADERS, "ETag": self.etag}

    def is_known(self, if_none_match: str | None) -> bool:
        """Return whether a client that sends this header has the content already."""
        known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        return self.etag in known or known == ["*"]


@cache
def page_files() -> tuple[PageFile, ...]:
    """Read the files of the page, each below /page/, and index.html at / alone."""
    files = []
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            where = "/" if path.name == "index.html" else f"/page/{path.name}"
            files.append(PageFile(where, content, TYPES[path.suffix], etag))
    return tuple(files)


def page_paths() -> frozenset[str]:
    """Return the paths of the page, which need no API key."""
    return frozenset(file.path for file in page_files())
