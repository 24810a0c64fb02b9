"""Native calls of every kind, small, with the tensors that they are given by name, for tests that change these."""

# T tokens, O out_features, I in_features, E experts, K experts a token, R requests

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.attention import KVType, PagedKV
from pymllm.kernels.canonical import CodebookWeight, DenseWeight, Fp8Weight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.attention import NativeAttention, NativeKVStore
from pymllm.kernels.native.codebook import NativeCodebook
from pymllm.kernels.native.elementwise import NativeElementwise
from pymllm.kernels.native.embedding import NativeFp4Embedding, NativeInt4Embedding
from pymllm.kernels.native.experts import NativeIntegerExperts
from pymllm.kernels.native.float_linear import NativeFloatLinear
from pymllm.kernels.native.fp4 import NativeFp4
from pymllm.kernels.native.fp8 import NativeFp8Linear
from pymllm.kernels.native.int4 import NativeInt4
from pymllm.kernels.native.int8 import NativeInt8
from pymllm.kernels.native.recurrence import NativeCausalConv, NativeGatedDelta, NativeMamba2Scan
from pymllm.kernels.native.sampling import NativeSampling

from ..attention.steps import REQUESTS_IN_BLOCKS, blocks_of_four, make_case, make_problem
from ..tensors import floats
from .recurrence_cases import small_cases, step_of
from .test_native_integer import fp4, integers
from .test_sampling import batch

Tensors = dict[str, Tensor]
ANY = -(2**63)  # the least of the numbers that stand for nothing


@dataclass
class Call:
    """A native call.

    tensors: what it is given, by name; `run` makes the call with these, and returns what it makes or writes.
    ids: of the tensors that name something, from which number to below which; else -1 stands for nothing.
    """

    tensors: Tensors
    run: Callable[[Tensors], Any]
    ids: dict[str, tuple[int, int]]


def linear(kernel: Any, weight: Any, **changes: Any) -> Call:
    outputs, inputs = weight.shape
    problem = LinearProblem(weight.type, inputs, outputs, torch.float32, probe_device("cpu"), **changes)
    assert kernel.why_not(problem) is None
    tensors = {"x": floats(3, inputs), "bias": floats(outputs), **kernel.pack(weight, problem)}

    def run(t: Tensors) -> Tensor:
        rest = {name: tensor for name, tensor in t.items() if name not in ("x", "bias")}
        return kernel.run(rest, problem, t["x"], t["bias"])

    return Call(tensors, run, {})


def embedding(kernel: Any, weight: Any) -> Call:
    rows, width = weight.shape
    problem = LinearProblem(weight.type, width, rows, torch.float32, probe_device("cpu"))
    tensors = {"ids": torch.tensor([0, 3, rows - 1]), **kernel.pack(weight, problem)}
    return Call(tensors, lambda t: kernel.run(t, problem, t["ids"]), {"ids": (0, rows)})


def packing(weight: Any) -> Call:
    problem = LinearProblem(weight.type, weight.shape[1], weight.shape[0], torch.float32, probe_device("cpu"))
    tensors = {name: t for name, t in weight.tensors().items() if t is not None}

    def run(t: Tensors) -> Tensor:
        return NativeInt4().pack(replace(weight, **t), problem)["blocks"]

    return Call(tensors, run, {})


def unpacking(weight: Any) -> Call:
    problem = LinearProblem(weight.type, weight.shape[1], weight.shape[0], torch.float32, probe_device("cpu"))
    kernel = NativeInt4()
    return Call(
        dict(kernel.pack(weight, problem)),
        lambda t: list(kernel.unpack(t, problem).tensors().values()),
        {},
    )


