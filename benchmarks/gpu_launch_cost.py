"""What the host spends on a launch of a GPU kernel: by Triton's own path, and bound to the compiled kernel.

    python benchmarks/gpu_launch_cost.py [--batches 300]

The launches are those of one layer's decoding step: int4 weights of an 8 B model, one request. The two ways take turns,
and a figure is the fastest batch of many, as the machine may be busy. Without a GPU the kernels are compiled for sm_90
and a stand-in takes the launches, so that what the GPU's driver takes itself is in no figure; with one, launches queue
up and are waited for after each batch. "the call" is all that the layer does on the host, launches and memory included.
Writes results/gpu_launch_cost.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import roofline
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pymllm.kernels.attention import AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.hardware import Device, probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton.attention import TritonGroupedAttention
from pymllm.kernels.triton.bound import BoundLaunches
from pymllm.kernels.triton.elementwise import TritonElementwise
from pymllm.kernels.triton.int_weights import TritonInt
from pymllm.kernels.triton.kv_store import TritonKVStore
from pymllm.kernels.triton.launch import recording
from pymllm.kernels.triton.linear_cases import random_like

CALLS = 20  # in a batch
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
LENGTH, PAGE = 2048, 16
HERE = torch.cuda.is_available()


def calls_of_a_layer(device: Device, put: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
    """Return the calls of one layer, by what they do, in order.  put: brings a tensor to where kernels read it."""
    elementwise, store, dtype = TritonElementwise(), TritonKVStore(), torch.bfloat16

    def floats(*shape: int) -> Tensor:
        return put(torch.zeros(shape, dtype=dtype))

    def linear(out_features: int, in_features: int) -> Callable[[], object]:
        kernel = TritonInt()
        example = kernel.examples()[1]
        weight = random_like(example, out_features, in_features, 0, torch.device("cpu"))
        problem = LinearProblem(weight.type, in_features, out_features, dtype, device)
        packed = {name: put(tensor) for name, tensor in kernel.pack(weight, problem).items()}
        return partial(kernel.run, packed, problem, floats(1, in_features), None)

    problem = AttentionProblem(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD,
        value_head_dim=HEAD,
        scale=HEAD**-0.5,
        dtype=dtype,
        device=device,
        kv=KVType(dtype),
    )
    q, k, v = floats(1, HEADS, HEAD), floats(1, KV_HEADS, HEAD), floats(1, KV_HEADS, HEAD)
    cache = PagedKV(problem.kv, *(floats(LENGTH // PAGE, PAGE, KV_HEADS, HEAD) for _ in "kv"))
    step = AttentionStep(
        cu_seqlens_q=put(torch.tensor([0, 1], dtype=torch.int32)),
        context_lens=put(torch.tensor([LENGTH], dtype=torch.int32)),
        page_tables=put(torch.zeros((1, LENGTH // PAGE), dtype=torch.int32)),
        slot_mapping=put(torch.zeros(1, dtype=torch.int64)),
        max_seqlen_q=1,
        max_seqlen_k=LENGTH,
    )
    x, weight, pair = floats(1, HIDDEN), floats(HIDDEN), floats(1, 2 * INNER)
    table = put(torch.zeros(1, HEAD // 2))
    return {
        "norm of a sum": lambda: elementwise.rms_norm(x, weight, 1e-6, x),
        "qkv": linear((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        "rotary and KV store": lambda: store.rotate_and_store(problem, q, k, v, cache, step, table, table),
        "attention": lambda: TritonGroupedAttention().run(problem, q, k, v, step, cache),
        "out": linear(HIDDEN, HEADS * HEAD),
        "second norm of a sum": lambda: elementwise.rms_norm(x, weight, 1e-6, x),
        "gate and up": linear(2 * INNER, HIDDEN),
        "silu and product": lambda: elementwise.silu_and_mul(pair),
        "down": linear(HIDDEN, INNER),
    }


def ordinary(self: BoundLaunches, grid: Any, arguments: Any, constants: dict[str, Any]) -> None:
    """Launch as Triton does, in place of `BoundLaunches.launch`."""
    self._compile(grid, arguments, constants)


def take_turns(ways: dict[str, Callable[[], object]], batches: int) -> dict[str, float]:
    """Return the microseconds of a call of each way in its fastest batch."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(batches):
        for name, call in ways.items():
            with (
                mock.patch.object(BoundLaunches, "launch", ordinary)
                if name == "ordinary"
                else contextlib.nullcontext()
            ):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
            if HERE:
                torch.cuda.synchronize()
    return {name: round(value, 2) for name, value in best.items()}


