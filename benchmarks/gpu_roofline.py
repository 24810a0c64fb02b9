"""The limits of a GPU, and how the GPU tables are timed and written: what gpu_*.py share.

The bandwidth is that of a kernel that only reads; each figure of a table stands beside the share of a limit that it
reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pymllm.kernels.hardware import Device, probe_device

RESULTS = Path(__file__).parent / "results"
READ_BYTES = 2 << 30
BUDGET_S = 80  # of one script: rows that would begin later are left out, and the table says so
GRACE_S = (
    20  # for the last row: then the process ends, with what it has; all scripts take less than 8 minutes
)


def parser(doc: str | None, budget: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, in Triton's interpreter (TRITON_INTERPRET=1), small shapes: checks that every row runs "
        "and what it computes; writes and claims nothing",
    )
    made.add_argument("--budget", type=float, default=budget, help="seconds; rows beyond them are left out")
    return made


def device_for(dry_run: bool) -> tuple[Device, torch.device]:
    """Return the device that kernels choose for, and the one where tensors are."""
    if dry_run:
        return probe_device("cuda:sm90"), torch.device("cpu")
    return probe_device("cuda"), torch.device("cuda")


def stop_after(seconds: float, write: Callable[[], object]) -> threading.Timer:
    """Call `write` and end the process, whatever it hangs in, unless the timer is cancelled before."""

    def stop() -> None:
        print(f"stopped after {seconds:.0f} s", flush=True)
        write()
        os._exit(1)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


def read_bandwidth() -> float:
    """Measure how many bytes a second one reduction reads over memory far larger than the caches."""
    from pymllm.kernels.triton.timing import seconds_each

    source = torch.empty(READ_BYTES // 4, dtype=torch.int32, device="cuda").fill_(1)
    return READ_BYTES / seconds_each([source.sum])


class Table:
    """The rows of one script: each has a work, its kernels' times, and the shares of the machine's limits."""

    def __init__(self, name: str, title: str, options: argparse.Namespace) -> None:
        self.name, self.title, self.options = name, title, options
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.broken = ""  # what left the device unusable
        self.bandwidth = 0.0 if options.dry_run else read_bandwidth()
        self.timer = stop_after(options.budget + GRACE_S, self._write)

    def measure(
        self,
        work: str,
        kernel: str,
        make: Callable[[], Sequence[Callable[[], torch.Tensor]]],
        *,
        nbytes: int,
        operations: int,
        expected: torch.Tensor | None = None,
        tolerance: float = 2e-2,
    ) -> None:
        """Check one call against `expected`, then time all; a kernel that cannot run gets a row that says why.

        make: makes the calls, which do the same work over different tensors; it may fail, as the calls may.
        nbytes, operations: the least that one call must move and do.
        """
        if self.broken or time.perf_counter() - self.started > self.options.budget:
            why = f"after {self.broken}" if self.broken else "as the time was up"
            self.left_out.append(f"{kernel}, {work}, {why}")
            return
        row: dict[str, Any] = {"work": work, "kernel": kernel}
        try:
            calls = make()
            found = calls[0]()
            if expected is not None:
                error = float((found.float() - expected).norm() / expected.norm())
                row["relative_error"] = round(error, 5)
                # The interpreter truncates to bfloat16 where a GPU rounds: twice the error.
                allowed = tolerance * (2 if self.options.dry_run else 1)
                if not error <= allowed:
                    raise ValueError(f"relative error {error:.4f} is above {allowed}")
            if not self.options.dry_run:
                from pymllm.kernels.triton.timing import seconds_each

                seconds = seconds_each(calls)
                row["microseconds"] = round(seconds * 1e6, 2)
                row["share_of_bandwidth"] = round(nbytes / seconds / self.bandwidth, 3)
                row["tflops"] = round(operations / seconds / 1e12, 1)
        except (
            Exception
        ) as problem:  # peers fail in ways of their own; each is a row, and the others still run
            said = str(problem).strip().splitlines() or [""]
            row["failed"] = f"{type(problem).__name__}: {said[0]}"[:160]
            self._look_at_device(kernel)
        self.rows.append(row)
        shown = row.get("failed") or row.get("microseconds") or "ran"
        print(f"{work:<44} {kernel:<26} {shown}", flush=True)

    def _look_at_device(self, kernel: str) -> None:
        """Check the device: after a kernel that wrote where it must not, it answers nobody."""
        try:
            if not self.options.dry_run:
                torch.cuda.synchronize()
        except RuntimeError:
            self.broken = f"{kernel} broke the device"

    def finish(self) -> int:
        """Write JSON, Markdown and, with matplotlib, a roofline plot.  Returns 1 if one of our kernels failed."""
        self.timer.cancel()
        failed = [row for row in self.rows if "failed" in row and row["kernel"].startswith("triton")]
        self._write()
        if self.options.dry_run:
            print(
                f"{len(self.rows)} rows ran in the interpreter, {len(failed)} of ours failed; nothing is claimed"
            )
        return 1 if failed else 0

    def _write(self) -> None:
        if self.options.dry_run:
            return
        RESULTS.mkdir(exist_ok=True)
        properties = torch.cuda.get_device_properties()
        report = {
            "device": properties.name,
            "torch": torch.__version__,
            "read_bandwidth": self.bandwidth,
            "rows": self.rows,
            "left_out": self.left_out,
        }
        (RESULTS / f"{self.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        lines = [
            f"# {self.title}",
            "",
            f"{properties.name}, torch {torch.__version__}. A kernel that only reads reaches",
        ]
        lines[-1] += (
            f" {self.bandwidth / 1e12:.2f} TB/s here; shares are of that. From CUDA graphs, over rotating weights."
        )
        lines += [
            "",
            "| work | kernel | µs | share of bandwidth | TFLOP/s | relative error |",
            "| --- |" + " --- |" * 5,
        ]
        for row in self.rows:
            cells = [
                row.get(k, "") for k in ("microseconds", "share_of_bandwidth", "tflops", "relative_error")
            ]
            if "failed" in row:
                cells = [row["failed"], "", "", ""]
            lines.append(f"| {row['work']} | {row['kernel']} | " + " | ".join(map(str, cells)) + " |")
        lines += ["", *(f"Left out: {text}." for text in self.left_out)]
        (RESULTS / f"{self.name}.md").write_text("\n".join(lines).rstrip() + "\n")
        self._plot()

    def _plot(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no plot: matplotlib is not installed")
            return
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot()
        for kernel in dict.fromkeys(row["kernel"] for row in self.rows):
            rows = [row for row in self.rows if row["kernel"] == kernel and "microseconds" in row]
            axes.plot(
                [row["work"] for row in rows], [row["share_of_bandwidth"] for row in rows], "o-", label=kernel
            )
        axes.set_ylabel("share of measured read bandwidth")
        axes.tick_params(axis="x", rotation=75)
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(RESULTS / f"{self.name}.png", dpi=120)
