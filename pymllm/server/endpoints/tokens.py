"""/tokenize and /detokenize: texts as token ids, and back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from pymllm.errors import RequestError
from pymllm.server.gate import read_body
from pymllm.server.protocol.base import read_request
from pymllm.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from pymllm.server.service import Service
from pymllm.server.streaming import unless_gone

# Of what tokenizers take for an id.
MAX_TOKEN = (1 << 31) - 1

# Of a list that is written at a time.
PART = 1 << 14


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /tokenize and /detokenize."""
    # One thread: others' prompts do not wait for long texts.
    thread = ThreadPoolExecutor(1, "tokens")

    async def answer(request: Request, make: Callable[[Service, bytes], dict[str, Any]]) -> Response:
        with service.worker.place():
            body, loop = await read_body(request), asyncio.get_running_loop()
            made = loop.run_in_executor(thread, lambda: _spelled(make(service, body)))
            return Response(await unless_gone(request, made), media_type="application/json")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await answer(request, _tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await answer(request, _detokenize)


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    request = read_request(TokenizeRequest, body)
    service.adapter_of(request.model)
    tokenizer = service.llm.tokenizer
    if request.prompt is not None:
        ids = tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    else:
        ids = service.prompt_of(request.as_chat())
    spelled = [tokenizer.encoder.piece(token) for token in ids] if request.return_token_strs else None
    longest = service.llm.plan.kv_cache.get("max_model_len")
    return {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": spelled}


def _spelled(answer: dict[str, Any]) -> str:
    """Write an answer as JSON, its long lists in parts: between these other threads have their turn."""
    fields = []
    for name, value in answer.items():
        if isinstance(value, list):
            parts = (value[begin : begin + PART] for begin in range(0, len(value), PART))
            text = "[" + ", ".join(json.dumps(part, ensure_ascii=False)[1:-1] for part in parts) + "]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        fields.append(f"{json.dumps(name)}: {text}")
    return "{" + ", ".join(fields) + "}"


def _detokenize(service: Service, body: bytes) -> dict[str, Any]:
    request = read_request(DetokenizeRequest, body)
    service.adapter_of(request.model)
    tokenizer = service.llm.tokenizer
    for token in dict.fromkeys(request.tokens):
        if token > MAX_TOKEN or tokenizer.encoder.piece(token) is None:
            raise RequestError(
                f"tokens has {token}, which is no token of this model", code="parameter", tensor="tokens"
            )
    return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}
