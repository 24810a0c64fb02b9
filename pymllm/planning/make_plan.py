"""The plan: what would run, with which kernel, why, and what it takes; from config and headers alone.

Loading executes the same `Prepared` that the plan shows, so what runs is what was planned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pymllm.attention import Attention, bytes_per_token
from pymllm.engine.graphs import why_not_captured
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import TOLERANCES
from pymllm.kernels.refusals import explain
from pymllm.layers.elementwise import select_elementwise
from pymllm.layers.embedding import ParallelLMHead
from pymllm.layers.linear import WeightedLayer, layer_parts
from pymllm.loading.prepare import Prepared, prepare
from pymllm.loading.tensor_parallel import legal_tp_sizes, refused_tp_sizes
from pymllm.moe.experts import Experts
from pymllm.moe.layer import FusedMoE
from pymllm.planning.plan import Plan, PlannedLayer
from pymllm.quantization.binding import BoundWeight, bind
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.experts import BoundExperts, bind_experts
from pymllm.quantization.kv_cache import QuantizedKVCacheMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import RuleSource
from pymllm.weights.spec import LinearShape


def plan(
    path: str | Path,
    quant: RuleSource = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    compute: str = "auto",
    kernels: Mapping[str, str] | None = None,
    kv_cache: RuleSource = None,
    revision: str | None = None,
) -> Plan:
    """What `load_model` with the same arguments would do, from config and headers alone; no tensor is read.

    Raises whatever loading would raise over the same headers.
    """
    prepared = prepare(
        path,
        quant,
        device=device,
        dtype=dtype,
        compute=compute,
        kernels=kernels,
        kv_cache=kv_cache,
        revision=revision,
    )
    with prepared.checkpoint:
        return make_plan(prepared)


def make_plan(prepared: Prepared) -> Plan:
    """The plan of a prepared model."""
    binder = _Binder(prepared)
    layers: list[PlannedLayer] = []
    weight_bytes = transient = 0
    for unit in prepared.units:
        module = unit.module
        stored = sum(placement.tensor.nbytes * _share(placement.slot) for placement in unit.placements)
        if isinstance(module, WeightedLayer):
            rows, packed = _plan_weighted(module, binder, prepared)
            layers += rows
            elements = module.shape.in_features_local * module.shape.out_features_local
            converts = any(isinstance(method, ConvertedLinearMethod) for method, _, _ in layer_parts(module))
            # The stored tensors, the canonical codes, and the floats between two formats (twice: one being rounded).
            transient = max(transient, int(stored) + elements * (9 if converts else 1))
        elif isinstance(module, Experts):
            rows, packed = _plan_experts(module, binder, prepared)
            layers += rows
            transient = max(transient, int(stored) + _one_expert(module))
        else:
            packed = sum(p.nbytes for p in module._parameters.values() if p is not None)
        weight_bytes += packed
    modules = dict(prepared.model.named_modules())
    layers += [_plan_attention(m, prepared) for m in modules.values() if isinstance(m, Attention)]
    totals = {
        "weight_bytes": weight_bytes,
        "peak_load_bytes": weight_bytes + transient,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in prepared.checkpoint.tensors.values()),
        "kv_cache_bytes_per_token": bytes_per_token(prepared.model),
    }
    parallel, legal = prepared.parallel, legal_tp_sizes(prepared.model)
    elementwise = select_elementwise(prepared.execution)
    on_gpu = probe_device(prepared.execution.device).type != "cpu"
    eager = why_not_captured(prepared.model, binder.experts_kernel) if on_gpu else None
    return Plan(
        model=str(prepared.checkpoint.path),
        model_type=str(prepared.config.raw.get("model_type")),
        device=prepared.execution.device,
        dtype=str(prepared.execution.dtype).removeprefix("torch."),
        compute=prepared.execution.compute,
        tensor_parallel={
            "rank": parallel.rank,
            "size": parallel.size,
            "expert_parallel": parallel.expert_parallel,
            "legal_sizes": legal,
            "refused_sizes": {str(size): why for size, why in refused_tp_sizes(prepared.model).items()},
            "weight_bytes_by_size": {str(size): _weight_bytes(prepared, binder, size) for size in legal},
        },
        elementwise={
            "kernel": elementwise.kernel.name,
            "refused": explain(elementwise),
        },
        layers=layers,
        totals=totals,
        notes=_notes(prepared, layers, eager),
        rules=_rules(prepared),
        routing=_plan_routing(modules.values()),
        decoding_graph={"captured": eager is None, "why_not": eager} if on_gpu else None,
    )


def _plan_routing(modules: Iterable[Any]) -> list[dict[str, Any]]:
    """The kernel of every router, those that have the same choice together."""
    chosen: dict[Any, list[str]] = {}
    for module in modules:
        if isinstance(module, FusedMoE) and module.router.selection is not None:
            chosen.setdefault(module.router.selection, []).append(module.gate.prefix)
    return [
        {
            "prefixes": prefixes,
            "kernel": selection.kernel.name,
            "refused": explain(selection),
        }
        for selection, prefixes in chosen.items()
    ]


def _rules(prepared: Prepared) -> list[dict[str, Any]]:
    """For each of the user's rules: how many layers it names, and how many it decides as the first that does."""
    found = []
    for rules, decisions in (
        (prepared.quant.rules, prepared.quant.decisions),
        (prepared.quant.kv_rules, prepared.quant.kv_decisions),
    ):
        for rule in rules:
            matched = [name for name in decisions if rule.matches(name)]
            decided = [name for name in matched if decisions[name].rule is rule]
            taken = [name for name in matched if decisions[name].rule is not rule]
            found.append(
                {
                    "rule": str(rule),
                    "matches": len(matched),
                    "decides": len(decided),
                    "shadowed_by": list(dict.fromkeys(str(decisions[name].rule) for name in taken)),
                }
            )
    return found


