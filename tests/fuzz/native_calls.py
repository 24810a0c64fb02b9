"""Right native calls, one of each kind, by name: what `bindings.py` makes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.aten.kv_store import TorchKVStore
from pymllm.kernels.aten.sampling import TorchSampling
from pymllm.kernels.attention import AttentionStep, PagedKV
from pymllm.kernels.canonical import CodebookWeight, DenseWeight, Fp8Weight
from pymllm.kernels.experts import ExpertsBias
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.addresses import checked_address
from pymllm.kernels.native.attention import NativeAttention, NativeKVStore
from pymllm.kernels.native.codebook import NativeCodebook
from pymllm.kernels.native.elementwise import NativeElementwise
from pymllm.kernels.native.embedding import NativeFp4Embedding, NativeInt4Embedding, NativeInt8Embedding
from pymllm.kernels.native.extension import native
from pymllm.kernels.native.float_linear import NativeFloatLinear
from pymllm.kernels.native.fp4 import NativeFp4
from pymllm.kernels.native.fp8 import NativeFp8Linear
from pymllm.kernels.native.int4 import NativeInt4
from pymllm.kernels.native.int8 import NativeInt8
from pymllm.kernels.native.recurrence import NativeCausalConv, NativeGatedDelta, NativeMamba2Scan
from pymllm.kernels.native.sampling import NativeSampling
from pymllm.kernels.native.stored_codes import split_columns, split_fields, split_rows, splits_here
from pymllm.kernels.reference.attention import ReferenceAttention
from pymllm.kernels.reference.causal_conv import ReferenceCausalConv
from pymllm.kernels.reference.gated_delta import ReferenceGatedDelta
from pymllm.kernels.reference.mamba2_scan import ReferenceMamba2Scan
from pymllm.kernels.sampling import SETTINGS, SamplingBatch

from ..attention.steps import KV_TYPES, blocks_of_four, make_case, make_problem
from ..kernels import recurrence_cases
from ..kernels.test_native_experts import KERNEL as EXPERTS
from ..kernels.test_native_experts import make as make_experts
from ..kernels.test_native_integer import fp4, integers
from ..moe_formula import expected_experts, routed
from ..tensors import floats

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A native call over named tensors.

    run: makes it, given the tensors and what an earlier run left (a step, which keeps what it checked).
    exact: what it must come to, over the same tensors; those named in `hidden` say nothing to it.
    """

    tensors: Tensors
    run: Callable[[Tensors, Any], Any]
    exact: Callable[[Tensors], Any]
    hidden: frozenset[str] = frozenset()
    begin: Callable[[], Any] = lambda: None


def _linear(kernel: Any, weight: Any, dtype: torch.dtype, compute: str = "auto", tokens: int = 5) -> Call:
    out, size = weight.shape
    problem = LinearProblem(weight.type, size, out, dtype, probe_device("cpu"), compute)  # type: ignore[arg-type]
    assert kernel.why_not(problem) is None, kernel.why_not(problem)
    packed = {f"packed.{name}": tensor for name, tensor in kernel.pack(weight, problem).items()}

    def run(given: Tensors, _: Any) -> Tensor:
        held = {name[7:]: tensor for name, tensor in given.items() if name.startswith("packed.")}
        return kernel.run(held, problem, given["x"], given["bias"])

    return Call(
        {"x": floats(tokens, size, dtype=dtype), "bias": floats(out, dtype=dtype, seed=3), **packed},
        run,
        lambda given: given["x"].double() @ weight.dequantize(torch.float64).T + given["bias"].double(),
        frozenset(packed),
    )


def _embedding(kernel: Any, weight: Any) -> Call:
    out, size = weight.shape
    problem = LinearProblem(weight.type, size, out, torch.float32, probe_device("cpu"))
    packed = {f"packed.{name}": tensor for name, tensor in kernel.pack(weight, problem).items()}

    def run(given: Tensors, _: Any) -> Tensor:
        held = {name[7:]: tensor for name, tensor in given.items() if name.startswith("packed.")}
        return kernel.run(held, problem, given["ids"])

    return Call(
        {"ids": torch.tensor([[0, out - 1, 3], [1, 1, 2]]), **packed},
        run,
        lambda given: weight.dequantize(torch.float64)[given["ids"]],
        frozenset(packed),
    )


