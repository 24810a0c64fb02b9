"""Who may ask a server that needs no key: a web page from elsewhere must not reach it through this machine's browser.

A page's scripts may send requests to 127.0.0.1, and a name that its owner points there (DNS rebinding) makes them look
like the server's own. So the name that a request was sent to (Host) and the page it came from (Origin) are checked.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from pymllm.server.gate import OPEN_PATH, error_response

ANY = "*"


class OriginCheck:
    """The refusal, with 403, of what foreign pages send to a loopback address.

    allowed_hosts: names that are the server's own beside those of loopback; "*": any.  origins: pages that may ask
    (`--cors`); "*": any.
    """

    def __init__(
        self, app: ASGIApp, allowed_hosts: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        self.app = app
        self.allowed_hosts = {name.lower().strip("[]") for name in allowed_hosts}
        self.origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._why_foreign(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await error_response(403, refusal, code="foreign_origin")(scope, receive, send)

    def _why_foreign(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        server = scope.get("server")
        if scope["path"] == OPEN_PATH or server is None or not is_loopback(server[0]):
            return None
        headers: dict[bytes, str] = {}
        for name, value in scope["headers"]:
            said = value.decode("latin-1").strip().lower()
            if name in (b"host", b"origin") and headers.setdefault(name, said) != said:
                return f"the request has two different headers {name.decode()}"
        host, origin = headers.get(b"host"), headers.get(b"origin")
        # A browser always sends a Host.
        if host is not None and ANY not in self.allowed_hosts and not self._is_own(name_of(host)):
            return (
                "the request was sent to a name that is not this server's; "
                "--allowed-host NAME makes it so, or give the server an API key"
            )
        if origin is None or ANY in self.origins or origin.rstrip("/") in self.origins:
            return None
        if host is not None and origin in (f"http://{host}", f"https://{host}"):
            return None
        return "pages of this origin may not ask this server; --cors ORIGIN lets them"

    def _is_own(self, name: str | None) -> bool:
        if name is None:
            return False
        return is_loopback(name) or name.rstrip(".") in self.allowed_hosts


def name_of(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if there is none."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  it raises for what is no port
    except ValueError:
        return None
    plain = parts.hostname if not (parts.path or parts.query or parts.fragment or parts.username) else None
    return plain or None


def is_loopback(name: str) -> bool:
    """Tell whether a name or an address is this machine's own."""
    bare = name.rstrip(".")
    if bare == "localhost" or bare.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
