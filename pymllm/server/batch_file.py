"""Requests from a file of lines, answered into another: OpenAI's batch format, or plain bodies.

A line of OpenAI's format is {"custom_id", "method": "POST", "url", "body"}. A plain line is a body, with or without a
`custom_id` beside its parameters; `prompt`, `messages` or `input` tells which endpoint's it is. The answer to each is
one line, {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}, written as soon as it is
there: in the order in which they finish. Lines whose answers are there already are not answered again.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from pymllm.disk import cannot_write, reading, writing
from pymllm.errors import ConfigError, PymllmError, RequestError
from pymllm.server.anthropic_words import anthropic_error, speaks_anthropic
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.server.protocol.base import parse_json, refuse
from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.protocol.completions import CompletionRequest
from pymllm.server.protocol.conversation import ConversationRequest
from pymllm.server.protocol.embeddings import EmbeddingRequest
from pymllm.server.protocol.responses import ResponsesRequest
from pymllm.server.protocol.sampled import SampledRequest
from pymllm.server.refusals import error_body, refusal_of
from pymllm.server.service import Service

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger("pymllm")

# What the server takes as a body at most; a line has little beside it.
MAX_LINE_BYTES = 4 << 20

# Each endpoint and its kind of request.
ENDPOINTS: Mapping[str, type[SampledRequest] | type[ConversationRequest] | type[EmbeddingRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
}
# The parameter of a plain line, and the endpoint that it tells.
TOLD_BY = {"prompt": "/v1/completions", "messages": "/v1/chat/completions", "input": "/v1/embeddings"}
FRAME = ("method", "url", "body")

# How each line of the output begins.
BEGINNING = b'{"id": "batch_req_'

# Behind the name of a line that could not be read, so that it is not taken for the custom_id of another.
FAULT = "\0"


@dataclass
class Counts:
    """The numbers of lines: answered, failed with an error, and skipped as they had been answered before."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Line:
    """One line of the input: its number, its id, and what it asks, or why that cannot be told."""

    number: int
    custom_id: str
    url: str = ""
    body: Any = None
    fault: RequestError | None = None

    def is_among(self, done: set[int]) -> bool:
        """Tell whether these digests, which `recover` found, have that of its answer."""
        named_by_number = self.custom_id == _name(self.number)
        return _digest(self.custom_id) in done or (
            named_by_number and _digest(self.custom_id + FAULT) in done
        )


def count_lines(source: Path) -> int:
    """Count the lines of a file, a piece at a time."""
    count, last = 0, b"\n"
    with reading(source, "batch-input"), open(source, "rb") as file:
        while piece := file.read(1 << 20):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def read_lines(source: IO[bytes]) -> Iterator[Line | None]:
    """Read requests from a file, one at a time.  None for an empty line.

    A line that cannot be read, or whose id another line has had, is called line-N, and has a fault.
    """
    seen: set[int] = set()
    path = Path(str(getattr(source, "name", "the input")))

    def read(most: int) -> bytes:
        with reading(path, "batch-input"):
            return source.readline(most)

    for number, raw in enumerate(iter(lambda: read(MAX_LINE_BYTES + 1), b""), 1):
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        long = len(raw) > MAX_LINE_BYTES
        while long and not raw.endswith(b"\n"):
            raw = read(MAX_LINE_BYTES)
            if not raw:
                break
        if not long and not raw.strip():
            yield None
            continue
        try:
            if long:
                raise RequestError(
                    "the line is too long", code="line-too-long", expected=f"at most {MAX_LINE_BYTES} bytes"
                )
            line = _read_line(number, raw)
            if _digest(line.custom_id) in seen:
                raise RequestError(
                    f"an earlier line has the custom_id {line.custom_id!r}",
                    code="custom_id",
                    tensor="custom_id",
                )
            seen.add(_digest(line.custom_id))
        except RequestError as error:
            line = Line(number, _name(number), fault=error)
        yield line


def _name(number: int) -> str:
    return f"line-{number}"


def _digest(custom_id: str) -> int:
    # A quarter of the memory of the id itself: there may be millions.
    return int.from_bytes(
        hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=8).digest(), "big"
    )


def _read_line(number: int, raw: bytes) -> Line:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("a line must be a JSON object", code="json", found=type(value).__name__)
    custom_id = value.pop("custom_id", None)
    if custom_id is None:
        custom_id = _name(number)
    if not isinstance(custom_id, str):
        refuse("custom_id", f"must be text, found {custom_id!r}")
    try:
        url, body = _framed(value) if any(name in value for name in FRAME) else _plain(value)
    except RequestError as error:
        return Line(number, custom_id, fault=error)
    return Line(number, custom_id, url, body)


def _framed(value: dict[str, Any]) -> tuple[str, Any]:
    for name in value:
        if name not in FRAME:
            refuse(name, "does not belong beside method, url and body: a line has parameters in its body")
    if value.get("method", "POST") != "POST":
        refuse("method", f"must be POST, found {value['method']!r}")
    url = value.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS:
        refuse("url", f"must be one of {', '.join(ENDPOINTS)}, found {url!r}")
    if not isinstance(value.get("body"), dict):
        refuse("body", "must be a JSON object")
    return url, value["body"]


