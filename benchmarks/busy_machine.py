"""Time decoding on a machine that others use: beside no, one and two busy processes, on one and two threads.

    python benchmarks/busy_machine.py [--models shipped llama] [--before OLD_EXTENSION.so] [--turns 6]

A busy process is a shell's endless loop. Models: the shipped one, and the Llama of 448 M parameters in int4 of
cpu_decode_models.py (written once, about 2 GB under --folder). Each number of threads has a process of its own, and
they take turns, A B A B, so that what others do to the machine meets all of them alike; --before adds processes with
another build of pymllm._native, to compare with. Read the ratios: they are medians over the turns, each of neighbours
in time. Speeds are the best turn and the median; the processor's time for a token is of all threads, and shows what
waiting costs. On a machine that is never idle, "0 busy" is what was there anyway: the load average is in the table.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu_decode_models import model_folder

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "busy_machine.json"
MODELS = {"shipped": "the shipped model", "llama": "a Llama of 448 M parameters, int4 group 128"}
STEPS = {"shipped": 200, "llama": 24}  # decoded tokens a turn


def use_extension(file: str) -> None:
    """Load another build of pymllm._native in place of the one in the package."""
    import pymllm

    loader = importlib.machinery.ExtensionFileLoader("pymllm._native", file)
    spec = importlib.util.spec_from_loader("pymllm._native", loader, origin=file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["pymllm._native"] = pymllm._native = module  # type: ignore[attr-defined]


def answer(model: str, folder: Path, threads: int, extension: str) -> None:
    """Decode `steps` tokens for each line with that number; print tokens a second and processor ms a token."""
    if extension:
        use_extension(extension)
    import torch

    import pymllm
    from pymllm.kernels.native.extension import native_missing_reason

    assert native_missing_reason() is None, native_missing_reason()
    torch.set_num_threads(threads)
    if model == "shipped":
        llm = pymllm.LLM(Path(pymllm.__file__).parent / "shipped_model", device="cpu", prefix_reuse=False)
    else:
        quant = {"model.embed_tokens": "awq", "lm_head": "awq"}
        llm = pymllm.LLM(
            model_folder(folder, "awq"), quant, device="cpu", dtype="bfloat16", prefix_reuse=False
        )
    prompt = [[(i * 7 + 3) % 900 for i in range(32)]]
    print(json.dumps({"torch": torch.__version__, "pymllm": pymllm.__version__}), flush=True)
    for line in sys.stdin:
        steps, start, used = int(line), 0.0, 0.0
        for _ in llm.stream_all(prompt, pymllm.SamplingParams(max_tokens=steps + 1, ignore_eos=True)):
            if not start:  # the prompt is read
                start, used = time.perf_counter(), time.process_time()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        print(json.dumps([steps / seconds, used / steps * 1e3]), flush=True)


class Decoder:
    """A process that decodes on so many threads."""

    def __init__(self, model: str, folder: Path, threads: int, extension: str) -> None:
        command = [
            sys.executable,
            __file__,
            "--answer",
            model,
            str(threads),
            extension,
            "--folder",
            str(folder),
        ]
        environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
        environment.pop("OMP_NUM_THREADS", None)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()
        self.decode(STEPS[model])  # what is made once is made

    def decode(self, steps: int) -> list[float]:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that decodes has ended, with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    builds = {"now": ""} | ({"before": str(options.before.resolve())} if options.before else {})
    decoders = {
        (build, threads): Decoder(model, options.folder, threads, file)
        for build, file in builds.items()
        for threads in options.threads
    }
    rows = []
    try:
        for busy in options.busy:
            turns: dict[tuple[str, int], list[list[float]]] = {key: [] for key in decoders}
            with busy_processes(busy):
                for _ in range(options.turns):
                    for key, decoder in decoders.items():
                        turns[key].append(decoder.decode(STEPS[model]))
            base = ("now", min(options.threads))
            for (build, threads), found in turns.items():
                speeds = [speed for speed, _ in found]
                ratios = [a[0] / b[0] for a, b in zip(found, turns[base], strict=True)]
                rows.append(
                    {"model": model, "busy": busy, "build": build, "threads": threads, "turns": len(found)}
                    | {"best": max(speeds), "median": statistics.median(speeds)}
                    | {"ratio": statistics.median(ratios)}
                    | {"cpu_ms": statistics.median(used for _, used in found)}
                    | {"load_average": round(os.getloadavg()[0], 2)}
                )
    finally:
        for decoder in decoders.values():
            decoder.close()
    for row in rows:
        row["versions"] = next(iter(decoders.values())).versions
    return rows


def render(found: dict[str, Any]) -> str:
    import roofline

    versions = found["rows"][0]["versions"]
    lines = [
        "# Decoding beside busy processes",
        "",
        f"{roofline.describe(found['machine'])} pymllm {versions['pymllm']}, torch {versions['torch']}.",
        "",
        "Tokens a second of one request; processes take turns, A B A B. Ratio: to one thread of this build in the same "
        "turn, the median. CPU: processor time a token, of all threads. Before: the kernels on OpenMP's threads.",
        "",
        f"{found['note']}".strip(),
    ]
    for model, words in MODELS.items():
        rows = [row for row in found["rows"] if row["model"] == model]
        if not rows:
            continue
        lines += ["", f"## {words[0].upper()}{words[1:]}", ""]
        lines += [
            "| busy | build | threads | best | median | ratio | CPU ms | load |",
            "| --- |" + " --- |" * 7,
        ]
        lines += [
            f"| {row['busy']} | {row['build']} | {row['threads']} | {row['best']:.1f} | {row['median']:.1f} "
            f"| **{row['ratio']:.2f}** | {row['cpu_ms']:.2f} | {row['load_average']} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--before", type=Path, help="another build of pymllm._native, to compare with")
    parser.add_argument("--note", default="", help="a sentence on the machine, for the table")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "cpu_decode")
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        model, threads, extension = options.answer
        return answer(model, options.folder, int(threads), extension)
    import roofline  # not in the processes that decode: it loads the package's own extension

    if "llama" in options.models:
        model_folder(options.folder, "awq")
    found: dict[str, Any] = {"machine": roofline.machine(), "note": options.note, "rows": []}
    for model in options.models:
        found["rows"] += measure(model, options)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(render(found))
    print(render(found))


if __name__ == "__main__":
    main()
