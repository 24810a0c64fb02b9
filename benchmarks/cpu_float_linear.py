"""Time linear layers over bf16 and fp8 weights on the CPU: ours beside torch's, cold weights, one process.

    python benchmarks/cpu_float_linear.py [--threads 1 2] [--tokens 1 4 16 128] [--rounds 12]

Every round runs each contender once, in turn, on weights that the caches no longer hold, and reads the same memory with
the roofline probe. Speed-ups are medians of the rounds' own ratios, so that a machine that slows down for a while slows
both sides. If the system gave this process less than 95 % of its threads' time during a call, the call is repeated, a
few times; a contender that never ran undisturbed is marked. The script writes JSON and Markdown to benchmarks/results/.
"""

# M tokens, O out_features, I in_features

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from pymllm.kernels.canonical import DenseWeight, Fp8Weight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native import extension
from pymllm.kernels.native.float_linear import TORCH_TOKENS, NativeFloatLinear
from pymllm.kernels.native.fp8 import NativeFp8Linear

SHAPES = ((4096, 4096), (4096, 14336))
COLD_BYTES = 256 << 20  # of bf16 weights in rotation, several times any cache here
PROBE_STREAMS = 8
QUIET = 0.95  # of the CPU time that the threads could have had
TRIES = 8
RIVALS = {  # ours -> the torch path that does the same job
    "ours bf16": "torch bf16",
    "ours bf16, f32 x": "torch f32",
    "ours fp8 channel": "torch fp8 channel",
    "ours fp8 block": "torch fp8 block",
}


