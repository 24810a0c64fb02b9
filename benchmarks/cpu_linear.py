"""Time the native int4 linear layer against its peers: asymmetric int4, group 128, cold weights.

    python benchmarks/cpu_linear.py [--peers torch_f32 onnxruntime ...] [--tokens 1 4 16 128 512] [--threads 1 2]

Every peer has a process of its own, in which it and our kernel take turns, A B A B, each time on the next of several
copies of the weights, which together exceed the caches; between the turns the limits are probed (roofline.py). Peers
that are not installed are left out, and the table says so. On a machine that others use as well, --clock cpu counts
processor time, which is the same as the wall clock on one thread when nothing else runs, and says nothing about two
threads. The script writes results/cpu_linear.json and .md beside this file (cpu_linear_processor_time with --clock
cpu).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm import _native
from pymllm.kernels.aten.int4pack import TorchInt4Pack
from pymllm.kernels.canonical import IntWeight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.int4 import NativeInt4

# M tokens, O out_features, I in_features, G group_size

GROUP = 128
SHAPES = [(4096, 14336), (14336, 4096), (4096, 4096)]
COLD_BYTES = 160 << 20  # of all copies together: five times the largest cache we meet
MEMORY_BOUND_TOKENS = 8  # up to here the limit is reading the weights, above it the integer peak
UNDISTURBED = {"int8_gop_per_s": 0.8, "read_gb_per_s": 0.7}  # of the best probe with as many threads
CHECKED_OUTPUTS = 256  # compared with float64
INT4_PEERS = ("torch_int4pack", "onnxruntime", "openvino")

Run = Callable[[Tensor], Any]
Prepared = tuple[Run, int]  # and the bytes of its weights


def make_weight(out_features: int, in_features: int) -> IntWeight:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    groups = in_features // GROUP
    scales = (torch.rand(out_features, groups, generator=generator) * 0.004 + 0.002).half()
    return IntWeight(codes(out_features, in_features), scales, codes(out_features, groups), 4, GROUP)


# ------------------------------------------------------------------------------------------------- ours, and the peers


def ours(weight: IntWeight, threads: int, compute: str = "auto") -> Prepared:
    out_features, in_features = weight.shape
    device = probe_device("cpu")
    problem = LinearProblem(weight.type, in_features, out_features, torch.float32, device, compute)  # type: ignore[arg-type]
    kernel = NativeInt4()
    packed = kernel.pack(weight, problem)
    return lambda x: kernel.run(packed, problem, x, None), packed["blocks"].nbytes


def ours_exact(weight: IntWeight, threads: int) -> Prepared:
    return ours(weight, threads, "exact")


def torch_f32(weight: IntWeight, threads: int) -> Prepared:
    dense = weight.dequantize(torch.float32)
    return lambda x: F.linear(x, dense), dense.nbytes


def torch_bf16(weight: IntWeight, threads: int) -> Prepared:
    dense = weight.dequantize(torch.bfloat16)
    return lambda x: F.linear(x.bfloat16(), dense), dense.nbytes


def torch_int4pack(weight: IntWeight, threads: int) -> Prepared:
    out_features, in_features = weight.shape
    problem = LinearProblem(weight.type, in_features, out_features, torch.bfloat16, probe_device("cpu"))
    kernel = TorchInt4Pack()
    packed = kernel.pack(weight, problem)
    used = ("codes", "scales_and_zeros")
    return lambda x: kernel.run(packed, problem, x.bfloat16(), None), sum(
        packed[name].nbytes for name in used
    )


def pack_pairs(codes: Tensor) -> np.ndarray:
    """Pack codes [O, n] into bytes [O, n/2], the even code in the low nibble."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous().numpy()