def _weight_bytes(prepared: Prepared, binder: _Binder, size: int) -> int:
    """The packed weights of the first rank of `size`: layers by their shares; experts as evenly as they divide."""
    total = 0
    counted: dict[Any, int] = {}
    for unit in prepared.units:
        module = unit.module
        if isinstance(module, WeightedLayer):
            if isinstance(module, ParallelLMHead) and module.shares_table:
                continue
            parts = layer_parts(module)
            shape = module.shape_for(0, size, module.shape.parts)
            for index, (method, _, _) in enumerate(parts):
                share = shape if len(parts) == 1 else shape.part(index)
                key = (method, module.operation, share.inputs, share.outputs)
                if key not in counted:
                    counted[key] = binder(method, share, module.operation).nbytes
                total += counted[key]
        elif isinstance(module, Experts):
            total += 0 if module.empty else binder.experts(module).nbytes * prepared.parallel.size // size
        else:
            total += sum(p.nbytes for p in module._parameters.values() if p is not None)
    return total


class _Binder:
    """Binds meta weights, once for each distinct (method, shape): a deep model repeats a few."""

    def __init__(self, prepared: Prepared) -> None:
        self.execution = prepared.execution
        self.known: dict[Any, Any] = {}

    def __call__(self, method: LinearMethodBase, shape: LinearShape, operation: Any) -> BoundWeight:
        key = (method, operation, shape.inputs, shape.outputs)
        if key not in self.known:
            self.known[key] = bind(method.planned(shape), self.execution, operation)
        return self.known[key]

    def experts(self, module: Experts) -> BoundExperts:
        shapes = tuple((s.inputs, s.outputs) for _, s in module.local_shares())
        key = (module.quant_method, len(module.ids), module.activation, module.layout.stacked, shapes)
        if key not in self.known:
            execution = module.execution_or_default()
            self.known[key] = bind_experts(module.quant_method.planned(module), module.activation, execution)
        return self.known[key]

    def experts_kernel(self, module: Experts) -> Any:
        """The kernel for a layer's experts; None where this rank has none of them."""
        return None if module.empty else self.experts(module).selection.kernel