def contenders(out_features: int, in_features: int) -> tuple[dict[str, Callable], dict[str, int], list]:
    """Make the contenders: calls (index, x32, xbf16) -> y, the weight bytes that each reads, and the float weights."""
    copies = max(3, -(-COLD_BYTES // (2 * out_features * in_features)))
    memory = torch.empty((copies, out_features, in_features), dtype=torch.bfloat16)
    memory.normal_(generator=torch.Generator().manual_seed(0)).mul_(in_features**-0.5)
    floats = [memory[i] for i in range(copies)]
    wide = [weight.float() for weight in floats[:3]]
    native = extension.probe()
    device = probe_device("cpu")
    assert native.native, extension.native_missing_reason()
    dense, fp8 = NativeFloatLinear(), NativeFp8Linear()

    def problem(weight, dtype):
        return LinearProblem(weight.type, in_features, out_features, dtype, device)

    calls: dict[str, Callable] = {}
    size = out_features * in_features
    reads = {
        "ours bf16": 2 * size,
        "ours bf16, f32 x": 2 * size,
        "torch bf16": 2 * size,
        "torch f32": 4 * size,
    }
    packed = [
        dense.pack(DenseWeight(weight), problem(DenseWeight(weight), torch.bfloat16)) for weight in floats
    ]
    with_bf16, with_f32 = (
        problem(DenseWeight(floats[0]), dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    calls["ours bf16"] = lambda i, x, xb: dense.run(packed[i % copies], with_bf16, xb, None)
    calls["torch bf16"] = lambda i, x, xb: F.linear(xb, floats[i % copies])
    calls["ours bf16, f32 x"] = lambda i, x, xb: dense.run(packed[i % copies], with_f32, x, None)
    calls["torch f32"] = lambda i, x, xb: F.linear(x, wide[i % 3])
    for name, block in (("channel", (1, 0)), ("block", (128, 128))):
        weights = [Fp8Weight.from_float(weight, block=block, activations="float") for weight in floats]
        kind = problem(weights[0], torch.bfloat16)
        ready = [fp8.pack(weight, kind) for weight in weights]

        def ours(i, x, xb, kind=kind, ready=ready):
            return fp8.run(ready[i % copies], kind, xb, None)

        def torchs(i, x, xb, weights=weights):
            return torch_fp8(weights[i % copies], xb)

        calls[f"ours fp8 {name}"], calls[f"torch fp8 {name}"] = ours, torchs
        reads[f"ours fp8 {name}"] = reads[f"torch fp8 {name}"] = size
        calls[f"ours fp8 {name}"].exact = weights[0]  # type: ignore[attr-defined]
        calls[f"torch fp8 {name}"].exact = weights[0]  # type: ignore[attr-defined]
    return calls, reads, floats


def torch_fp8(weight: Fp8Weight, x: torch.Tensor) -> torch.Tensor:
    """Multiply as cheaply as torch operations allow: by bf16 codes, scaled after the product if a row has one scale."""
    codes, scales = weight.weight.to(torch.bfloat16), weight.scales.to(torch.bfloat16)
    if weight.block == (1, 0):
        return F.linear(x, codes) * scales.T
    side_out, side_in = weight.block
    blocks = codes.view(-1, side_out, codes.shape[1] // side_in, side_in) * scales[:, None, :, None]
    return F.linear(x, blocks.view(codes.shape))


def relative_error(call: Callable, floats: list, x: torch.Tensor, xb: torch.Tensor) -> float:
    """Compute the error of the first 64 outputs, against float64 over the stored weights and the given activations."""
    y = call(0, x, xb)
    weight = getattr(call, "exact", None)
    stored = floats[0][:64].double() if weight is None else weight.dequantize(torch.float64)[:64]
    exact = (xb if y.dtype is torch.bfloat16 else x).double() @ stored.T
    return float((y[:, :64].double() - exact).norm() / exact.norm())


class Timer:
    """The seconds of calls, those of undisturbed calls apart."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.quiet: dict[int, float] = {}  # round -> seconds
        self.disturbed: dict[int, float] = {}

    def time(self, index: int, call: Callable[[int], object], tries: int = TRIES) -> None:
        """Time a call, which takes a number that no other call of this round had."""
        for attempt in range(tries):
            cpu_start, start = time.process_time(), time.perf_counter()
            call(index + attempt)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if cpu_seconds >= QUIET * self.threads * seconds:
                self.quiet[index] = seconds
                return
            self.disturbed[index] = min(seconds, self.disturbed.get(index, seconds))

    @property
    def is_quiet(self) -> bool:
        return len(self.quiet) >= 3

    @property
    def fastest(self) -> float:
        return min((self.disturbed | self.quiet).values())

    @property
    def seconds(self) -> float:
        """Return the median of the undisturbed calls, or else the fastest call, which was disturbed least."""
        return statistics.median(self.quiet.values()) if self.is_quiet else self.fastest

    def over(self, other: Timer) -> float:
        """Return the median of the rounds' ratios to another; if either was disturbed, that of the fastest calls."""
        ratios = [seconds / other.quiet[i] for i, seconds in self.quiet.items() if i in other.quiet]
        return statistics.median(ratios) if len(ratios) >= 3 else self.fastest / other.fastest


def measure(threads: int, tokens: list[int], rounds: int, native) -> list[dict]:
    torch.set_num_threads(threads)
    rows = []
    for out_features, in_features in SHAPES:
        calls, reads, floats = contenders(out_features, in_features)
        copies = len(floats)
        probe_bytes = 2 * out_features * in_features  # as long as one call

        def probe_read(index: int) -> None:
            address = floats[(index + copies // 2) % copies].data_ptr()  # noqa: B023
            native.roofline_read(address, probe_bytes, PROBE_STREAMS, threads)  # noqa: B023

        for count in tokens:
            x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(1))
            xb = x.bfloat16()
            x = xb.float()
            timers = {name: Timer(threads) for name in calls}
            bandwidth = Timer(threads)
            errors = {name: relative_error(call, floats, x, xb) for name, call in calls.items()}
            peak = 0.0
            for index in range(rounds):
                bandwidth.time(index, probe_read)
                peak = max(peak, native.roofline_f32(threads))
                for name, call in calls.items():
                    slow = name.startswith("torch fp8")  # a hundred times slower: a few calls tell enough
                    if not slow or index < 3:
                        timers[name].time(index, lambda i, call=call: call(i, x, xb), 1 if slow else TRIES)  # noqa: B023
            limit = probe_bytes / bandwidth.seconds
            for name, timer in timers.items():
                taken, rival = timer.seconds, RIVALS.get(name)
                rows.append(
                    {
                        "threads": threads,
                        "out_features": out_features,
                        "in_features": in_features,
                        "tokens": count,
                        "contender": name,
                        "ms": taken * 1e3,
                        "fastest_ms": timer.fastest * 1e3,
                        "undisturbed_samples": len(timer.quiet),
                        "undisturbed": timer.is_quiet,
                        "gb_per_s": reads[name] / taken / 1e9,
                        "read_limit_gb_per_s": limit / 1e9,
                        "read_limit_undisturbed": bandwidth.is_quiet,
                        "fraction_of_read_limit": reads[name] / taken / limit,
                        "gflop_per_s": 2 * count * out_features * in_features / taken / 1e9,
                        "f32_peak_gflop_per_s": peak / 1e9,
                        "relative_error": errors[name],
                        "speedup_over": rival,
                        "speedup": rival and timers[rival].over(timer),
                    }
                )
                print(
                    *list(rows[-1].values())[:6],
                    f"{rows[-1]['gb_per_s']:.1f} GB/s",
                    rows[-1]["speedup"],
                    flush=True,
                )
    return rows


def same_call(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("threads", "out_features", "in_features", "tokens"))


def markdown(report: dict) -> str:
    machine = report["machine"]
    lines = [
        "# Linear layers over bf16 and fp8 weights on a CPU",
        "",
        f"{machine['cpu']}, {machine['logical_cpus']} CPUs, path {machine['path']}"
        f"{', AVX512_BF16' if machine['avx512_bf16'] else ''}; torch {machine['torch']}, Python {machine['python']};"
        f" {report['date']}; load average before the run {machine['load_average']:.1f}.",
        "",
        "`python benchmarks/cpu_float_linear.py`: cold weights, contenders in turn, medians. Speed-up: the median of",
        "each round's own ratio to torch doing the same job (bf16 x and bf16 weights; float32 both; fp8 codes to bf16,",
        "then multiply). Read limit: the roofline probe over the same memory in the same rounds, 8 streams a thread.",
        "Fraction: bytes of weights over time over that limit. A star: other processes had the CPUs in all but two",
        "calls at most; then the fastest call stands here, and speed-ups compare fastest with fastest: rough figures.",
        "Error: relative, against float64, over the activations as given; 2e-3 is the rounding of the result to bf16.",
        f"Above {TORCH_TOKENS} tokens `native_bf16` leaves bf16 x bf16 to torch where the CPU has AVX512_BF16.",
        "",
    ]
    for threads in sorted({row["threads"] for row in report["rows"]}):
        for shape in sorted({(row["out_features"], row["in_features"]) for row in report["rows"]}):
            chosen = [
                row
                for row in report["rows"]
                if row["threads"] == threads and (row["out_features"], row["in_features"]) == shape
            ]
            lines += [
                f"## {shape[0]} x {shape[1]}, {threads} thread{'s' if threads > 1 else ''}",
                "",
                "| M | contender | ms | GB/s | fraction of the read limit | GFLOP/s | speed-up over torch | error |",
                "| --- | --- | --- | --- | --- | --- | --- | --- |",
            ]
            for row in chosen:
                rival = next(
                    (r for r in chosen if same_call(r, row) and r["contender"] == row["speedup_over"]), row
                )
                rough = "" if row["undisturbed"] and rival["undisturbed"] else " *"
                speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}{rough}"
                star = "" if row["undisturbed"] else " *"
                lines.append(
                    f"| {row['tokens']} | {row['contender']} | {row['ms']:.2f}{star} |"
                    f" {row['gb_per_s']:.1f} | {row['fraction_of_read_limit']:.2f} |"
                    f" {row['gflop_per_s']:.0f} | {speedup} | {row['relative_error']:.0e} |"
                )
            limits = [row["read_limit_gb_per_s"] for row in chosen]
            peaks = [row["f32_peak_gflop_per_s"] for row in chosen]
            lines += [
                "",
                f"Probed: read {min(limits):.1f} to {max(limits):.1f} GB/s,"
                f" float32 {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s (medians for each M).",
                "",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    reason = extension.native_missing_reason()
    if reason is not None:
        raise SystemExit(reason)
    from pymllm import _native

    info = extension.probe()
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": info.brand,
            "logical_cpus": info.logical_cpus,
            "path": info.best_path,
            "avx512_bf16": "avx512_bf16" in info.features,
            "l2_bytes": info.l2_bytes,
            "l3_bytes": info.l3_bytes,
            "transparent_huge_pages": info.transparent_huge_pages,
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "rows": [
            row
            for threads in options.threads
            for row in measure(threads, options.tokens, options.rounds, _native)
        ],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cpu_float_linear.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "cpu_float_linear.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
