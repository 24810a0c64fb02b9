"""The folder of results: a line of JSON for each, what went wrong in full, and the summary; written as they come."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

MOST_BYTES = 900_000  # of a file: what is read by people, and sent about
OWN = ("results.jsonl", "failures.txt", "summary.txt")
OF_STAGES = ("environment.txt", "tables.md", "tables.json", "tiles.json")
IN_FULL = ("trace",)  # what failures.txt has, and no line of the summary


class Results:
    """What all stages found, in memory and in `folder`.

    results.jsonl: every note.  failures.txt: what went wrong, with tracebacks and the end of the output.
    summary.txt: see `summary.py`.  Stages add files of their own. Those of a run before this one are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self._sizes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in OF_STAGES:
            (folder / name).unlink(missing_ok=True)
        for name in OWN:
            (folder / name).write_text("", encoding="utf-8")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def take(self, stage: str, row: dict[str, Any]) -> None:
        """Keep one note of a stage."""
        row = {"stage": stage, **row, "at": round(self.seconds, 1)}
        self.rows.append(row)
        short = {key: value for key, value in row.items() if key not in IN_FULL}
        self._append("results.jsonl", json.dumps(short) + "\n")
        if row["ok"] is False:
            self._append(
                "failures.txt", f"## {stage}: {row['item']}\n{row.get('why', '')}\n{row.get('trace', '')}\n\n"
            )

    def say(self, line: str) -> None:
        """Print a line of progress."""
        line = f"{self.seconds:4.0f}s {line}"
        print(line, flush=True)
        self._append("summary.txt", line + "\n")

    def conclude(self, text: str) -> None:
        print(text, flush=True)
        self._append("summary.txt", text + "\n")

    def _append(self, name: str, text: str) -> None:
        size = self._sizes.get(name, 0) + len(text.encode())
        if size < MOST_BYTES:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
            self._sizes[name] = size