def onnxruntime(weight: IntWeight, threads: int) -> Prepared:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    out_features, in_features = weight.shape
    groups = in_features // GROUP
    assert weight.zeros is not None and groups % 2 == 0
    constants = {
        "B": pack_pairs(weight.codes).reshape(out_features, groups, GROUP // 2),
        "scales": weight.scales.float().flatten().numpy(),
        "zeros": pack_pairs(weight.zeros).flatten(),
    }
    sizes = {"K": in_features, "N": out_features, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["A", *constants], ["Y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", in_features])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", out_features])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    nbytes = sum(value.nbytes for value in constants.values())
    return lambda x: torch.from_numpy(session.run(None, {"A": x.numpy()})[0]), nbytes


def openvino(weight: IntWeight, threads: int) -> Prepared:
    import openvino as ov
    from openvino import opset13 as ops

    out_features, in_features = weight.shape
    groups = in_features // GROUP
    assert weight.zeros is not None

    kept: list[Any] = []  # OpenVINO looks into these arrays as long as it runs

    def u4(codes: Tensor, shape: list[int]) -> Any:
        kept.append(pack_pairs(codes))
        return ops.constant(ov.Tensor(kept[-1], ov.Shape(shape), ov.Type.u4))

    x = ops.parameter([-1, in_features], ov.Type.f32)
    codes = ops.convert(u4(weight.codes, [out_features, groups, GROUP]), "f16")
    zeros = ops.convert(u4(weight.zeros, [out_features, groups, 1]), "f16")
    kept.append(weight.scales.unsqueeze(-1).numpy())
    scaled = ops.multiply(ops.subtract(codes, zeros), ops.constant(kept[-1]))
    flat = ops.reshape(scaled, np.array([out_features, in_features]), special_zero=False)
    model = ov.Model([ops.matmul(x, ops.convert(flat, "f32"), False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    nbytes = out_features * in_features // 2 + weight.scales.nbytes + weight.zeros.nbytes // 2

    def run(x: Tensor, _kept: Any = (kept, model)) -> Tensor:
        return torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])

    return run, nbytes


PEERS = {
    peer.__name__: peer for peer in (ours_exact, torch_f32, torch_bf16, torch_int4pack, onnxruntime, openvino)
}
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}


# ----------------------------------------------------------------------------------------------------------- measuring


def relative_error(y: Tensor, x: Tensor, weight: IntWeight) -> float:
    rows = slice(0, CHECKED_OUTPUTS)
    assert weight.zeros is not None
    part = IntWeight(weight.codes[rows], weight.scales[rows], weight.zeros[rows], 4, GROUP)
    expected = x.double() @ part.dequantize(torch.float64).T
    return ((y[:, rows].double() - expected).norm() / expected.norm()).item()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    peer: str,
    shape: tuple[int, int],
    tokens: list[int],
    threads: int,
    seconds: float,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Measure one peer and ours on one shape, in this process: a row for each of both and each number of tokens."""
    torch.set_num_threads(threads)
    weight = make_weight(*shape)
    sides: dict[str, tuple[list[Run], int]] = {}
    for name, prepare in (("ours", ours), (peer, PEERS[peer])):
        run, nbytes = prepare(weight, threads)
        runs = [run]
        while len(runs) < 2 or len(runs) * nbytes < COLD_BYTES:
            runs.append(prepare(weight, threads)[0])
        sides[name] = (runs, nbytes)
    read = roofline.ReadProbe(huge=True, bytes_at_a_time=32 << 20)
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1))
        errors = {name: relative_error(runs[-1](x), x, weight) for name, (runs, _) in sides.items()}
        for runs, _ in sides.values():
            for run in runs:  # some peers prepare a number of tokens when they first see it
                run(x)
        times: dict[str, list[float]] = {name: [] for name in sides}
        bandwidths, peaks = [], []
        stop = time.perf_counter() + seconds
        turn = 0
        while turn < 5 or (time.perf_counter() < stop and turn < 60):
            for name, (runs, _) in sides.items():
                start = clock()
                read(8, threads)
                bandwidths.append(read.size / (clock() - start))
                peaks.append(_native.roofline_int8(threads))
                time.sleep(0.002)  # the other side's idle threads stop spinning
                if count <= MEMORY_BOUND_TOKENS:
                    runs[(2 * turn) % len(runs)](x)  # not measured: wakes the pool, brings back the code
                run = runs[(2 * turn + 1) % len(runs)]
                start = clock()
                run(x)
                times[name].append(clock() - start)
            turn += 1
        bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
        memory_limit, int8_limit = sides["ours"][1] / bandwidth, 2 * count * shape[0] * shape[1] / peak
        limit = memory_limit if count <= MEMORY_BOUND_TOKENS else int8_limit
        for name, (_, nbytes) in sides.items():
            median, best = statistics.median(times[name]), min(times[name])
            rows.append(
                {
                    "shape": list(shape),
                    "tokens": count,
                    "threads": threads,
                    "kernel": name,
                    "beside": peer,
                    "median_ms": median * 1e3,
                    "min_ms": best * 1e3,
                    "gb_per_s": nbytes / median / 1e9,
                    "limit_ms": limit * 1e3,
                    "fraction": limit / median,
                    # The same from the fastest of each: what is left of it when other programs take turns with us.
                    "fraction_of_best": (
                        sides["ours"][1] / max(bandwidths)
                        if count <= MEMORY_BOUND_TOKENS
                        else int8_limit * peak / max(peaks)
                    )
                    / best,
                    "relative_error": errors[name],
                    "repeats": turn,
                    "read_gb_per_s": bandwidth / 1e9,
                    "int8_gop_per_s": peak / 1e9,
                }
            )
    return rows


def versions() -> dict[str, str]:
    found = {}
    for package in sorted({name for names in PACKAGES.values() for name in names} | {"torch"}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def disturbed(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Tell whether the probes of a row say that something else had a CPU: other programs, or a peer's idle threads."""
    peers = [other for other in rows if other["threads"] == row["threads"]]
    return any(
        row[probe] < share * max(other[probe] for other in peers) for probe, share in UNDISTURBED.items()
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    kept = [row for row in rows if not disturbed(row, rows)]
    if len(kept) < len(rows):
        lines += [
            "",
            f"{(len(rows) - len(kept)) // 2} of {len(rows) // 2} comparisons are not shown: the probes between their "
            "runs were far below the best ones (UNDISTURBED in the script), so that something else had a CPU. With "
            "two threads on two CPUs the probes catch that only in part: fractions there are lower bounds.",
        ]
    rows = kept
    for shape, threads in dict.fromkeys((tuple(row["shape"]), row["threads"]) for row in rows):
        here = [row for row in rows if tuple(row["shape"]) == shape and row["threads"] == threads]
        lines += ["", f"## O={shape[0]}, I={shape[1]}, threads {threads}", ""]
        lines += [
            "| M | kernel | median ms | min ms | GB/s | of the limit | (best) | error | ours, beside it | ratio |"
        ]
        lines += ["| --- |" + " --- |" * 9]
        for row in sorted(here, key=lambda row: row["tokens"]):
            if row["kernel"] == "ours":
                continue
            beside = next(
                r
                for r in here
                if r["kernel"] == "ours" and (r["beside"], r["tokens"]) == (row["beside"], row["tokens"])
            )
            lines.append(
                f"| {row['tokens']} | {row['kernel']} | {row['median_ms']:.3f} | {row['min_ms']:.3f} "
                f"| {row['gb_per_s']:.1f} | {row['fraction']:.2f} | {row['fraction_of_best']:.2f} "
                f"| {row['relative_error']:.1e} | {beside['median_ms']:.3f} ({beside['fraction']:.2f}) "
                f"| {row['median_ms'] / beside['median_ms']:.2f} |"
            )
        for tokens in sorted({row["tokens"] for row in here}):
            mine = [row for row in here if row["kernel"] == "ours" and row["tokens"] == tokens]
            middle = {
                key: statistics.median(row[key] for row in mine)
                for key in (
                    "median_ms",
                    "min_ms",
                    "gb_per_s",
                    "fraction",
                    "fraction_of_best",
                    "relative_error",
                )
            }
            lines.append(
                f"| {tokens} | **ours** | {middle['median_ms']:.3f} | {middle['min_ms']:.3f} "
                f"| {middle['gb_per_s']:.1f} | **{middle['fraction']:.2f}** | {middle['fraction_of_best']:.2f} "
                f"| {middle['relative_error']:.1e} | | |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, probe_device_cpus()}))
    parser.add_argument("--shapes", nargs="+", default=[f"{o}x{i}" for o, i in SHAPES])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each row")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument(
        "--render", action="store_true", help="only write the table of the last results again"
    )
    parser.add_argument("--child", nargs=3, metavar=("PEER", "SHAPE", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        render(options.clock)
        return
    if options.child:
        peer, shape, threads = options.child
        out_features, in_features = (int(side) for side in shape.split("x"))
        sides = (out_features, in_features)
        rows = measure(peer, sides, options.tokens, int(threads), options.seconds, CLOCKS[options.clock])
        print(json.dumps(rows))
        return

    info = roofline.machine() | {"versions": versions(), "clock": options.clock}
    rows, left_out = [], []
    for peer in options.peers:
        missing = [name for name in PACKAGES.get(peer, ()) if name not in info["versions"]]
        if missing:
            left_out.append(f"{peer}: {', '.join(missing)} not installed")
            continue
        for shape in options.shapes:
            for threads in options.threads:
                command = [
                    sys.executable,
                    __file__,
                    "--seconds",
                    str(options.seconds),
                    "--clock",
                    options.clock,
                    "--tokens",
                ]
                command += [*map(str, options.tokens), "--child", peer, shape, str(threads)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    left_out.append(
                        f"{peer} {shape}, {threads} threads: {result.stderr.strip().splitlines()[-1]}"
                    )
                    continue
                rows += json.loads(result.stdout.splitlines()[-1])
                print(f"{peer} {shape}, {threads} threads: done", file=sys.stderr)

    text = json.dumps({"machine": info, "left_out": left_out, "rows": rows}, indent=1)
    roofline.RESULTS.mkdir(exist_ok=True)
    results_file(options.clock).write_text(text + "\n")
    render(options.clock)


def results_file(clock: str) -> Path:
    return roofline.RESULTS / ("cpu_linear.json" if clock == "wall" else "cpu_linear_processor_time.json")


def render(clock: str) -> None:
    """Write the table of a results file beside it, and print it."""
    found = json.loads(results_file(clock).read_text())
    info, left_out, rows = found["machine"], found["left_out"], found["rows"]
    installed = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    lines = [
        "# int4 linear on the CPU: asymmetric, group 128, cold weights",
        "",
        roofline.describe(info) + f" {installed}.",
    ]
    lines += [
        "",
        f"Limit: for M up to {MEMORY_BOUND_TOKENS} reading our packed weights at the bandwidth probed between the "
        "runs, above that the products at the probed int8 peak; every kernel is held to this same limit. (best): "
        "fastest run against fastest probe. Error: relative, to float64. Ours, beside it: our median (and fraction) "
        "in that peer's process; the ratio is the peer's median over that. **ours**: the median over all processes.",
    ]
    if info["clock"] == "cpu":
        lines += ["", "Times are processor time: other programs ran beside the measurement."]
    lines += [f"\nLeft out: {'; '.join(left_out)}."] if left_out else []
    lines += table(rows)
    results_file(clock).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def probe_device_cpus() -> int:
    return int(roofline.machine()["logical_cpus"])


if __name__ == "__main__":
    main()
