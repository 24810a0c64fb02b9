"""What is taken in: requests are counted here, and refused beyond the limits; /health never is."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pymllm.server.gate import error_response
from pymllm.server.traffic import Traffic

# They are answered from memory, at once, and those who watch a server ask for them when it is at its worst.
UNCOUNTED = ("/health", "/metrics")
CODES = {"stopping": "shutting_down", "unhealthy": "unhealthy"}


class Admission:
    """The count of the requests under way, in ASGI: those beyond what the server takes get 503 and Retry-After."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app, self.traffic = app, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        refusal = self.traffic.why_refused(state.get("surplus", False))
        if refusal is None:
            self.traffic.under_way += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.traffic.under_way -= 1
            return
        label, words = refusal
        state["refusal"] = label
        headers = {"Retry-After": self.traffic.retry_after()}
        if label != "unhealthy":
            # The connection makes room for others.
            headers["Connection"] = "close"
        response = error_response(503, words, code=CODES.get(label, "overloaded"), headers=headers)
        await response(scope, receive, send)