def _plan_weighted(
    module: WeightedLayer, binder: _Binder, prepared: Prepared
) -> tuple[list[PlannedLayer], int]:
    """The rows of one layer, and its packed bytes on this rank (its bias included)."""
    rows: list[PlannedLayer] = []
    kept = [module._parameters.get(name) for name in module.kept]
    total = sum(param.nbytes for param in kept if param is not None)
    head = module if isinstance(module, ParallelLMHead) else None
    table = head.tied_to if head is not None and head.shares_table else None
    for method, shape, _ in layer_parts(module):
        bound = binder(method, shape, module.operation)
        shared = table is not None and (
            binder(method, table.shape, table.operation).selection.kernel.layout
            == bound.selection.kernel.layout
        )
        total += 0 if shared else bound.nbytes
        for index, part in enumerate(shape.parts):
            name = module.prefix if head is not None else part
            alone = shape.part(index)
            part_bytes = bound.nbytes * alone.out_features_local // max(shape.out_features_local, 1)
            decision = prepared.quant.decisions[name]
            rows.append(
                PlannedLayer(
                    prefix=name,
                    kind=module.kind,
                    rule=None if decision.rule is None else str(decision.rule),
                    source=decision.source,
                    method=decision.method.name,
                    method_detail=decision.method.describe(),
                    source_method=_stored_method(decision.method).name,
                    kernel=bound.selection.kernel.name,
                    numerics=bound.selection.kernel.numerics(bound.problem),
                    rounds_activations=rounds_activations(bound),
                    refused=explain(bound.selection),
                    shape=[alone.out_features, alone.in_features],
                    shape_local=[alone.out_features_local, alone.in_features_local],
                    bytes=0 if shared else part_bytes,
                    fused_with=[other for other in shape.parts if other != part],
                    tied_to=None if table is None else table.prefix,
                )
            )
    return rows, total


def _plan_experts(module: Experts, binder: _Binder, prepared: Prepared) -> tuple[list[PlannedLayer], int]:
    """The rows of a layer's experts, and their packed bytes on this rank (biases included)."""
    biases = sum(p.nbytes for p in module._parameters.values() if p is not None)
    if module.empty:
        return [], biases
    bound = binder.experts(module)
    kernel, problem = bound.selection.kernel, bound.problem
    rows = []
    elements = sum(linear.in_features * linear.out_features for linear in problem.products().values())
    elements *= problem.num_experts
    described = (kernel.name, kernel.numerics(problem), rounds_activations(bound))
    refused = explain(bound.selection)
    held = len(module.ids) if module.layout.stacked else 1
    for name, method, shape in module.parts_held():
        decision = prepared.quant.decisions[name]
        local = [shape.out_features_local, shape.in_features_local]
        rows.append(
            PlannedLayer(
                prefix=name,
                kind="experts",
                rule=None if decision.rule is None else str(decision.rule),
                source=decision.source,
                method=decision.method.name,
                method_detail=method.describe(),
                source_method=_stored_method(decision.method).name,
                kernel=described[0],
                numerics=described[1],
                rounds_activations=described[2],
                refused=refused,
                shape=[shape.out_features, shape.in_features],
                shape_local=local,
                bytes=bound.nbytes * math.prod(local) * held // max(elements, 1),
            )
        )
    return rows, biases + bound.nbytes


def _one_expert(module: Experts) -> int:
    """Bytes that converting one expert takes at most: codes, or floats between two formats."""
    sizes = [
        (method, shape.in_features_local * shape.out_features_local)
        for method, shape in module.local_shares()
    ]
    return max(size * (9 if isinstance(m, ConvertedLinearMethod) else 4) for m, size in sizes)


def rounds_activations(bound: BoundWeight | BoundExperts) -> bool:
    """Whether the kernel owns up to an error beyond what the activations' dtype explains."""
    tolerance = getattr(bound.selection.kernel, "tolerance", None)
    explained = TOLERANCES[bound.problem.dtype] * (
        2 if isinstance(bound, BoundExperts) else 1
    )  # two products
    return tolerance is not None and tolerance(bound.problem) > explained


