"""Time a whole model on the CPU: prefill and decode of a Llama of 448 M parameters, in our engine and its peers.

    python benchmarks/cpu_decode.py [--only "llama.cpp Q4_0" ...] [--threads 1 2] [--python /path/to/peers/bin/python]

The weights are random and the same for all engines (cpu_decode_models.py writes them, once, about 2 GB under --models):
int4 in groups of 128 with zero points, embedding and head quantised too where an engine does that. Engines read prompts
of 128 tokens and then decode greedily, one request alone and eight at a time. Every engine has a process of its own;
ours and one peer take turns, A B A B, with a probe of the read bandwidth between them (roofline.py). Peers may live in
another environment (--python); a peer that does not load is left out, and the table says so. Each run replaces the rows
of the peers and threads that it measured in results/cpu_decode.json, and writes the table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
from cpu_decode_models import CONFIG, linear_shapes, model_folder

HERE = Path(__file__).parent
RESULTS = roofline.RESULTS / "cpu_decode.json"
OURS = {"transformers bf16": "pymllm bf16"}  # what a peer takes turns with; else:
OURS_INT4 = "pymllm int4"
PEERS = (
    "onnxruntime-genai int4",
    "openvino u4",
    "llama.cpp Q4_0",
    "transformers f32",
    "transformers bf16",
)
STEPS = {1: 48, 8: 24}  # decoded tokens of each prompt, by batch


class Worker:
    """An engine in a process of its own.  RuntimeError with the last lines of its output if it does not start."""

    def __init__(self, engine: str, models: Path, threads: int, python: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
        command = [python, str(HERE / "cpu_decode_engines.py"), engine, str(models), str(threads)]
        self.log = open(models / "engine.log", "w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.versions = self._answer()

    def ask(self, **wanted: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError((self.log.read().strip().splitlines() or ["it ended"])[-1][:200])
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


def measure(peer: str, models: Path, threads: int, turns: int, python: str) -> list[dict[str, Any]]:
    """Measure a row for each batch: the medians of both sides, and the median of the ratios of their turns."""
    mine = OURS.get(peer, OURS_INT4)
    workers = {mine: Worker(mine, models, threads, sys.executable)}
    try:
        workers[peer] = Worker(peer, models, threads, python)
        found = [np.array(worker.ask(logits=True)) for worker in workers.values()]
        agreement = float(found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1]))
        read = roofline.ReadProbe(huge=True)
        rows = []
        for batch, steps in STEPS.items():
            for worker in workers.values():
                worker.ask(batch=batch, steps=8)  # memory is taken, and what is made once is made
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
            bandwidth = []
            for _ in range(turns):
                for name, worker in workers.items():
                    bandwidth.append(read(8, threads) / 1e9)
                    time.sleep(0.05)  # idle threads of the other side stop spinning
                    prefill, decode = worker.ask(batch=batch, steps=steps)
                    speeds[name].append((batch * 128 / prefill, batch * steps / decode))
            row: dict[str, Any] = {"peer": peer, "ours": mine, "threads": threads, "batch": batch}
            for at, what in enumerate(("prefill", "decode")):
                each = {name: [turn[at] for turn in found] for name, found in speeds.items()}
                row[f"{what}_peer"] = statistics.median(each[peer])
                row[f"{what}_ours"] = statistics.median(each[mine])
                row[f"{what}_ratio"] = statistics.median(
                    a / b for a, b in zip(each[mine], each[peer], strict=True)
                )
            row |= {
                "turns": turns,
                "read_gb_per_s": statistics.median(bandwidth),
                "agreement": agreement,
                "versions": workers[peer].versions,
                "load_average": round(os.getloadavg()[0], 2),
            }
            rows.append(row)
        return rows
    finally:
        for worker in workers.values():
            worker.close()


DISTURBED = 1.1  # of the limit: more than a probe's noise explains


def weight_bytes(kind: str) -> int:
    """Return how many bytes of weights one token reads: all layers and the head."""
    count = sum(outputs * inputs for outputs, inputs in linear_shapes().values())
    count += CONFIG["vocab_size"] * CONFIG["hidden_size"]
    return (
        count * 2 if kind == "pymllm bf16" else count * 17 // 32
    )  # 16 rows x 128: 1024 bytes of codes, 64 of scales


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        here = [row for row in rows if row["threads"] == threads]
        lines += ["", f"## {threads} thread{'s' * (threads > 1)}", ""]
        lines += [
            "| peer | prefill 128 | decode, batch 1 | decode, batch 8 | ours, beside it | ratios "
            "| of the limit | read GB/s | agreement |",
            "| --- |" + " --- |" * 8,
        ]
        for peer in dict.fromkeys(row["peer"] for row in here):
            by = {row["batch"]: row for row in here if row["peer"] == peer}
            if set(by) != set(STEPS):
                continue
            one, eight = by[1], by[8]
            limit = one["read_gb_per_s"] * 1e9 / weight_bytes(one["ours"])
            share = one["decode_ours"] / limit
            lines.append(
                f"| {peer} | {one['prefill_peer']:.0f} | {one['decode_peer']:.1f} | {eight['decode_peer']:.0f} "
                f"| {one['ours']}: {one['prefill_ours']:.0f} / {one['decode_ours']:.1f} / {eight['decode_ours']:.0f} "
                f"| **{one['prefill_ratio']:.2f} / {one['decode_ratio']:.2f} / {eight['decode_ratio']:.2f}** "
                f"| {f'{share:.2f}' if share <= DISTURBED else '?'} | {one['read_gb_per_s']:.1f} "
                f"| {one['agreement']:.4f} |"
            )
    return lines


def render() -> None:
    found = json.loads(RESULTS.read_text())
    rows = found["rows"]
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    lines = [
        "# End to end on the CPU: a Llama of 448 M parameters, int4 group 128",
        "",
        roofline.describe(found["machine"])
        + " "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + ".",
        "",
        "Tokens a second; medians of paired turns (ours, peer, ours, peer, each in a process of its own). Ratios: ours "
        "over the peer's, the median over the turns. Of the limit: our decoding, batch 1, over what reading the packed "
        "weights once a token at the bandwidth probed between the turns allows (?: the probe was disturbed, and is "
        "below what decoding itself read). Agreement: the cosine of the logits after one prompt, ours and the peer's; "
        "with random weights every rounding by itself is at 0.85 to 0.88 to the floats'.",
        "",
        "OpenVINO runs a graph of our making in the form of its exporters (cpu_decode_openvino.py); its plugin takes "
        "attention apart there instead of fusing it with the cache, so an exporter's own model may decode faster.",
    ]
    lines += [f"\nLeft out: {'; '.join(found['left_out'].values())}."] if found["left_out"] else []
    lines += table(rows)
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=PEERS, metavar="PEER")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--models", type=Path, default=HERE.parent / "build" / "cpu_decode")
    parser.add_argument("--python", default=sys.executable, help="of the environment that has the peers")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    options = parser.parse_args()
    if not options.render:
        model_folder(options.models, "awq")
        torch.set_num_threads(1)
        found: dict[str, Any] = {"left_out": {}, "rows": []}
        if RESULTS.exists():
            found = json.loads(RESULTS.read_text())
        found["machine"] = roofline.machine()
        for peer in options.only:
            for threads in options.threads:
                kept = [r for r in found["rows"] if (r["peer"], r["threads"]) != (peer, threads)]
                try:
                    measured = measure(peer, options.models, threads, options.turns, options.python)
                    found["left_out"].pop(peer, None)
                except RuntimeError as error:
                    measured, found["left_out"][peer] = [], f"{peer} ({error})"
                found["rows"] = sorted(
                    kept + measured, key=lambda r: (PEERS.index(r["peer"]), r["threads"], r["batch"])
                )
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{peer}, {threads} threads: {'done' if measured else 'left out'}", file=sys.stderr)
    render()


if __name__ == "__main__":
    main()
