"""The access log: a line for each request, written by a thread of its own, so that no answer waits for it."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

from pymllm.errors import counted

# Lines that may wait to be written; more are dropped, and their number is written instead.
WAITING_LINES = 10_000


class AccessLog:
    """The writer of lines to a stream.

    kind: "text" or "json".

    A stream may not be read, as a pipe whose reader hangs: nobody waits for that.
    """

    def __init__(self, stream: TextIO, kind: str = "text") -> None:
        self.stream = stream
        self._spell = spell_json if kind == "json" else spell_text
        self._lines: queue.Queue[Mapping[str, Any]] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        threading.Thread(target=self._write_all, name="access log", daemon=True).start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Have a record written; drop it if too many wait."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def _write_all(self) -> None:
        while True:
            record = self._lines.get()
            dropped, self._dropped = self._dropped, 0
            try:
                if dropped:
                    lines = counted(dropped, "line of the access log was", "lines of the access log were")
                    self.stream.write(f"{lines} dropped\n")
                self.stream.write(self._spell(record) + "\n")
                self.stream.flush()
            except (BrokenPipeError, ValueError):
                return  # the stream was closed
            except OSError:
                # A disk that is full may have room later.
                self._dropped += dropped + 1


def spell_json(record: Mapping[str, Any]) -> str:
    """Write a record as one line of JSON, in ASCII."""
    return json.dumps(record, separators=(",", ":"))


def spell_text(record: Mapping[str, Any]) -> str:
    """Write a record for people: time, client, request, status, milliseconds, tokens, id."""
    when = time.strftime("%H:%M:%S", time.localtime(record["time"]))
    tokens = ""
    if "prompt_tokens" in record:
        tokens = f" {record['prompt_tokens']}+{record['completion_tokens']} tokens"
    line = (
        f"{when} {record['client']} {record['method']} {record['path']} {record['status']} {record['ms']} ms"
        f"{tokens} {record['request_id']}"
    )
    # What a client chose, its method and id, has been checked; this holds whatever comes later.
    return line.encode("unicode_escape").decode()