@contextlib.contextmanager
def somewhere() -> Iterator[tuple[Device, Callable[[Tensor], Tensor]]]:
    """Yield the device that kernels choose for, and what brings tensors to where they read them."""
    if HERE:
        yield probe_device("cuda"), lambda tensor: tensor.cuda()
        return
    from tests.kernels.triton.fake_driver import OnDevice, fake_driver

    with fake_driver() as driver:
        driver.launches = None
        yield probe_device("cuda:sm90"), OnDevice.of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    import triton

    info = roofline.machine()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with somewhere() as (device, put):
        for name, call in calls_of_a_layer(device, put).items():
            with recording() as launches:
                call()
            for way in ("bound", "ordinary"):  # compiles
                take_turns({way: call}, 1)
            rows.append(
                {
                    "what": name,
                    "launches": len(launches),
                    **take_turns({"ordinary": call, "bound": call}, options.batches),
                }
            )
            for launch in launches:
                again = partial(
                    launch.kernel.launch, launch.grid, *map(_plain, launch.arguments), **launch.constants
                )
                rows.append(
                    {
                        "what": name,
                        "kernel": launch.kernel.name,
                        **take_turns({"ordinary": again, "bound": again}, options.batches),
                    }
                )
    _write(rows, info, triton.__version__, options.dry_run)


def _plain(argument: Any) -> Any:
    """Return a tensor as one of torch's own class, which kernels are given; the stand-ins' class costs more."""
    return argument.as_subclass(Tensor) if isinstance(argument, Tensor) else argument


def _write(rows: list[dict[str, Any]], info: dict[str, Any], triton: str, dry_run: bool) -> None:
    calls = [row for row in rows if "kernel" not in row]
    alone = [row for row in rows if "kernel" in row]
    where = (
        torch.cuda.get_device_name() if HERE else "no GPU: compiled for sm_90, launches taken by a stand-in"
    )
    lines = ["# What the host spends on launches of GPU kernels", "", roofline.describe(info), ""]
    lines += [
        f"Triton {triton}; {where}. Microseconds, the fastest batch of {CALLS}. What the GPU's own driver takes "
        + ("is included." if HERE else "is not included; no figure is one of a GPU."),
        "",
        "| of one layer | launches | the call, ordinary | the call, bound | a launch, ordinary | a launch, bound |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for call in calls:
        own = [row for row in alone if row["what"] == call["what"]]
        means = [sum(row[way] for row in own) / len(own) for way in ("ordinary", "bound")]
        lines.append(
            f"| {call['what']} | {call['launches']} | {call['ordinary']:.1f} | {call['bound']:.1f} "
            f"| {means[0]:.1f} | {means[1]:.1f} |"
        )
    total = {way: sum(row[way] for row in calls) for way in ("ordinary", "bound")}
    means = [sum(row[way] for row in alone) / len(alone) for way in ("ordinary", "bound")]
    lines.append(
        f"| all | {len(alone)} | {total['ordinary']:.1f} | {total['bound']:.1f} | {means[0]:.1f} | {means[1]:.1f} |"
    )
    print("\n".join(lines))
    if dry_run:
        return
    report = {"machine": info, "triton": triton, "gpu": HERE, "microseconds": rows}
    (roofline.RESULTS / "gpu_launch_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    (roofline.RESULTS / "gpu_launch_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
