"""`plan`: what would run, with which kernel, why, and the memory that it takes, from config and headers alone.

Loading executes the same `Prepared` that the plan shows, so what runs is what was planned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.arguments import checked
from pymllm.embedding.settings import read_settings
from pymllm.engine.graphs import scales_span_rows, why_not_captured
from pymllm.errors import ConfigError, PymllmError, counted
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.refusals import explain
from pymllm.kernels.registry import Selection, select
from pymllm.kernels.sampling import SamplingProblem
from pymllm.layers.elementwise import select_elementwise
from pymllm.layers.held import Binder, Description, WeightHolder, weight_holders
from pymllm.loading.options import LoadOptions
from pymllm.loading.prepare import Prepared, prepare
from pymllm.loading.scratch import scratch_bytes
from pymllm.loading.tensor_parallel import legal_tp_sizes, refused_tp_sizes
from pymllm.models import file_name, find_definition
from pymllm.models.generic.classes import GenericConfig
from pymllm.planning.plan import Plan, PlannedLayer
from pymllm.planning.room import assume_room, size_cache
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.kv_cache import KVCacheMethodBase
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import RuleSource
from pymllm.weights.loader import Slot
from pymllm.weights.memory import refuse_too_large

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked()
def plan(
    path: str | Path | None = None,
    quant: RuleSource = None,
    *,
    max_model_len: int | None = None,
    kv_memory: int | str | None = None,
    **options: Unpack[LoadOptions],
) -> Plan:
    """Say what `load_model` with the same arguments would do, from config and headers alone.

    No tensor is read, but for a head that the config ties and the files hold all the same (loading/head.py).

    path: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name"; None: the small
    model that comes with the package.
    quant: rules over the checkpoint's own config, {"**.mlp.**": "fp8"} say; also a list of "PATTERN=METHOD" lines, or
    "@FILE"; None: as stored.
    device: "auto" (a GPU where there is one), "cpu", "cuda" or, of several GPUs, "cuda:1"; to plan for another
    machine, "cuda:sm90" say.
    dtype: of what layers pass to each other, "bfloat16" say; "auto": the checkpoint's own, but float32 on a CPU for a
    quantised one.
    compute: "auto" lets kernels round their inputs to fewer bits where that is faster, "exact" forbids it, "checkpoint"
    demands just what the checkpoint asks for.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    kv_cache: how keys and values are stored: "fp8", "int8", "none", a dtype's name, or such methods for patterns of
    attention layers; None: as the checkpoint says.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    definition: "auto" runs the page of the model type (pymllm/models), and transformers' class where there is none;
    "transformers" runs its class in any case.
    strategy: how answers are decoded, "block_diffusion:block_length=32" say; None: as the model was trained for.
    max_model_len, kv_memory: the most tokens that a request may have, and what the KV cache may take, as for `LLM`.

    Raises whatever loading would raise over the same headers.
    """
    prepared = prepare(path, quant, **options)
    with prepared.checkpoint:
        return make_plan(prepared, max_model_len=max_model_len, kv_memory=kv_memory)


def check_fits(prepared: Prepared, plan: Plan) -> None:
    """Refuse, with numbers, to load what the plan says does not fit into what is free.  ConfigError "out-of-memory"."""
    refuse_too_large(plan.totals["peak_load_bytes"], prepared.execution.device, str(prepared.checkpoint.path))


def make_plan(
    prepared: Prepared, *, max_model_len: int | None = None, kv_memory: int | str | None = None
) -> Plan:
    """Make the plan of a prepared model.  max_model_len, kv_memory: see `choose_cache_size`."""
    binder = Binder(prepared.execution)
    holders = [holder for _, holder in weight_holders(prepared.model)]
    weight_bytes = transient = 0
    ahead: list[int] = []
    for unit in prepared.units:
        holder = unit.holder
        weight_bytes += holder.kept_bytes() + holder.packed_bytes(binder)
        converting = holder.converting_bytes()
        if converting is not None:
            stored = sum(placement.tensor.nbytes * _share(placement.slot) for placement in unit.placements)
            transient = max(transient, int(stored) + converting)
        ahead.append(scratch_bytes(unit))
    if prepared.execution.device == "cpu":
        # While one unit is packed, the next one is read: two memories, which grow to the two largest.
        transient += sorted(ahead)[-2] if len(ahead) > 1 else 0
    layers = [_row(described, prepared) for holder in holders for described in holder.describe(binder)]
    layers.sort(
        key=lambda layer: layer.kind in ("attention", "recurrence")
    )  # after everything that has weights
    totals = {
        "weight_bytes": weight_bytes,
        "peak_load_bytes": weight_bytes + transient,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in prepared.checkpoint.tensors.values()),
        "kv_cache_bytes_per_token": sum(holder.cache_bytes_per_token() for holder in holders),
        "state_bytes_per_request": sum(holder.state_bytes() for holder in holders),
    }
    draft = None if prepared.draft is None else make_plan(prepared.draft)
    if draft is not None:
        # The second model is loaded when the first one is.
        totals["peak_load_bytes"] = max(
            totals["peak_load_bytes"], weight_bytes + draft.totals["peak_load_bytes"]
        )
        weight_bytes += draft.totals["weight_bytes"]
        totals["weight_bytes"] = weight_bytes
        totals["kv_cache_bytes_per_token"] += draft.totals["kv_cache_bytes_per_token"]
    device = probe_device(prepared.execution.device)
    on_gpu = device.type != "cpu" and prepared.model.why_no_text is None
    eager = (prepared.model.why_not_repeated or why_not_captured(prepared.model, binder)) if on_gpu else None
    cache = {}
    if prepared.model.why_no_text is None:
        exact = on_gpu and scales_span_rows(prepared.model, binder)
        room = assume_room(prepared, weight_bytes, layers, max_model_len, eager is None, exact)
        cache = asdict(size_cache(prepared, totals, room, max_model_len, kv_memory))
    elif max_model_len is not None or kv_memory is not None:
        raise ConfigError(
            f"max_model_len and kv_memory are for a KV cache, which this model has not: {prepared.model.why_no_text}",
            code="no-kv-cache",
            fix="Leave them out.",
        )
    parallel, legal = prepared.parallel, legal_tp_sizes(prepared.model)
    elementwise = select_elementwise(prepared.execution)
    sampling = select("sampling", SamplingProblem(device), prepared.execution.forced_kernel("sampling"))
    return Plan(
        model=str(prepared.checkpoint.path),
        model_type=str(prepared.checkpoint.config.get("model_type")),
        definition=prepared.model.definition,
        device=prepared.execution.device,
        device_name=device.name,
        dtype=str(prepared.execution.dtype).removeprefix("torch."),
        compute=prepared.execution.compute,
        tensor_parallel={
            "rank": parallel.rank,
            "size": parallel.size,
            "expert_parallel": parallel.expert_parallel,
            "legal_sizes": legal,
            "refused_sizes": {str(size): why for size, why in refused_tp_sizes(prepared.model).items()},
            "weight_bytes_by_size": {
                str(size): sum(unit.holder.bytes_at(size, binder) for unit in prepared.units)
                for size in legal
            },
        },
        elementwise={
            "kernel": elementwise.kernel.name,
            "refused": explain(elementwise),
        },
        layers=layers,
        totals=totals,
        notes=_notes(prepared, holders, layers, eager),
        rules=_rules(prepared),
        routing=_plan_routing(holders, binder),
        decoding_graph={"captured": eager is None, "why_not": eager} if on_gpu else None,
        sampling={"kernel": sampling.kernel.name, "refused": explain(sampling)},
        kv_cache=cache,
        strategy={
            "name": prepared.model.strategy.name,
            "settings": dict(prepared.model.strategy.settings),
            "sources": dict(prepared.model.strategy.sources),
            **({} if draft is None else {"draft": _describe_draft(draft)}),
        },
    )


def _describe_draft(plan: Plan) -> dict[str, Any]:
    """Say what the second model of draft_model is, takes, and runs."""
    return {
        "model": plan.model,
        "model_type": plan.model_type,
        "dtype": plan.dtype,
        "weight_bytes": plan.totals["weight_bytes"],
        "kv_cache_bytes_per_token": plan.totals["kv_cache_bytes_per_token"],
        "layers": [
            {
                "kind": first.kind,
                "method": first.method_detail,
                "kernel": first.kernel,
                "count": len(names),
            }
            for first, names in plan.groups()
        ],
        "notes": plan.notes,
    }


def _row(described: Description, prepared: Prepared) -> PlannedLayer:
    """Make a layer's row of the plan: what it says of itself, and what decided so."""
    quant, name = prepared.quant, described.name
    decision = quant.decisions.get(name) or quant.kv_decisions.get(name)
    rule = None if decision is None else decision.rule
    return PlannedLayer(
        prefix=name,
        kind=described.kind,
        rule=None if rule is None else str(rule),
        source="default" if decision is None else decision.source,
        method=described.method.name,
        method_detail=described.method_detail,
        source_method=_stored_method(described.method).name,
        kernel=described.selection.kernel.name,
        numerics=described.numerics,
        rounds_activations=described.rounds_activations,
        refused=explain(described.selection),
        shape=list(described.shape),
        shape_local=list(described.shape_local),
        bytes=described.nbytes,
        fused_with=list(described.fused_with),
        tied_to=described.tied_to,
        kv_bytes_per_token=described.kv_bytes_per_token,
        state_bytes=described.state_bytes,
    )


