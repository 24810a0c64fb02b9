"""The content of a plan: every layer with its method and kernel, and the memory that it takes.

`Plan.to_dict()` is what `pymllm plan DIR --json` prints, a stable schema: docs/plan-schema.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pymllm.errors import counted, escaped
from pymllm.gpus import named_gpu
from pymllm.models.strategy import Strategy

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlannedLayer:
    """One layer under its checkpoint name (the parts of a fused layer stand alone).

    kind: linear, experts, router, embedding, lm_head, attention or recurrence.
    rule: the user's rule that decided, or None.  source: what decided.
    method: what runs; method_detail: with its settings; source_method: what the checkpoint holds.
    kernel: the one that runs it.  numerics: how its results differ from exact arithmetic.
    rounds_activations: whether it rounds them to fewer bits than their dtype has.
    refused: kernels asked before the chosen one, and what their refusals come down to (`kernels/refusals.py`).
    shape: [outputs, inputs] of the whole layer; shape_local: this rank's share.  bytes: packed, on this rank.
    fused_with: the other parts of the same matmul.  tied_to: the layer whose table this one shares.
    kv_bytes_per_token: of an attention layer's keys and values, on this rank.
    state_bytes: of what a recurrence keeps of a request, on this rank.
    """

    prefix: str
    kind: str
    rule: str | None
    source: str
    method: str
    method_detail: str
    source_method: str
    kernel: str
    numerics: str
    rounds_activations: bool
    refused: list[dict[str, str]]
    shape: list[int]
    shape_local: list[int]
    bytes: int
    fused_with: list[str] = field(default_factory=list)
    tied_to: str | None = None
    kv_bytes_per_token: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """The plan of one rank; `to_dict` is the JSON, `str` a summary for people.

    model, model_type: the checkpoint, and its config's.  definition: what runs the type: a page of ours, as
    "pymllm.models.llama", or a class of transformers'.  device, dtype, compute: what it would run with.  device_name:
    what the maker calls the device.
    tensor_parallel: this rank, and the sizes that the model can and cannot be divided over.
    elementwise, routing, sampling: the kernels of what has no weights, of routers, and of the choice of tokens.
    layers: attention layers last.
    totals: bytes of this rank.  notes: what a user should know besides.  rules: what each of the user's rules decides.
    decoding_graph: whether a GPU's decoding step is captured, and why not; None on a CPU.
    strategy: how answers are decoded: its name, its settings, and where each came from.
    kv_cache: this rank's pages, and the longest request: the fields of `engine.kv_memory.CacheSize`; {} where no
    text is generated.
    """

    model: str
    model_type: str
    definition: str
    device: str
    device_name: str
    dtype: str
    compute: str
    tensor_parallel: dict[str, Any]
    elementwise: dict[str, Any]
    layers: list[PlannedLayer]
    totals: dict[str, int]
    notes: list[str]
    rules: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    decoding_graph: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    kv_cache: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The device, and for a GPU that is here what its maker calls it."""
        return self.device if named_gpu(self.device) is None else f"{self.device} ({self.device_name})"

    @property
    def weighted_layers(self) -> list[PlannedLayer]:
        """The layers that have weights: all but attention and recurrences."""
        return [layer for layer in self.layers if layer.kind not in ("attention", "recurrence")]

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @property
    def what_runs(self) -> str:
        """The model type, and whose class runs it where that is none of ours."""
        ours = self.definition.startswith("pymllm.")
        return self.model_type if ours else f"{self.model_type}, {self.definition}"

    def layer(self, prefix: str) -> PlannedLayer:
        """Return the layer of this checkpoint name.  KeyError without one."""
        for layer in self.layers:
            if layer.prefix == prefix:
                return layer
        raise KeyError(prefix)

    def describe_numbers(self) -> str:
        """Say in what dtype layers pass values to each other, and how many of them round these inside, in a line."""
        weighted = self.weighted_layers
        rounding = sum(layer.rounds_activations for layer in weighted)
        if not rounding:
            inside = "no layer rounds its inputs to fewer bits"
        else:
            why = (
                "as the checkpoint asks (compute=checkpoint)"
                if self.compute == "checkpoint"
                else "where that is faster (compute=exact forbids it)"
            )
            does = "rounds its" if len(weighted) == 1 else "round their"
            inside = f"{rounding} of {counted(len(weighted), 'layer')} {does} inputs to fewer bits {why}"
        return f"between layers {self.dtype}; inside, {inside}"

    def describe_cache(self) -> str:
        """Say how large the KV cache is and what decided so, in a line."""
        cache = self.kv_cache
        if not cache:
            return "no KV cache, as this model generates no text"
        states = ""
        if cache.get("state_bytes"):
            states = (
                f"; states of {counted(cache['requests'], 'request')} and "
                f"{counted(cache['remembered_states'], 'prefix', 'prefixes')}, "
                f"{cache['state_bytes'] / 1e6:.1f} MB"
            )
        return (
            f"KV cache of {counted(cache['tokens'], 'token')}, {cache['bytes'] / 1e6:.1f} MB ({cache['decided_by']}); "
            f"a request has at most {counted(cache['max_model_len'], 'token')}{states}"
        )

    def describe_strategy(self) -> str:
        """Say how answers are decoded, and where each setting came from, in a line."""
        return str(Strategy(**{key: self.strategy[key] for key in ("name", "settings", "sources")}))

    def describe_rates(self) -> str:
        """Say what a token takes in the KV cache, and a request beside it."""
        state = self.totals.get("state_bytes_per_request", 0)
        return f"KV cache {counted(self.totals['kv_cache_bytes_per_token'], 'byte')} a token" + (
            f", state: {counted(state, 'byte')} a request" if state else ""
        )

    def groups(self) -> list[tuple[PlannedLayer, list[str]]]:
        """Group the layers that differ in nothing but name and shape: (the first one, all their names)."""
        grouped: dict[tuple[str | None, ...], list[PlannedLayer]] = {}
        for layer in self.layers:
            key = (layer.kind, layer.method_detail, layer.kernel, layer.source, layer.rule)
            grouped.setdefault(key, []).append(layer)
        return [(group[0], [layer.prefix for layer in group]) for group in grouped.values()]

    def __str__(self) -> str:
        ranks = self.tensor_parallel
        lines = [
            f"{self.model} ({self.what_runs}) on {self.where}, rank {ranks['rank']} of {ranks['size']} "
            f"(sizes that work: {', '.join(map(str, ranks['legal_sizes']))})",
            f"  {self.describe_numbers()}",
        ]
        for first, names in self.groups():
            group = [layer for layer in self.layers if layer.prefix in set(names)]
            if first.kind == "attention":
                size = f"{counted(sum(layer.kv_bytes_per_token for layer in group), 'byte')} a token"
            elif first.kind == "recurrence":
                size = f"{counted(sum(layer.state_bytes for layer in group), 'byte')} a request"
            else:
                size = f"{sum(layer.bytes for layer in group) / 1e6:.1f} MB"
            why = f"rule {first.rule}" if first.rule else first.source
            lines.append(
                f"  {len(names):4d} x {first.kind:<9} {first.method_detail} -> {first.kernel} "
                f"({first.numerics}); {size}; {why}"
            )
        lines.append(
            f"  weights {self.totals['weight_bytes'] / 1e6:.1f} MB, at most "
            f"{self.totals['peak_load_bytes'] / 1e6:.1f} MB while loading, {self.describe_rates()}"
        )
        if self.kv_cache:
            lines.append(f"  {self.describe_cache()}")
        if self.strategy.get("name", "autoregressive") != "autoregressive":
            lines.append(f"  decoding by {self.describe_strategy()}")
        if "draft" in self.strategy:
            draft = self.strategy["draft"]
            lines.append(
                f"  drafts by {draft['model']} ({draft['model_type']}, {draft['dtype']}): of the totals, weights "
                f"{draft['weight_bytes'] / 1e6:.1f} MB, KV cache "
                f"{counted(draft['kv_cache_bytes_per_token'], 'byte')} a token"
            )
            lines += [
                f"    {group['count']:4d} x {group['kind']:<9} {group['method']} -> {group['kernel']}"
                for group in draft["layers"]
            ]
        return escaped("\n".join(lines + [f"  note: {note}" for note in self.notes]), "\n")