def experts() -> Call:
    count, hidden, inner, kernel = 4, 64, 32, NativeIntegerExperts()
    ups = [fp4((2 * inner, hidden, 32), rows=True) for _ in range(count)]
    downs = [integers(4, (hidden, inner, 32), zeros="each", seed=e) for e in range(count)]
    problems = [
        LinearProblem(w.type, w.shape[1], w.shape[0], torch.float32, probe_device("cpu"))
        for w in (ups[0], downs[0])
    ]
    problem = ExpertsProblem((problems[0],), problems[1], count, GatedActivation("silu"), False)
    assert kernel.why_not(problem) is None
    tensors = {
        "x": floats(3, hidden),
        "topk_ids": torch.tensor([[0, 3], [1, 2], [2, 0]]),
        "topk_weights": torch.rand(3, 2),
        "gate_up bias": floats(count, 2 * inner),
        "down bias": floats(count, hidden),
        **kernel.pack(ExpertsWeight((ups,), downs), problem),
    }

    def run(t: Tensors) -> Tensor:
        bias = ExpertsBias(t["gate_up bias"], t["down bias"])
        return kernel.run(t, problem, t["x"], t["topk_ids"], t["topk_weights"], bias)

    return Call(tensors, run, {"topk_ids": (ANY, count)})


STEP = ("cu_seqlens_q", "context_lens", "page_tables", "status_table", "prefix_lens", "padded_prefix_lens")
PAGES = ("k", "v", "k_scale", "v_scale")


FLOAT_PAGES = KVType(torch.float32)


def attention(kind: KVType | None = FLOAT_PAGES, blocks: bool = False) -> Call:
    """kind: of the cache; None: there is none."""
    problem = make_problem(sinks=True, block_causal=blocks, page_size=4, kv=kind or KVType(torch.float32))
    requests = REQUESTS_IN_BLOCKS if blocks else [(0, 3), (0, 9)] if kind is None else [(9, 3), (0, 6)]
    case = make_case(problem, requests, **(blocks_of_four(prefix_causal=True, hole=True) if blocks else {}))
    case.step.page_size = problem.page_size
    tensors = {"q": case.q, "sinks": case.sinks, **{n: getattr(case.step, n) for n in STEP}}
    if kind is None:
        tensors |= {"new k": case.k, "new v": case.v}
        del tensors["page_tables"]
    else:
        tensors |= {f"cache {name}": getattr(case.cache, name) for name in PAGES}

    def run(t: Tensors) -> Tensor:
        for name in STEP:
            if name in t:
                setattr(case.step, name, t[name])
        cache = None
        if kind is not None:
            cache = case.cache
            for name in PAGES:
                setattr(cache, name, t.get(f"cache {name}"))
        k, v = t.get("new k", case.k), t.get("new v", case.v)
        return NativeAttention().run(problem, t["q"], k, v, case.step, cache, t["sinks"])

    lengths = sum(b for _, b in requests)
    ids = {"cu_seqlens_q": (0, lengths + 1), "context_lens": (0, 4 * case.step.page_tables.shape[1] + 1)}
    if kind is not None:
        ids["page_tables"] = (0, case.cache.k.shape[0])
    return Call({n: t for n, t in tensors.items() if t is not None}, run, ids)


def store(kind: KVType) -> Call:
    problem = make_problem(page_size=4, kv=kind)
    case = make_case(problem, [(9, 3), (0, 6)])
    slots = torch.randperm(12)[:9]
    tensors = {"new k": case.k, "new v": case.v, "slot_mapping": slots}
    tensors |= {f"cache {name}": getattr(case.cache, name) for name in PAGES}

    def run(t: Tensors) -> list[Tensor]:
        pages = [t.get(f"cache {name}") for name in PAGES]
        case.step.slot_mapping = t["slot_mapping"]
        cache = PagedKV(kind, *pages)  # type: ignore[arg-type]
        NativeKVStore().run(problem, t["new k"], t["new v"], cache, case.step)
        return [page.float().clone() for page in pages if page is not None]

    count = case.cache.k.shape[0] * problem.page_size
    return Call({n: t for n, t in tensors.items() if t is not None}, run, {"slot_mapping": (ANY, count)})


def norm() -> Call:
    tensors = {"x": floats(3, 24), "weight": floats(24), "residual": floats(3, 24, seed=2)}
    kernel = NativeElementwise()
    return Call(tensors, lambda t: list(kernel.rms_norm(t["x"], t["weight"], 1e-6, t["residual"])), {})


def gated() -> Call:
    return Call({"x": floats(3, 24)}, lambda t: NativeElementwise().silu_and_mul(t["x"]), {})


def rotary() -> Call:
    tensors = {"x": floats(3, 2, 24), "cos": floats(3, 8), "sin": floats(3, 8, seed=3)}
    return Call(tensors, lambda t: NativeElementwise().rotate(t["x"], t["cos"], t["sin"]), {})


