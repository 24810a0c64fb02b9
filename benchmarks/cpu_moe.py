"""Time experts on the CPU: all routed ones in one call, one after the other, the reference, and torch in bfloat16.

    python benchmarks/cpu_moe.py [--tokens 1 4 16 128] [--threads 1 2] [--seconds 0.6]

The sizes are those of a Qwen3-30B-A3B layer with fewer experts (hidden 2048, intermediate 768, 64 experts, 8 a token).
Every copy of the layer routes by itself, and the routed experts of all copies exceed the caches; the limit counts only
the experts that were routed to. Contenders take turns in one process. The script writes results/cpu_moe.json and .md
beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import cpu_formats
import roofline
import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import IntWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.linear_experts import LinearExperts, slots_by_expert
from pymllm.kernels.native.experts import NativeIntegerExperts
from pymllm.kernels.reference.experts import ReferenceExperts

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 2048, 768, 64, 8, 128


def make_weight(experts: int) -> ExpertsWeight:
    generator = torch.Generator().manual_seed(0)

    def product(out_features: int, in_features: int) -> IntWeight:
        def codes(inputs: int) -> Tensor:
            return torch.randint(0, 16, (out_features, inputs), dtype=torch.uint8, generator=generator)

        groups = in_features // GROUP
        scales = (torch.rand(out_features, groups, generator=generator) * 0.004 + 0.002).half()
        return IntWeight(codes(in_features), scales, codes(groups), 4, GROUP)

    gate_up = [product(2 * INTERMEDIATE, HIDDEN) for _ in range(experts)]
    return ExpertsWeight((gate_up,), [product(HIDDEN, INTERMEDIATE) for _ in range(experts)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring, for each number of tokens")
    options = parser.parse_args()
    weight = make_weight(EXPERTS)
    device = probe_device("cpu")
    first, second = (
        LinearProblem(w.type, w.shape[1], w.shape[0], torch.float32, device)
        for w in (weight.gate_up[0][0], weight.down[0])
    )
    problem = ExpertsProblem((first,), second, EXPERTS, GatedActivation(), False)
    kernels = {"ours": NativeIntegerExperts(), "one by one": LinearExperts(), "reference": ReferenceExperts()}
    packed = {name: kernel.pack(weight, problem) for name, kernel in kernels.items()}
    dense = [
        (one.dequantize(torch.bfloat16), two.dequantize(torch.bfloat16))
        for one, two in zip(weight.gate_up[0], weight.down, strict=True)
    ]

    def run(name: str, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if name in kernels:
            return kernels[name].run(packed[name], problem, x, ids, weights, ExpertsBias())
        total = torch.zeros(x.shape)
        for index, slots in slots_by_expert(ids):
            tokens = slots // TOP_K
            gate, up = F.linear(x[tokens].bfloat16(), dense[index][0]).chunk(2, dim=-1)
            answer = F.linear(F.silu(gate) * up, dense[index][1])
            total.index_add_(0, tokens, answer.float() * weights.flatten()[slots].unsqueeze(-1))
        return total

    info, tables = roofline.machine(), {}
    expert_bytes = sum(t.nbytes for t in packed["ours"].values()) // EXPERTS
    for threads, tokens in itertools.product(options.threads, options.tokens):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, HIDDEN, generator=generator)
        # Turns route to other experts each, so that these come from memory and not from a cache.
        scores = torch.rand(8, tokens, EXPERTS, generator=generator)
        weights, ids = scores.topk(TOP_K)
        used = round(sum(turn.unique().numel() for turn in ids) / len(ids))

        def maker(name: str, weights: Tensor = weights, ids: Tensor = ids, used: int = used):
            turns = itertools.count()

            def call(rows: Tensor) -> Tensor:
                turn = next(turns) % len(ids)
                return run(name, rows, ids[turn], weights[turn])

            return lambda: (call, used * expert_bytes)

        makers = {name: maker(name) for name in (*kernels, "torch bf16")}
        cpu_formats.COLD_BYTES = 0  # the turns' own routing keeps the experts cold
        macs = TOP_K * 3 * HIDDEN * INTERMEDIATE
        tables.setdefault("int4 g128 experts", []).extend(
            cpu_formats.measure(makers, {tokens: x}, macs, threads, options.seconds)
        )
        print(f"{tokens} tokens, {threads} threads: done", file=sys.stderr)
    head = [
        f"# Experts on the CPU: hidden {HIDDEN}, intermediate {INTERMEDIATE}, {EXPERTS} experts, {TOP_K} a token, int4",
        "",
        "Limit: reading the routed experts' packed weights at the bandwidth probed between the runs, or the products "
        "at the probed int8 peak, whichever takes longer. ×: the time over ours. MiB: of the routed experts at the "
        "first M, as we pack them.",
    ]
    cpu_formats.write("cpu_moe", head, info, tables)


if __name__ == "__main__":
    main()