def _experts(name: str, tokens: int) -> Call:
    weight, problem, packed = make_experts(name)
    held = {f"packed.{name}": tensor for name, tensor in packed.items()}
    ids, weights = routed(tokens, 2, problem.num_experts)
    x = floats(tokens, problem.gate_up[0].in_features)
    bias = {
        "bias.gate_up": floats(problem.num_experts, problem.gate_up[0].out_features, seed=8),
        "bias.down": floats(problem.num_experts, problem.down.out_features, seed=9),
    }

    def run(given: Tensors, _: Any) -> Tensor:
        packed = {name[7:]: tensor for name, tensor in given.items() if name.startswith("packed.")}
        biases = ExpertsBias(given["bias.gate_up"], given["bias.down"])
        return EXPERTS.run(packed, problem, given["x"], given["ids"], given["weights"], biases)

    def exact(given: Tensors) -> Tensor:
        biases = ExpertsBias(given["bias.gate_up"], given["bias.down"])
        return expected_experts(weight, given["x"], given["ids"], given["weights"], biases)

    return Call({"x": x, "ids": ids, "weights": weights, **bias, **held}, run, exact, frozenset(held))


STEP = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "context_lens",
    "page_tables",
    "slot_mapping",
    "state_slots",
    "status_table",
)
STEP += ("prefix_lens", "padded_prefix_lens")


def _step_with(step: AttentionStep, given: Tensors, keep: Any) -> AttentionStep:
    """Give a step these tensors.  keep: an earlier step, which is changed and remembers what it checked."""
    tensors = {name: given[name] for name in STEP if name in given}
    if keep is None:
        made = {f.name: getattr(step, f.name) for f in fields(step) if f.init and not f.name.startswith("_")}
        return type(step)(**{**made, "query_starts": None, "lengths": None, **tensors})
    for name, tensor in tensors.items():
        setattr(keep, name, tensor)
    return keep


def _attention(kv: str, requests: list[tuple[int, int]], *, pages: bool = True, **settings: Any) -> Call:
    problem = make_problem(kv=KV_TYPES[kv], **{k: v for k, v in settings.items() if k == "sinks"})
    steps = {k: v for k, v in settings.items() if k != "sinks"}
    case = make_case(problem, requests, **steps)
    tensors = {"q": case.q, "k": case.k, "v": case.v}
    tensors |= {name: value for name in STEP if (value := getattr(case.step, name)) is not None}
    if pages:
        cache = {
            "k": case.cache.k,
            "v": case.cache.v,
            "k_scale": case.cache.k_scale,
            "v_scale": case.cache.v_scale,
        }
        tensors |= {f"cache.{name}": tensor for name, tensor in cache.items() if tensor is not None}
    if case.sinks is not None:
        tensors["sinks"] = case.sinks

    def run_with(kernel: Any, given: Tensors, kept: Any) -> Tensor:
        cache = _cache(case.cache.type, given) if pages else None
        step = _step_with(case.step, given, kept)
        return kernel.run(problem, given["q"], given["k"], given["v"], step, cache, given.get("sinks"))

    return Call(
        tensors,
        lambda given, kept: run_with(NativeAttention(), given, kept),
        lambda given: run_with(ReferenceAttention(), given, None),
        begin=lambda: _step_with(case.step, {}, None),
    )


def _cache(kind: Any, given: Tensors) -> PagedKV:
    return PagedKV(
        kind, given["cache.k"], given["cache.v"], given.get("cache.k_scale"), given.get("cache.v_scale")
    )


def _store(kv: str) -> Call:
    problem = make_problem(kv=KV_TYPES[kv])
    case = make_case(problem, [(3, 4), (0, 2)])
    cache = {
        "k": case.cache.k,
        "v": case.cache.v,
        "k_scale": case.cache.k_scale,
        "v_scale": case.cache.v_scale,
    }
    held = {f"cache.{name}": tensor for name, tensor in cache.items() if tensor is not None}
    slots = torch.tensor([0, 5, 17, -1, 20, 31])

    def run_with(kernel: Any, given: Tensors, kept: Any) -> list[Tensor]:
        step = _step_with(AttentionStep(), {"slot_mapping": given["slot_mapping"]}, kept)
        kernel.run(problem, given["k"], given["v"], _cache(case.cache.type, given), step)
        return [given[name] for name in held]

    return Call(
        {"k": case.k, "v": case.v, "slot_mapping": slots, **held},
        lambda given, kept: run_with(NativeKVStore(), given, kept),
        lambda given: run_with(TorchKVStore(), given, None),
        begin=AttentionStep,
    )


def _elementwise(name: str, tensors: Tensors, *arguments: Any) -> Call:
    def run(kernel: Any, given: Tensors) -> Any:
        values = list(given.values())
        if name == "rms_norm":
            return kernel.rms_norm(given["x"], given["weight"], 1e-6, given["residual"])
        return getattr(kernel, name)(*values, *arguments)

    return Call(
        tensors,
        lambda given, _: run(NativeElementwise(), given),
        lambda given: run(TorchElementwise(), given),
    )