def _plain(value: dict[str, Any]) -> tuple[str, Any]:
    found = [url for name, url in TOLD_BY.items() if value.get(name) is not None]
    if len(found) != 1:
        raise RequestError(f"a line must have one of {', '.join(TOLD_BY)}, or url and body", code="parameter")
    return found[0], value


def recover(target: IO[bytes], name: str) -> set[int]:
    """Find which answers a file has, and cut off the last line if it was not written to its end.

    target: open for reading and writing; it is left at its end.  Returns digests of the ids.
    ConfigError for a file that has other lines than answers, so that it is not written to, or that cannot be written.
    """
    with writing(Path(name)):
        return _recover(target, name)


def _recover(target: IO[bytes], name: str) -> set[int]:
    done: set[int] = set()
    end = 0
    for number, raw in enumerate(target, 1):
        custom_id = _answered_id(raw)
        if custom_id is None:
            begun = raw.startswith(BEGINNING) or BEGINNING.startswith(raw)
            if begun and not target.read(1):
                break
            raise ConfigError(
                f"line {number} is no answer of `pymllm batch`",
                code="batch-output",
                file=name,
                fix="Choose another output file.",
            )
        done.add(_digest(custom_id))
        end += len(raw)
        if not raw.endswith(b"\n"):
            target.write(b"\n")
            end += 1
    target.seek(end)
    target.truncate()
    return done


def _answered_id(raw: bytes) -> str | None:
    """Return the id of the request that a line answers; None if it is no whole answer.

    What a line that could not be read is called has FAULT behind it.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(value, dict) and {"custom_id", "response", "error"} <= value.keys()):
        return None
    custom_id, error = value["custom_id"], value["error"]
    if not isinstance(custom_id, str):
        return None
    message = error.get("message") if value["response"] is None and isinstance(error, dict) else None
    number = str(message).partition(":")[0].removeprefix("line ")
    return custom_id + FAULT if custom_id == f"line-{number}" else custom_id


@contextlib.contextmanager
def open_output(target: Path) -> Iterator[IO[bytes]]:
    """Open a file to go on with, for this process alone.  ConfigError if it cannot be had."""
    try:
        file = open(target, "r+b" if target.exists() else "x+b")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"the output cannot be written: {error.strerror}", code="batch-output", file=str(target)
        ) from None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "another process writes to the output", code="batch-output", file=str(target)
                ) from None
            except OSError as error:
                raise cannot_write(target, error) from error
        yield file
    finally:
        # Every answer has been written, but for one that could not be.
        with contextlib.suppress(OSError):
            file.close()


class BatchFile:
    """One run over a file of requests.

    together: how many lines are worked on at a time.  tell: is called with 1 for each line that is dealt with.
    """

    def __init__(self, service: Service, together: int, tell: Callable[[int], object]) -> None:
        self.service, self.together, self.tell = service, together, tell
        self.counts = Counts()

    async def run(self, source: IO[bytes], target: IO[bytes], done: set[int]) -> Counts:
        """Answer every line of `source` whose id is not among `done`, into `target`."""
        lines, path = read_lines(source), Path(str(getattr(target, "name", "the output")))

        async def work() -> None:
            for line in lines:
                if line is None or line.is_among(done):
                    self.counts.skipped += line is not None
                    self.tell(1)
                    # Others are to come to their turn, however many lines are skipped.
                    await asyncio.sleep(0)
                    continue
                answer = await self._answer(line)
                raw = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
                with writing(path, len(raw), again="The same command goes on from there."):
                    target.write(raw)
                    target.flush()
                self.counts.failed += answer["error"] is not None
                self.counts.answered += answer["error"] is None
                self.tell(1)

        tasks = [asyncio.ensure_future(work()) for _ in range(self.together)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.counts

    async def _answer(self, line: Line) -> dict[str, Any]:
        """Answer a line, by the line of the output for it."""
        answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
        error: dict[str, Any] | None = None
        try:
            if line.fault is not None:
                raise line.fault
            status, body = 200, await self._ask(line)
        except PymllmError as raised:
            status, body = refusal_of(raised)
        except Exception:
            logger.exception("line %d failed", line.number)
            status, body = 500, error_body(500, "internal error")
        if status != 200:
            message = f"line {line.number}: {body['error']['message']}"
            error = {"code": body["error"]["code"] or body["error"]["type"], "message": message}
            body = anthropic_error(status, body) if speaks_anthropic(line.url) else body
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        # A line that could not be read has not come to an endpoint.
        return {**answer, "response": None if line.fault is not None else response, "error": error}

    async def _ask(self, line: Line) -> dict[str, Any]:
        kind, places = ENDPOINTS[line.url], self.service.worker.places
        if isinstance(line.body, dict) and line.body.get("stream"):
            refuse("stream", "must be false: an answer is one line", code="unsupported_parameter")
        if kind is EmbeddingRequest:
            embedding = await self.service.read_embedding(line.body)
            await places.wait()
            try:
                return await self.service.embed(embedding)
            finally:
                places.give_back()
        assert kind is not EmbeddingRequest
        self.service.check_generates()
        question = await self.service.read(kind, line.body)  # type: ignore[arg-type]
        asked = question.asked
        await places.wait(len(asked))
        with contextlib.closing(self.service.worker.begin(asked)) as generation:
            return await self.service.answer(question, generation)
