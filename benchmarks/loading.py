"""Time the first load of checkpoints from the page cache, beside what the page cache and the memory give.

    python benchmarks/loading.py FOLDER_OR_GGUF... [--rounds 3] [--threads 2]

Each round reads the file into memory that is warm, and into fresh memory (whose pages are touched first), copies
memory, then loads each checkpoint, in one process, so that all meet the same neighbours. The best of the rounds
counts: what else runs on the machine only takes away. The script writes results/loading.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch

import pymllm
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import prepare

PIECE = 8 << 20  # of one read
COPIED = 256 << 20


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def read_all(path: Path, threads: int, *, fresh: bool) -> float:
    """Read a checkpoint's files in pieces on several threads.  Returns bytes a second."""
    files = [os.open(file, os.O_RDONLY) for file in files_of(path)]
    sizes = [os.fstat(number).st_size for number in files]
    pieces = iter(
        [(number, at) for number, size in zip(files, sizes, strict=True) for at in range(0, size, PIECE)]
    )
    lock, total = threading.Lock(), sum(sizes)
    target = memoryview(mmap.mmap(-1, total + PIECE)) if fresh else None
    where = {number: sum(sizes[:index]) for index, number in enumerate(files)}

    def work() -> None:
        own = None if fresh else memoryview(bytearray(PIECE))
        while True:
            with lock:
                found = next(pieces, None)
            if found is None:
                return
            number, at = found
            buffer = own if target is None else target[where[number] + at :][:PIECE]
            assert buffer is not None
            os.preadv(number, [buffer], at)

    crew = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    seconds = time.perf_counter() - started
    for number in files:
        os.close(number)
    return total / seconds


def copy_memory() -> float:
    """Copy memory on one thread.  Returns bytes a second."""
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    started = time.perf_counter()
    target[:] = source
    return COPIED / (time.perf_counter() - started)


def load(path: Path) -> tuple[float, int]:
    """Load a checkpoint.  Returns seconds and the bytes that were read."""
    prepared = prepare(path, device="cpu")
    started = time.perf_counter()
    model = load_prepared(prepared, progress=False)
    return time.perf_counter() - started, model.load_report.bytes_read  # type: ignore[union-attr]


def measure(path: Path, threads: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, Callable[[], float]] = {
        "warm": lambda: read_all(path, threads, fresh=False),
        "fresh": lambda: read_all(path, threads, fresh=True),
        "memcpy": copy_memory,
    }
    best: dict[str, Any] = {"model": path.name, "threads": threads}
    read_all(path, threads, fresh=False)  # into the page cache
    for _ in range(rounds):
        for name, rate in rates.items():
            best[name] = max(best.get(name, 0.0), rate())
        seconds, nbytes = load(path)
        if seconds < best.get("seconds", float("inf")):
            best |= {"seconds": seconds, "bytes": nbytes, "load": nbytes / seconds}
    return best


def table(rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        about,
        "",
        "GB/s. read, warm: from the page cache into memory that is used again; read, fresh: into new memory.",
        "",
        "| checkpoint | GB | load, s | load | read, warm | read, fresh | memcpy | load / read, fresh |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rates = [f"{row[name] / 1e9:.2f}" for name in ("load", "warm", "fresh", "memcpy")]
        lines.append(
            f"| {row['model']} | {row['bytes'] / 1e9:.2f} | {row['seconds']:.2f} | {' | '.join(rates)} "
            f"| {row['load'] / row['fresh']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = roofline.machine()
    rows = [measure(path, args.threads, args.rounds) for path in args.checkpoints]
    about = f"{roofline.describe(info)}; pymllm {pymllm.__version__}, torch {torch.__version__}"
    text = table(rows, about)
    folder = Path(__file__).with_name("results")
    (folder / "loading.json").write_text(json.dumps({"machine": info, "rows": rows}, indent=2) + "\n")
    (folder / "loading.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
