"""A process that is killed at the Nth call that changes a file, for every N of a sweep; another goes on from there.

python -m tests.faults.killed WORK FOLDER EVERY prints one JSON line a kill: what was found then, and after another run.
FOLDER has the model, `model`, and gets a folder for each kill.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pymllm
from pymllm.errors import PymllmError
from pymllm.searching.journal import Journal
from pymllm.server.batch_file import BatchFile, open_output, recover
from pymllm.server.service import Service
from pymllm.weights.opening import open_checkpoint, resolve_model_path

from ..injecting import CHANGING, Disk, killed

CHECKPOINTS = ("folder", "gguf", "mlx")
LINES = b"".join(
    json.dumps({"custom_id": f"line {n}", "prompt": [3 + n, 4], "max_tokens": 2, "temperature": 0}).encode()
    + b"\n"
    for n in range(6)
)
VALUES = {f"layer.{n} é": n / 7 for n in range(6)}


def quantize(folder: Path, out: str, **options: Any) -> Callable[[Path], None]:
    def work(root: Path) -> None:
        pymllm.quantize_checkpoint(folder / "model", root / out, progress=False, **options)

    return work


def batch(folder: Path) -> Callable[[Path], None]:
    llm = pymllm.LLM(folder / "model", progress=False)
    (folder / "in.jsonl").write_bytes(LINES)

    def work(root: Path) -> None:
        service = Service(llm, "model", 2, 4)

        async def run() -> None:
            with open(folder / "in.jsonl", "rb") as source, open_output(root / "out.jsonl") as target:
                done = recover(target, "out.jsonl")
                await BatchFile(service, 2, lambda count: None).run(source, target, done)

        asyncio.run(run())

    return work


def journal(folder: Path) -> Callable[[Path], None]:
    def work(root: Path) -> None:
        with Journal(root / "kept" / "journal.jsonl", {"model": "é"}) as kept:
            for key, value in VALUES.items():
                if key not in kept:
                    kept.add(key, value)

    return work


WORKS: dict[str, Callable[[Path], Callable[[Path], None]]] = {
    "folder": lambda folder: quantize(
        folder, "out", quant={"model.layers.**": "int4:group_size=32"}, shard_size="30KB"
    ),
    "gguf": lambda folder: quantize(folder, "out.gguf", quant={"model.layers.**": "gguf:type=Q4_0"}),
    "mlx": lambda folder: quantize(folder, "out", quant={"model.layers.**": "mlx:bits=4,group_size=32"}),
    "batch": batch,
    "journal": journal,
}


def in_child(work: Callable[[], None]) -> int:
    """Do some work in a child.  Returns how it ended: 0, 1 for an error, or minus the signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except PymllmError as error:
        print(f"error: {error.code}", file=sys.stderr)
        code = 3 if error.code == "out-exists" else 1
    finally:
        os._exit(code)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(out: Path) -> str:
    """Say what a checkpoint is taken for: whole, or the code of the error."""
    try:
        open_checkpoint(resolve_model_path(out), pymllm.models.gguf_architectures())
    except PymllmError as error:
        return error.code
    return "whole"


def main(name: str, folder: Path, every: int) -> None:
    torch.set_num_threads(1)
    work = WORKS[name](folder)
    whole = folder / "whole"
    whole.mkdir()
    if name in CHECKPOINTS:
        # Here, so that children find everything imported.
        work(whole)
    else:
        # No assert, which is out under python -O: all of the work is in it.
        code = in_child(lambda: work(whole))
        if code:
            raise SystemExit(code)
    print(json.dumps({"whole": files(whole)}))
    for number in range(0, 10_000, every):
        root = folder / f"killed {number}"
        root.mkdir()

        def run(root: Path = root, number: int = number) -> None:
            with Disk(root, CHANGING, number, killed).watch():
                work(root)

        code = in_child(run)
        found = state(root / ("out.gguf" if name == "gguf" else "out")) if name in CHECKPOINTS else ""
        kept = files(root)

        def go_on(root: Path = root) -> None:
            # Watched for no other reason than that nothing waits for the disk.
            with Disk(root).watch():
                work(root)

        again = in_child(go_on)
        print(json.dumps({"code": code, "state": found, "kept": kept, "again": again, "files": files(root)}))
        if code != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