def _recurrence(native: Any, reference: Any, case: recurrence_cases.Case) -> Call:
    step = recurrence_cases.step_of([(3, 0, 4), (1, 9, 0), (2, 0, -1)])
    inner = {**case.tokens, **{name: t for name, t in case.others.items() if isinstance(t, Tensor)}}
    rest = {name: value for name, value in case.others.items() if not isinstance(value, Tensor)}
    given_step = {name: value for name in STEP if (value := getattr(step, name)) is not None}

    def run_with(kernel: Any, given: Tensors, kept: Any) -> list[Tensor]:
        named = {name: given[name] for name in inner}
        state = given["state"]
        y = kernel.run(case.problem, **named, **rest, state=state, step=_step_with(step, given, kept))
        return [y, state]

    return Call(
        {**inner, "state": case.state(), **given_step},
        lambda given, kept: run_with(native(), given, kept),
        lambda given: run_with(reference(), given, None),
        begin=lambda: _step_with(step, {}, None),
    )


def _sampling(choose: bool) -> Call:
    rows, vocabulary = 3, 70
    settings = torch.zeros(rows, len(SETTINGS), dtype=torch.float64)
    settings[:, SETTINGS.index("temperature")] = torch.tensor([0.0, 1.0, 0.7])
    settings[:, SETTINGS.index("top_p")] = settings[:, SETTINGS.index("repetition_penalty")] = 1.0
    settings[:, SETTINGS.index("typical_p")] = 1.0
    settings[:, SETTINGS.index("number")] = 0.4
    tensors = {
        "logits": floats(rows, vocabulary),
        "settings": settings,
        "bias_starts": torch.tensor([0, 1, 1, 3]),
        "bias_tokens": torch.tensor([5, 0, 69]),
        "bias_values": torch.tensor([1.0, -2.0, 3.0]),
        "seen_starts": torch.tensor([0, 2, 3, 3]),
        "seen_tokens": torch.tensor([1, 2, 69]),
        "seen_counts": torch.tensor([1.0, 0.0, 4.0]),
    }
    if not choose:
        tensors = {"logits": tensors["logits"], "tokens": torch.tensor([0, 69, 7])}

    def run_with(kernel: Any, given: Tensors) -> list[Tensor]:
        if choose:
            names = [name for name in given if name != "logits"]
            kernel.choose(given["logits"], SamplingBatch(**{name: given[name] for name in names}))
            # Two kernels may draw two tokens where the settings are nonsense.
            return []
        return [*kernel.log_probabilities(given["logits"], given["tokens"], 4)]

    return Call(
        tensors,
        lambda given, _: run_with(NativeSampling(), given),
        lambda given: run_with(TorchSampling(), given),
    )


def _split(name: str, dtype: torch.dtype, native_split: Any, formula: Callable[[Tensor], Tensor]) -> Call:
    """A split of stored codes, as formats ask for it: what lies otherwise in memory goes through torch."""
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(1)
    stored = torch.randint(limits.min, limits.max + 1, (67, 35), dtype=dtype, generator=generator)

    def run(given: Tensors, _: Any) -> Tensor:
        tensor = given[name]
        plain = tensor.is_cpu and tensor.layout is torch.strided and tensor.shape == stored.shape
        if plain and tensor.dtype is dtype and not splits_here(tensor):
            return formula(tensor)
        return native_split(tensor)

    return Call({name: stored}, run, lambda given: formula(given[name]))


def _fields(stored: Tensor, bits: int, count: int) -> Tensor:
    """Take words apart, [*] -> [*, count], the lowest field first."""
    return torch.stack([stored.long() >> bits * field & (1 << bits) - 1 for field in range(count)], -1)


def _splits() -> dict[str, Callable[[], Call]]:
    made: dict[str, Callable[[], Call]] = {}
    for bits in (1, 2, 4):
        for planes in (False, True):
            made[f"split fields {bits}{' planes' if planes else ''}"] = lambda bits=bits, planes=planes: (
                _split(
                    "bytes",
                    torch.uint8,
                    lambda t: split_fields(t, bits, planes=planes),
                    lambda t: _fields(t, bits, 8 // bits).transpose(1, 2 if planes else 1).flatten(1),
                )
            )
    for bits in (2, 4, 8):
        made[f"split rows {bits}"] = lambda bits=bits: _split(
            "words",
            torch.int32,
            lambda t: split_rows(t, bits),
            lambda t: _fields(t, bits, 32 // bits).permute(1, 0, 2).flatten(1),
        )
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    places = [order.index(place) for place in range(8)]
    made["split columns"] = lambda: _split(
        "words",
        torch.int32,
        lambda t: split_columns(t, order),
        lambda t: _fields(t, 4, 8)[..., places].permute(1, 2, 0).flatten(0, 1),
    )
    return made


def _lane_sums() -> Call:
    """The sums of kept weights, over bytes of no whole number of rows."""
    data = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def run(given: Tensors, _: Any) -> Tensor:
        held = given["bytes"]
        if held.shape == data.shape and held.layout is torch.strided and not held.is_contiguous():
            held = held.contiguous()
        where = checked_address("the bytes to sum", held, tuple(data.shape), torch.uint8)
        return torch.frombuffer(bytearray(native().lane_sums(where, data.numel())), dtype=torch.uint8)

    def exact(given: Tensors) -> Tensor:
        raw = given["bytes"].contiguous().numpy().tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 64), dtype=np.uint64).reshape(-1, 8)
        sums = np.cumsum(words, 0, dtype=np.uint64)
        lanes = np.concatenate([sums[-1], sums.sum(0, dtype=np.uint64)])
        return torch.from_numpy(lanes.view(np.uint8).copy())

    return Call({"bytes": data}, run, exact, frozenset({"bytes"}))


