"""/: the page for people, and its files."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pymllm.server.page_files import PageFile, page_files
from pymllm.server.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add / and the files below /page/."""
    for file in page_files():
        _add_file(app, file)


def _add_file(app: FastAPI, file: PageFile) -> None:
    @app.api_route(file.path, methods=["GET", "HEAD"])
    async def page_file(request: Request) -> Response:
        if file.is_known(request.headers.get("if-none-match")):
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, media_type=file.media_type, headers=file.headers)