def _stored_method(method: LinearMethodBase | KVCacheMethodBase) -> LinearMethodBase | KVCacheMethodBase:
    """Return the method that reads the checkpoint, however often a running weight was converted since."""
    while isinstance(method, ConvertedLinearMethod):
        method = method.source
    return method


def _plan_routing(holders: Iterable[WeightHolder], binder: Binder) -> list[dict[str, Any]]:
    """List the kernels that choose experts, each with the routers that have it for the same reasons."""
    chosen: dict[Selection[Any], list[str]] = {}
    for holder in holders:
        for selection in holder.selections(binder):
            if selection.operation == "routing":
                chosen.setdefault(selection, []).append(holder.prefix)
    return [
        {
            "prefixes": prefixes,
            "kernel": selection.kernel.name,
            "refused": explain(selection),
        }
        for selection, prefixes in chosen.items()
    ]


def _embedding_notes(prepared: Prepared) -> list[str]:
    """Say how vectors are made of the model's hidden states, or what stands in the way."""
    try:
        settings = read_settings(prepared.checkpoint.path, prepared.model.max_length)
    except PymllmError as error:
        return [f"no embeddings: {error}"]
    if settings.modules:
        return [f"embeddings: {settings}; texts are cut at {counted(settings.max_length, 'token')}"]
    if prepared.model.why_no_text is None:
        return []
    return ["the checkpoint does not say how to make vectors: embed(texts, pooling=...) has to choose"]


