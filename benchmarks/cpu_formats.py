"""Time linear layers over every family of quantised weights on the CPU: ours, the reference, torch and OpenVINO.

    python benchmarks/cpu_formats.py [--formats mxfp4 nf4 ...] [--tokens 1 4 16 128] [--threads 1] [--seconds 0.6]

All contenders of a format take turns in one process, each time on the next of several copies of the weights, which
together exceed the caches; between the turns the limits are probed (roofline.py). The plain torch contender multiplies
the dequantised weight in bfloat16. The script writes results/cpu_formats.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import roofline
import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm import _native
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.reference.linear import ReferenceLinear
from pymllm.kernels.registry import select

# M tokens, O out_features, I in_features, G group_size

SHAPE = (4096, 4096)
FEW_TOKENS = 8
COLD_BYTES = 160 << 20  # of all copies together: five times the largest cache we meet
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 = (*NF4, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)

Run = Callable[[Tensor], Tensor]


def integers(bits: int, group: int, *, zeros: bool = False, offsets: bool = False, **more: Any) -> IntWeight:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = SHAPE
    group = group or in_features

    def codes(inputs: int) -> Tensor:
        return torch.randint(0, 1 << bits, (out_features, inputs), dtype=torch.uint8, generator=generator)

    groups = in_features // group
    scales = torch.rand(out_features, groups, generator=generator) * 0.004 + 0.002
    return IntWeight(
        codes(in_features),
        scales if offsets or group == in_features else scales.half(),
        codes(groups) if zeros else None,
        bits,
        group,
        offsets=-8 * scales if offsets else None,
        **more,
    )


def codebook(name: str, table: tuple[float, ...], group: int, dtype: torch.dtype) -> CodebookWeight:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = SHAPE
    scales = torch.rand(out_features, in_features // group, generator=generator) * 0.4 + 0.2
    if dtype is torch.float8_e8m0fnu:
        scales = scales.log2().round().exp2()
    return CodebookWeight(
        torch.randint(0, 16, SHAPE, dtype=torch.uint8, generator=generator),
        torch.tensor(table),
        scales.to(dtype),
        name,
        group,
    )


FP4, IQ4, IQ3, IQ2 = (INTEGER_CODEBOOKS[name].values for name in ("e2m1", "iq4", "iq3_s", "iq2"))
FORMATS: dict[str, Callable[[], CanonicalWeight]] = {
    "int4 g128, zero points (AWQ)": lambda: integers(4, 128, zeros=True),
    "int4 g32 (Q4_0)": lambda: integers(4, 32),
    "int4 g32, float offsets (Q4_K)": lambda: integers(4, 32, offsets=True),
    "int8 per channel": lambda: integers(8, 0),
    "int8 g128": lambda: integers(8, 128),
    "w8a8 per token": lambda: integers(8, 0, activations="token"),
    "mxfp4": lambda: codebook("e2m1", FP4, 32, torch.float8_e8m0fnu),
    "nvfp4": lambda: codebook("e2m1", FP4, 16, torch.float8_e4m3fn),
    "iq4 g32 (IQ4_XS)": lambda: codebook("iq4", IQ4, 32, torch.float32),
    "iq3 g32 (IQ3_S)": lambda: codebook("iq3_s", IQ3, 32, torch.float32),
    "iq2 g16 (IQ2_XS, IQ2_S)": lambda: codebook("iq2", IQ2, 16, torch.float32),
    "int2 g256 (TQ2_0)": lambda: integers(2, 256, zeros=True),
    "nf4 g64": lambda: codebook("nf4", NF4, 64, torch.float32),
}


def ours(
    weight: CanonicalWeight, threads: int, *, compute: str = "auto", reference: bool = False
) -> tuple[Run, int]:
    out_features, in_features = weight.shape
    demanded = getattr(weight, "activations", "float") != "float"
    problem = LinearProblem(
        weight.type,
        in_features,
        out_features,
        torch.float32,
        probe_device("cpu"),
        "checkpoint" if demanded else compute,  # type: ignore[arg-type]
    )
    kernel = ReferenceLinear() if reference else select("linear", problem).kernel
    packed = kernel.pack(weight, problem)
    return lambda x: kernel.run(packed, problem, x, None), sum(t.nbytes for t in packed.values())


def ours_exact(weight: CanonicalWeight, threads: int) -> tuple[Run, int]:
    return ours(weight, threads, compute="exact")


def reference(weight: CanonicalWeight, threads: int) -> tuple[Run, int]:
    return ours(weight, threads, compute="exact", reference=True)


def torch_bf16(weight: CanonicalWeight, threads: int) -> tuple[Run, int]:
    dense = weight.dequantize(torch.bfloat16)
    return lambda x: F.linear(x.bfloat16(), dense), dense.nbytes


def torch_int8pack(weight: CanonicalWeight, threads: int) -> tuple[Run, int]:
    assert isinstance(weight, IntWeight)
    codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
    scales = weight.scales.flatten().bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), codes, scales), codes.nbytes + scales.nbytes


def openvino(weight: CanonicalWeight, threads: int) -> tuple[Run, int]:
    """Make OpenVINO's layer: int8 per channel, with its own dynamic quantisation of activations in groups of 128."""
    import openvino as ov
    from openvino import opset13 as ops

    assert isinstance(weight, IntWeight)
    codes = (weight.codes.to(torch.int16) - 128).to(torch.int8).numpy()
    x = ops.parameter([-1, weight.shape[1]], ov.Type.f32)
    scaled = ops.multiply(ops.convert(ops.constant(codes), "f16"), ops.constant(weight.scales.half().numpy()))
    model = ov.Model([ops.matmul(x, ops.convert(scaled, "f32"), False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Tensor, _kept: Any = (codes, model)) -> Tensor:
        return torch.from_numpy(np.array(request.infer([x.numpy()], share_inputs=True)[0]))

    return run, codes.nbytes


def contenders(name: str) -> dict[str, Callable[[CanonicalWeight, int], tuple[Run, int]]]:
    found = {"ours": ours, "ours, exact": ours_exact, "reference": reference, "torch bf16": torch_bf16}
    if name == "w8a8 per token":
        del found["ours, exact"]
    if name == "int8 per channel":
        found |= {"torch int8pack": torch_int8pack, "openvino int8": openvino}
    return found


def measure(
    makers: dict[str, Callable[[], tuple[Run, int]]],
    inputs: dict[int, Tensor],
    macs_a_token: int,
    threads: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Time every maker's run on every input, in turn.  inputs: by number of tokens."""
    torch.set_num_threads(threads)
    sides: dict[str, tuple[list[Run], int]] = {}
    for name, make in makers.items():
        try:
            run, nbytes = make()
        except ImportError:
            continue
        runs = [run]
        # The reference takes so long for its arithmetic that one more copy is cold enough.
        while len(runs) < 2 or (name != "reference" and len(runs) * nbytes < COLD_BYTES):
            runs.append(make()[0])
        sides[name] = (runs, nbytes)
    read = roofline.ReadProbe(huge=True, bytes_at_a_time=32 << 20)
    rows = []
    for tokens, x in inputs.items():
        times: dict[str, list[float]] = {name: [] for name in sides}
        bandwidths, peaks = [], []
        for runs, _ in sides.values():
            runs[0](x)
        stop, turn = time.perf_counter() + seconds, 0
        while turn < 5 or (time.perf_counter() < stop and turn < 40):
            for name, (runs, _) in sides.items():
                if name == "reference" and turn >= 3:
                    continue
                start = time.perf_counter()
                read(8, threads)
                bandwidths.append(read.size / (time.perf_counter() - start))
                peaks.append(_native.roofline_int8(threads))
                time.sleep(0.001)  # the other side's idle threads stop spinning
                if tokens <= FEW_TOKENS:
                    runs[2 * turn % len(runs)](x)  # not measured: wakes the pool, brings back the code
                run = runs[(2 * turn + 1) % len(runs)]
                start = time.perf_counter()
                run(x)
                times[name].append(time.perf_counter() - start)
            turn += 1
        nbytes, bandwidth, peak = sides["ours"][1], statistics.median(bandwidths), statistics.median(peaks)
        limit = max(nbytes / bandwidth, 2 * tokens * macs_a_token / peak)
        for name in sides:
            median = statistics.median(times[name])
            rows.append(
                {
                    "tokens": tokens,
                    "threads": threads,
                    "kernel": name,
                    "median_ms": median * 1e3,
                    "min_ms": min(times[name]) * 1e3,
                    "mib": sides[name][1] / 2**20,
                    "fraction": limit / median,
                    "read_gb_per_s": bandwidth / 1e9,
                    "int8_gop_per_s": peak / 1e9,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Write a table of a line for each kernel and a column for each number of tokens.

    A cell has the median, and our kernel's fraction of the limit, or another's ratio to ours.
    """
    counts = sorted({row["tokens"] for row in rows})
    lines = [
        "| kernel | MiB | " + " | ".join(f"M={count}, ms" for count in counts) + " |",
        "| --- |" + " --- |" * (1 + len(counts)),
    ]
    best = {row["tokens"]: row["median_ms"] for row in rows if row["kernel"] == "ours"}
    for name in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        mine = {row["tokens"]: row for row in rows if row["kernel"] == name}
        for count in counts:
            row = mine[count]
            how = (
                f"{row['fraction']:.2f} of the limit"
                if name == "ours"
                else f"{row['median_ms'] / best[count]:.2f}×"
            )
            cells.append(f"{row['median_ms']:.3f} ({how})")
        lines.append(f"| {name} | {mine[counts[0]]['mib']:.1f} | " + " | ".join(cells) + " |")
    return lines


def write(name: str, head: list[str], info: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> None:
    """Write results/NAME.json and .md."""
    lines = [*head, "", roofline.describe(info)]
    for title, rows in tables.items():
        for threads in sorted({row["threads"] for row in rows}):
            lines += ["", f"## {title}, threads {threads}", ""]
            lines += table([row for row in rows if row["threads"] == threads])
    roofline.RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"machine": info, "tables": tables}, indent=1)
    (roofline.RESULTS / f"{name}.json").write_text(content + "\n")
    (roofline.RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring, for each number of tokens")
    options = parser.parse_args()
    info, tables = roofline.machine(), {}
    inputs = {
        count: torch.randn(count, SHAPE[1], generator=torch.Generator().manual_seed(1))
        for count in options.tokens
    }
    for name in options.formats:
        tables[name] = []
        weight = FORMATS[name]()
        for threads in options.threads:
            torch.set_num_threads(threads)
            makers = {
                kernel: lambda make=make, weight=weight, threads=threads: make(weight, threads)
                for kernel, make in contenders(name).items()
            }
            tables[name] += measure(makers, inputs, SHAPE[0] * SHAPE[1], threads, options.seconds)
        print(f"{name}: done", file=sys.stderr)
    head = [
        f"# Quantised linear layers on the CPU, by format: O={SHAPE[0]}, I={SHAPE[1]}, cold weights, float32 x",
        "",
        "Limit: reading our packed weights at the bandwidth probed between the runs, or the products at the probed "
        "int8 peak, whichever takes longer (nf4 is multiplied in float32, whose peak is a quarter). ×: the time over "
        "ours.",
    ]
    write("cpu_formats", head, info, tables)


if __name__ == "__main__":
    main()