def calls() -> dict[str, Callable[[], Call]]:
    """Return the native calls by name."""
    made: dict[str, Callable[[], Call]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        dense = DenseWeight(floats(33, 65, dtype=torch.bfloat16, seed=1))
        made[f"linear dense {name}"] = lambda dense=dense, dtype=dtype: _linear(
            NativeFloatLinear(), dense, dtype
        )
        for tokens in (1, 5, 40):
            made[f"linear int4 {name} {tokens}"] = lambda dtype=dtype, tokens=tokens: _linear(
                NativeInt4(), integers(4, (33, 64, 32), zeros="each"), dtype, tokens=tokens
            )
        made[f"linear int8 {name}"] = lambda dtype=dtype: _linear(
            NativeInt8(), integers(8, (17, 96, 96)), dtype
        )
        made[f"linear fp4 {name}"] = lambda dtype=dtype: _linear(NativeFp4(), fp4((17, 64, 32)), dtype)
        fp8 = Fp8Weight.from_float(floats(33, 128, seed=1), block=(0, 0), activations="float")
        made[f"linear fp8 {name}"] = lambda fp8=fp8, dtype=dtype: _linear(NativeFp8Linear(), fp8, dtype)
    table = CodebookWeight(
        torch.randint(0, 16, (9, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
        torch.linspace(-1, 1, 16),
        torch.rand(9, 1, generator=torch.Generator().manual_seed(2)) + 0.5,
        "nf4",
        64,
    )
    made["linear codebook"] = lambda: _linear(NativeCodebook(), table, torch.float32)
    made["embedding int4"] = lambda: _embedding(NativeInt4Embedding(), integers(4, (9, 64, 32), zeros="each"))
    made["embedding int8"] = lambda: _embedding(NativeInt8Embedding(), integers(8, (9, 64, 64)))
    made["embedding fp4"] = lambda: _embedding(NativeFp4Embedding(), fp4((9, 64, 32)))
    for name in ("int4", "int8", "mxfp4"):
        made[f"experts {name}"] = lambda name=name: _experts(name, 3)
    made["experts int4 40"] = lambda: _experts("int4", 40)
    requests = [(3, 4), (0, 2), (40, 1)]
    for kv in KV_TYPES:
        made[f"attention {kv}"] = lambda kv=kv: _attention(kv, requests)
        if kv != "fp8":
            made[f"store {kv}"] = lambda kv=kv: _store(kv)
    made["attention decoding"] = lambda: _attention("float32", [(17, 1), (3, 1)])
    made["attention sinks"] = lambda: _attention("float32", requests, sinks=True)
    made["attention blocks"] = lambda: _attention(
        "float32", [(0, 8), (8, 4), (6, 7), (12, 8)], **blocks_of_four(prefix_causal=True, hole=True)
    )
    made["attention without pages"] = lambda: _attention("float32", [(0, 4), (0, 3)], pages=False)
    x = {"x": floats(4, 32), "weight": floats(32, seed=1), "residual": floats(4, 32, seed=2)}
    made["rms_norm"] = lambda: _elementwise("rms_norm", x)
    made["silu_and_mul"] = lambda: _elementwise("silu_and_mul", {"x": floats(4, 32)})
    angles = {"cos": floats(4, 8, seed=1), "sin": floats(4, 8, seed=2)}
    made["rotate"] = lambda: _elementwise("rotate", {"x": floats(4, 3, 32), **angles})
    pairs = (NativeGatedDelta, ReferenceGatedDelta), (NativeMamba2Scan, ReferenceMamba2Scan)
    pairs += ((NativeCausalConv, ReferenceCausalConv),)
    for case, (kernel, reference) in zip(recurrence_cases.small_cases(6), pairs, strict=True):
        made[case.operation] = lambda case=case, kernel=kernel, reference=reference: _recurrence(
            kernel, reference, case
        )
    made |= _splits()
    made["lane sums"] = _lane_sums
    made["sample"] = lambda: _sampling(True)
    made["log_probabilities"] = lambda: _sampling(False)
    return made