def _rules(prepared: Prepared) -> list[dict[str, Any]]:
    """Count for each of the user's rules how many layers it names, and how many it decides as the first that does."""
    found = []
    for rules, decisions in (
        (prepared.quant.rules, prepared.quant.decisions),
        (prepared.quant.kv_rules, prepared.quant.kv_decisions),
    ):
        for rule in rules:
            matched = [name for name in decisions if rule.matches(*prepared.quant.spellings(name))]
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


def _share(slot: Slot) -> float:
    """Return the part of a tensor that this rank reads."""
    return slot.elements / max(math.prod(slot.source_shape), 1)


def _notes(
    prepared: Prepared, holders: list[WeightHolder], layers: list[PlannedLayer], eager: str | None
) -> list[str]:
    """Say what a user should know besides: fused layers that rules split, slow kernels, skipped tensors.

    eager: why a GPU's decoding steps are not captured, if they are not.
    """
    notes = []
    named, run = prepared.config.raw.get("model_type"), find_definition(prepared.config.raw)
    if prepared.config.wrapper is not None:
        notes.append(f"of {prepared.config.wrapper.architecture} its text model alone runs, {named}")
    if run is None:
        notes.append(f"there is no page for the model type {named!r}; it runs {prepared.model.definition}")
    elif isinstance(prepared.config, GenericConfig):
        notes.append(f"as asked, {prepared.model.definition} runs in place of the page {run!r}")
    elif file_name(str(named)) != run:
        notes.append(
            f"there is no definition for the model type {named!r}; its architecture is that of {run}"
        )
    notes += [*prepared.model.notes, *prepared.model.strategy.notes]
    if eager is not None:
        notes.append(f"decoding runs without a captured CUDA graph, an operation at a time: {eager}")
    experts = any(weight.operation == "experts" for holder in holders for weight in holder.held())
    if prepared.parallel.expert_parallel and not experts:
        notes.append("expert_parallel divides nothing: the model has no experts")
    stateful = [holder for holder in holders if holder.state_bytes()]
    if stateful:
        limit = (
            "a prefix is reused only up to where a state of it is remembered: near the end of a prompt or an answer"
            if all(holder.copies_states for holder in stateful)
            else "prefixes are not reused, as what the layers keep cannot be copied"
        )
        notes.append(
            f"{counted(len(stateful), 'layer keeps', 'layers keep')} a state of each request: {limit}"
        )
    split = [holder.prefix for holder in holders if holder.split]
    if split:
        notes.append(
            counted(len(split), "fused layer keeps", "fused layers keep")
            + f" separate weights, as their parts have different methods: {split[0]}"
        )
    caches = [layer for layer in layers if layer.kind == "attention"]
    unscaled = [layer for layer in caches if layer.method_detail.endswith("scale 1")]
    if unscaled:
        notes.append(
            counted(len(unscaled), "attention layer stores", "attention layers store")
            + f" keys and values in {unscaled[0].method} with scale 1, "
            "as the checkpoint has no scales for them: large values are clamped"
        )
    left = sum(layer.source == "compute=exact" for layer in caches)
    if left:
        notes.append(
            counted(left, "attention layer keeps", "attention layers keep")
            + " keys and values in floats: compute=exact forbids the checkpoint's own "
            "KV cache rounding; kv_cache=fp8 or int8 asks for it all the same"
        )
    references = Counter(layer.method_detail for layer in layers if layer.kernel == "reference")
    for method, count in references.items():
        layers_run = f"layer ({method}) runs", f"layers ({method}) run"
        notes.append(f"{counted(count, *layers_run)} the reference kernel, which is right but slow")
    notes += _embedding_notes(prepared)
    for rule, weights in prepared.quant.swept().items():
        for why, count in Counter(weights.values()).items():
            first = next(name for name, reason in weights.items() if reason == why)
            stay = f"weight that {rule} names stays as it is", f"weights that {rule} names stay as they are"
            notes.append(f"{counted(count, *stay)}: {first}: {why}")
    notes += prepared.quant.checkpoint_config.notes
    for reason, count in Counter(record.reason for record in prepared.records).items():
        unneeded = counted(count, "checkpoint tensor is", "checkpoint tensors are")
        notes.append(f"{unneeded} not needed: {reason}")
    return notes