def recurrence(number: int) -> Call:
    kernel = (NativeGatedDelta, NativeMamba2Scan, NativeCausalConv)[number]()
    case = small_cases(9)[number]
    step = step_of(((5, 0, 4), (4, 9, 0)))
    own = {**case.tokens, **{n: t for n, t in case.others.items() if t is not None}}
    names = ("cu_seqlens_q", "context_lens", "state_slots")
    tensors = {**own, "state": case.state(), **{name: getattr(step, name) for name in names}}

    def run(t: Tensors) -> list[Tensor]:
        for name in names:
            setattr(step, name, t[name])
        state = t["state"] if t["state"] is not tensors["state"] else t["state"].clone()
        y = kernel.run(case.problem, **{name: t[name] for name in own}, state=state, step=step)
        return [y, state]

    ids = {"cu_seqlens_q": (0, 10), "context_lens": (0, 2**31), "state_slots": (ANY, 7)}
    return Call(tensors, run, ids)


def sampling() -> Call:
    rows = batch([{"temperature": 0.0}, {"number": 0.5}], [{1: 2.0}, {}], [{}, {3: 1.0}])
    names = tuple(vars(rows))
    tensors = {"logits": floats(2, 9), **vars(rows)}

    def run(t: Tensors) -> Tensor:
        return NativeSampling().choose(t["logits"], replace(rows, **{name: t[name] for name in names}))

    ids = dict.fromkeys(("bias_tokens", "seen_tokens"), (0, 9)) | dict.fromkeys(
        ("bias_starts", "seen_starts"), (0, 2)
    )
    return Call(tensors, run, ids)


def likeliest() -> Call:
    tensors = {"logits": floats(2, 9), "tokens": torch.tensor([0, 8])}
    return Call(
        tensors,
        lambda t: list(NativeSampling().log_probabilities(t["logits"], t["tokens"], 3)),
        {"tokens": (0, 9)},
    )


def nf4() -> Any:
    return CodebookWeight(
        torch.randint(0, 16, (16, 64), dtype=torch.uint8),
        torch.linspace(-1, 1, 16),
        torch.rand(16, 1) + 0.1,
        "nf4",
        64,
    )


CALLS: dict[str, Callable[[], Call]] = {
    "int4": lambda: linear(NativeInt4(), integers(4, (20, 64, 32), zeros="each")),
    "int4, filled up": lambda: linear(NativeInt4(), integers(4, (20, 40, 40), zeros="offsets")),
    "int8": lambda: linear(NativeInt8(), integers(8, (20, 64, 32))),
    "fp4 with factors": lambda: linear(NativeFp4(), fp4((20, 64, 32), rows=True)),
    "bf16": lambda: linear(NativeFloatLinear(), DenseWeight(floats(20, 64).bfloat16())),
    "fp8": lambda: linear(
        NativeFp8Linear(), Fp8Weight.from_float(floats(20, 64), block=(1, 0), activations="float")
    ),
    "nf4": lambda: linear(NativeCodebook(), nf4()),
    "rows of int4": lambda: embedding(NativeInt4Embedding(), integers(4, (20, 64, 32), zeros="each")),
    "rows of fp4": lambda: embedding(NativeFp4Embedding(), fp4((20, 64, 32), rows=True)),
    "packing": lambda: packing(integers(4, (20, 64, 32), zeros="each")),
    "unpacking": lambda: unpacking(integers(4, (20, 64, 32), zeros="each")),
    "experts": experts,
    "attention": attention,
    "attention, fp8": lambda: attention(KVType(torch.float8_e4m3fn, "static")),
    "attention, int8": lambda: attention(KVType(torch.int8, "token")),
    "attention in blocks": lambda: attention(blocks=True),
    "attention without a cache": lambda: attention(None),
    "storing": lambda: store(KVType(torch.float32)),
    "storing bfloat16": lambda: store(KVType(torch.bfloat16)),
    "storing int8": lambda: store(KVType(torch.int8, "token")),
    "norm": norm,
    "silu": gated,
    "rotary": rotary,
    "gated delta": lambda: recurrence(0),
    "mamba2": lambda: recurrence(1),
    "convolution": lambda: recurrence(2),
    "sampling": sampling,
    "log-probabilities": likeliest,
}