def _stored_method(method: LinearMethodBase) -> LinearMethodBase:
    """The method that reads the checkpoint, however often a running weight was converted since (`pymllm.swap`)."""
    while isinstance(method, ConvertedLinearMethod):
        method = method.source
    return method


def _plan_attention(module: Attention, prepared: Prepared) -> PlannedLayer:
    problem, method, kernel = module.problem, module.quant_method, module.selection.kernel
    decision = prepared.quant.kv_decisions.get(module.prefix)
    quantised = isinstance(method, QuantizedKVCacheMethod)
    detail = method.describe() if quantised else str(problem.kv)
    numerics = getattr(kernel, "numerics", None)
    rounding = f"keys and values rounded to {method.name}, " if quantised else ""
    return PlannedLayer(
        prefix=module.prefix,
        kind="attention",
        rule=None if decision is None or decision.rule is None else str(decision.rule),
        source="default" if decision is None else decision.source,
        method=method.name,
        method_detail=f"KV cache in {detail}",
        source_method=method.name,
        kernel=kernel.name,
        numerics=rounding + ("float32 accumulation" if numerics is None else numerics(problem)),
        rounds_activations=False,
        refused=explain(module.selection),
        shape=[
            prepared.config.size("num_attention_heads"),
            module.shape.out_features,
            module.head_dim,
        ],
        shape_local=[module.num_heads, module.num_kv_heads, module.head_dim],
        bytes=0,
        kv_bytes_per_token=bytes_per_token(module),
    )


def _share(slot: Any) -> float:
    """The part of a tensor that this rank reads."""
    return slot.elements / max(math.prod(slot.source_shape), 1)


def _notes(prepared: Prepared, layers: list[PlannedLayer], eager: str | None) -> list[str]:
    """What a user should know besides: fused layers that rules split, slow kernels, skipped tensors.

    eager: why a GPU's decoding steps are not captured, if they are not.
    """
    notes = []
    if eager is not None:
        notes.append(f"decoding runs without a captured CUDA graph, an operation at a time: {eager}")
    if prepared.parallel.expert_parallel and not any(
        isinstance(m, Experts) for m in prepared.model.modules()
    ):
        notes.append("expert_parallel divides nothing: the model has no experts")
    split = [
        module.prefix
        for module in prepared.model.modules()
        if isinstance(module, WeightedLayer) and len(layer_parts(module)) > 1
    ]
    if split:
        notes.append(
            f"{len(split)} fused layers keep separate weights, as their parts have different methods: {split[0]}"
        )
    rounded = Counter((layer.kernel, layer.numerics) for layer in layers if layer.rounds_activations)
    for (kernel, numerics), count in rounded.items():
        notes.append(
            f"{count} layers run {kernel}: {numerics}. compute=exact or dtype=float32 forbids the rounding"
        )
    caches = [layer for layer in layers if layer.kind == "attention"]
    unscaled = [layer for layer in caches if layer.method_detail.endswith("scale 1")]
    if unscaled:
        notes.append(
            f"{len(unscaled)} attention layers store keys and values in {unscaled[0].method} with scale 1, "
            "as the checkpoint has no scales for them: large values are clamped"
        )
    left = sum(layer.source == "compute=exact" for layer in caches)
    if left:
        notes.append(
            f"{left} attention layers keep keys and values in floats: compute=exact forbids the checkpoint's own "
            "KV cache rounding; kv_cache=fp8 or int8 asks for it all the same"
        )
    references = Counter(layer.method_detail for layer in layers if layer.kernel == "reference")
    for method, count in references.items():
        notes.append(f"{count} layers ({method}) run the reference kernel, which is right but slow")
    for reason, count in Counter(record.reason for record in prepared.records).items():
        notes.append(f"{count} checkpoint tensors are not needed: {reason}")
    return notes
