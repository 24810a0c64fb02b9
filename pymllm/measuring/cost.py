"""The least that a model must read and compute for so many tokens, and the time that this takes on a machine.

The counts are lower bounds: what kernels read or compute again beside them is theirs to save.
"""

# H heads, D elements of a head

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymllm.moe import get_num_experts, get_num_experts_per_tok
from pymllm.planning.plan import Plan, PlannedLayer

# Kernels whose products are integers where they round activations, and float32 else; torch's are of the model's dtype.
NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The costs of a model's steps, as its plan says them.

    weights: bytes that every step reads, whoever asks.  experts: bytes of all experts.  share: the part of them that a
    token is routed to.  caches: of each attention layer the bytes of a token's keys and values, its window (None:
    it sees all tokens), and H x D.  states: bytes that a request's recurrences keep, which a step reads and writes.
    operations: of a token's products by the arithmetic that runs them, "float32" or "int8", a multiply-add being two;
    those of the head apart, as prompts need it once.  unknown: why they are not known; None: they are.
    """

    weights: float
    experts: float
    share: float
    caches: list[tuple[int, int | None, int]]
    states: int
    operations: dict[str, float] = field(default_factory=dict)
    head: dict[str, float] = field(default_factory=dict)
    unknown: str | None = None

    def read_bytes(self, requests: int, tokens: int, context: float) -> float:
        """Count the bytes that a step reads.

        tokens: of all requests.  context: the mean number of tokens that each request has in the cache.
        Experts are counted as if tokens were routed to all of them alike.
        """
        routed = self.experts * (1 - (1 - self.share) ** tokens)
        kept = sum(each * min(context, window or context) for each, window, _ in self.caches)
        return self.weights + routed + requests * (kept + 2 * self.states)

    def count_operations(self, tokens: int, first: int, heads: int) -> dict[str, float] | None:
        """Count the operations of a request's next tokens; None: nobody knows them.

        first: how many tokens come before them.  heads: after how many of them logits are wanted.
        """
        if self.unknown is not None:
            return None
        counted = {
            name: tokens * self.operations.get(name, 0.0) + heads * self.head.get(name, 0.0)
            for name in ("float32", "int8")
        }
        for _, window, width in self.caches:
            counted["float32"] += 4.0 * width * _seen(tokens, first, window)
        return counted


def _seen(tokens: int, first: int, window: int | None) -> float:
    """Count the tokens that each of `tokens` queries sees, from position `first` on, all together."""
    growing = tokens if window is None else max(0, min(tokens, window - first))
    full = (tokens - growing) * (window or 0)
    return growing * first + growing * (growing + 1) / 2 + full


def cost_of(plan: Plan, config: Any, windows: Mapping[str, int | None]) -> Cost:
    """Take what a plan says together.  windows: of attention layers, by prefix."""
    tables = {layer.tied_to for layer in plan.layers if layer.tied_to is not None}
    idle = [layer for layer in plan.layers if layer.kind == "embedding" and layer.prefix not in tables]
    experts = [layer for layer in plan.layers if layer.kind == "experts"]
    number = get_num_experts(config) if experts else 0
    share = get_num_experts_per_tok(config) / number if number else 1.0
    # An embedding that is no head's table too gives a row a token.
    rows = sum(layer.bytes / max(layer.shape_local[0], 1) for layer in idle)
    elsewhere = sum(layer.bytes for layer in (*idle, *experts))
    operations: dict[str, float] = {"float32": 0.0, "int8": 0.0}
    head = dict(operations)
    unknown: str | None = None
    for layer in plan.layers:
        if layer.kind in ("embedding", "attention"):
            continue
        arithmetic = _arithmetic(layer, plan.dtype)
        if plan.device != "cpu" or arithmetic is None or len(layer.shape_local) != 2:
            unknown = f"{layer.prefix} runs on {layer.kernel}"
            break
        count = 2.0 * layer.shape_local[0] * layer.shape_local[1]
        into = head if layer.kind == "lm_head" else operations
        into[arithmetic] += count * (share if layer.kind == "experts" else 1.0)
    attention = [layer for layer in plan.layers if layer.kind == "attention"]
    return Cost(
        weights=plan.totals["weight_bytes"] - elsewhere + rows,
        experts=sum(layer.bytes for layer in experts),
        share=share,
        caches=[
            (
                layer.kv_bytes_per_token,
                windows.get(layer.prefix),
                layer.shape_local[0] * layer.shape_local[-1],
            )
            for layer in attention
        ],
        states=sum(layer.state_bytes for layer in plan.layers),
        operations=operations,
        head=head,
        unknown=unknown,
    )


def _arithmetic(layer: PlannedLayer, dtype: str) -> str | None:
    """Return the arithmetic of a layer's products; None: nobody knows.

    Kernels that round activations of long steps count as integers in short ones, too, where they may take floats.
    """
    if layer.kind == "recurrence":
        return None
    if layer.kernel.startswith(NATIVE) or f" by {NATIVE}" in layer.numerics:
        return "int8" if layer.rounds_activations else "float32"
    return "float32" if dtype == "float32" and not layer.rounds_activations else None


@dataclass(frozen=True)
class Bound:
    """The shortest time of a piece of work, in seconds, and what it is bound by: "memory" or "arithmetic"."""

    seconds: float
    by: str


def bound_of(
    read_bytes: float, operations: dict[str, float] | None, read_rate: float, rates: dict[str, float] | None
) -> Bound | None:
    """Compute how long a piece of work takes at least.

    rates: operations a second; None, or an arithmetic of 0: not known, so that memory alone counts.
    """
    reading = read_bytes / read_rate
    if operations is None or rates is None:
        return Bound(reading, "memory")
    if any(count and not rates.get(name) for name, count in operations.items()):
        return Bound(reading, "memory")
    computing = sum(count / rates[name] for name, count in operations.items() if count)
    return Bound(computing, "arithmetic") if computing > reading else Bound(reading, "memory")
