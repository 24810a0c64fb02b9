"""What Python and the binding cost around a native kernel, on layers too small to take time themselves.

    python benchmarks/cpu_dispatch.py [--batches 300]

The arguments of a kernel's native calls are noted down once; then `run` and the bare native calls take turns. A figure
is the fastest batch of many, as the machine may be busy. Writes results/cpu_dispatch.json and .md.
"""

# T tokens, O out_features, I in_features, G group_size

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import roofline
import torch

from pymllm import _native
from pymllm.attention import AttnMetaDataBase
from pymllm.kernels.attention import AttentionProblem, KVType, PagedKV
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.attention import NativeAttention, NativeKVStore
from pymllm.kernels.native.float_linear import NativeFloatLinear
from pymllm.kernels.native.fp8 import NativeFp8Linear
from pymllm.kernels.native.int4 import NativeInt4

CALLS = 100  # in a batch
NATIVE = ("attention", "float_linear", "integer_linear", "store_kv")


def linear(kernel: Any, weight: CanonicalWeight) -> Callable[[], object]:
    """Return a call of the kernel over one token in float32, with a bias."""
    out_features, in_features = weight.shape
    problem = LinearProblem(weight.type, in_features, out_features, torch.float32, probe_device("cpu"))
    packed, x, bias = kernel.pack(weight, problem), torch.randn(1, in_features), torch.randn(out_features)
    return lambda: kernel.run(packed, problem, x, bias)


def cached() -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a call of attention, and one that stores keys and values: one token of one head of 8."""
    problem = AttentionProblem(
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        value_head_dim=8,
        scale=0.3,
        dtype=torch.float32,
        device=probe_device("cpu"),
        kv=KVType(torch.float32),
    )
    q, k, v = (torch.randn(1, 1, 8) for _ in range(3))
    cache = PagedKV(problem.kv, *(torch.zeros(1, problem.page_size, 1, 8) for _ in "kv"))
    step = AttnMetaDataBase(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen_q=1,
        max_seqlen_k=1,
        context_lens=torch.tensor([1], dtype=torch.int32),
        page_tables=torch.zeros(1, 1, dtype=torch.int32),
        page_size=problem.page_size,
        slot_mapping=torch.tensor([0]),
    )
    return (
        lambda: NativeAttention().run(problem, q, k, v, step, cache),
        lambda: NativeKVStore().run(problem, k, v, cache, step),
    )


def bare(call: Callable[[], object]) -> tuple[Callable[[], object], object]:
    """Return the native calls that `call` makes, to be made again, and the result, into which they write."""
    call()  # what is looked up once is looked up
    noted: list[Callable[[], object]] = []
    natives = {name: getattr(_native, name) for name in NATIVE}

    def note(native: Callable[..., object], *arguments: Any) -> object:
        noted.append(functools.partial(native, *arguments))
        return native(*arguments)

    try:
        for name, native in natives.items():
            setattr(_native, name, functools.partial(note, native))
        result = call()
    finally:
        for name, native in natives.items():
            setattr(_native, name, native)
    return noted[0] if len(noted) == 1 else lambda: [again() for again in noted], result


def fastest(calls: list[Callable[[], object]], batches: int) -> list[float]:
    """Return the microseconds of each call in its fastest batch; the calls take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(batches):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[index] = min(best[index], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=300)
    options = parser.parse_args()
    info = roofline.machine()
    torch.set_num_threads(1)
    weight = torch.randn(16, 32)
    int4 = IntWeight.from_float(weight, bits=4, group_size=32, symmetric=False)
    fp8 = Fp8Weight.from_float(weight, block=(1, 0), activations="float")
    attention, store = cached()
    calls = {
        "int4 linear, 16 x 32": linear(NativeInt4(), int4),
        "bf16 linear, 16 x 32": linear(NativeFloatLinear(), DenseWeight(weight.bfloat16())),
        "fp8 linear, 16 x 32": linear(NativeFp8Linear(), fp8),
        "attention, one head of 8": attention,
        "storing a key and a value of 8": store,
    }
    rows = {}
    for name, call in calls.items():
        native, kept = bare(call)  # kept: the memory that the bare calls write to
        run, alone = fastest([call, native], options.batches)
        rows[name] = {"run_us": round(run, 2), "bare_us": round(alone, 2), "around_us": round(run - alone, 2)}
        del kept

    lines = ["# What Python and the binding cost around a native kernel", "", roofline.describe(info), ""]
    lines += [
        f"Microseconds of one token in float32, the fastest of {options.batches} batches; one thread.",
        "",
    ]
    lines += ["| kernel | run | native call alone | around it |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['run_us']:.2f} | {row['bare_us']:.2f} | {row['around_us']:.2f} |")
    (roofline.RESULTS / "cpu_dispatch.json").write_text(
        json.dumps({"machine": info, "microseconds": rows}, indent=1) + "\n"
    )
    (roofline.RESULTS / "cpu_dispatch.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
