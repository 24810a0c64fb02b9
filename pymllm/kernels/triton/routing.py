"""Routing on the GPU in one launch: scores, groups, the best experts and their weights, a token a block.

Experts are compared by integers. The upper half holds the score's bits, in an order that compares like the scores; the
lower half holds the expert's number. So each of the best experts is found with one reduction, equal scores go to the
lower expert, and no id is outside the experts even if scores are infinite or not a number.
"""

# T tokens, E experts, K experts a token, N groups of experts, S experts of a group

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device
from pymllm.kernels.routing import Routing, RoutingProblem
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.launch import inline, kernel
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import next_power

if TYPE_CHECKING:
    import triton.language as tl

# Of a block: the number of groups times the experts of one, both rounded up to powers of two.
MOST_LANES = 2048


class TritonRouting:
    """Routing with one token in each block; groups are rows of a tile."""

    name = "triton_routing"
    device_type = "cuda"  # the only one it runs on

    def why_not(self, problem: RoutingProblem) -> str | None:
        if problem.dtype not in (*FLOATS, torch.float32):
            return f"reads float32, float16 or bfloat16 logits, not {problem.dtype}"
        groups = problem.routing.groups
        if next_power(groups) * next_power(problem.num_experts // groups) > MOST_LANES:
            return f"takes up to {MOST_LANES} experts, not {problem.num_experts} in {groups} groups"
        return why_not_device(problem.device)

    def run(self, routing: Routing, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Route as `RoutingKernel.run` says."""
        return route(
            logits,
            bias,
            routing.top_k,
            routing.scoring,
            routing.renormalizes,
            routing.scale,
            routing.groups,
            routing.kept_groups,
            routing.group_best,
        )

    def cases(self, device: Device) -> Iterator[Case]:
        """Yield the model families' rules: the best two, softmax over the chosen, groups with a bias and without."""
        of_20 = Routing(top_k=6, renormalize=False, scale=16.0, groups=8, kept_groups=3)
        of_32 = Routing(top_k=8, scoring="sigmoid", scale=2.5, groups=8, kept_groups=4, group_best=2)
        rules = (
            ("8 experts", 8, Routing(top_k=2, scoring="topk_softmax"), torch.bfloat16),
            ("60 experts", 60, Routing(top_k=4, renormalize=False), torch.bfloat16),
            ("128 experts", 128, Routing(top_k=8), torch.float32),
            ("groups of 20", 160, of_20, torch.float32),
            ("groups of 32 and a bias", 256, of_32, torch.float32),
        )
        for name, experts, routing, dtype in rules:
            for tokens in (1, 512):
                logits = torch.empty((tokens, experts), dtype=dtype, device="meta")
                bias = logits[0].float() if "bias" in name else None
                yield Case(f"{name}, {tokens} tokens", partial(self.run, routing, logits, bias))


@operator(
    "route(Tensor logits, Tensor? bias, int top_k, str scoring, bool renormalize, float scale, int groups, "
    "int kept_groups, int group_best) -> (Tensor, Tensor)",
    lambda logits, bias, top_k, *rule: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.float32),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
    ),
)
def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    groups: int,
    kept_groups: int,
    group_best: int,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts.

    logits: [T, E].  bias: [E].  Returns weights [T, K] float32 and ids [T, K] int64.
    """
    tokens, experts = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    if tokens:
        rows, columns = next_power(groups), next_power(experts // groups)
        choose_experts.launch(
            (tokens,),
            logits,
            bias if bias is None else bias.contiguous(),
            weights,
            ids,
            logits.stride(0),
            float(scale),
            GROUPS=groups,
            GROUP=experts // groups,
            KEPT=kept_groups,
            BEST=group_best,
            TOP_K=top_k,
            SCORING=scoring,
            RENORMALIZE=renormalize,
            BLOCK_N=rows,
            BLOCK_S=columns,
            BLOCK_K=next_power(top_k),
            num_warps=max(1, min(8, rows * columns // 256)),
        )
    return weights, ids


@inline
def ordered(values, places):
    """Make int64 keys that are greater where the value is, or, among equal values, where the place is lower.

    values: float32; not a number counts as infinity.  places: int32 from 0.
    A key's lower half is the place counted from the far end.
    """
    values = tl.where(values == values, values, float("inf"))
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return bits.to(tl.int64) * 4294967296 + (0x7FFFFFFF - places).to(tl.int64)


@inline
def place_of(key):
    """Return the place that `ordered` made the key of."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@kernel
def choose_experts(
    logits,
    bias,
    weights,
    ids,
    stride,
    scale,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Choose the experts of one token.

    logits: [T, E].  bias: [E].  weights, ids: [T, K].  A tile is [groups, experts of one].  Grid: (T,).
    """
    NEVER: tl.constexpr = -9223372036854775808  # below every key
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_S)
    experts = group[:, None] * GROUP + member[None, :]
    exists = (group < GROUPS)[:, None] & (member < GROUP)[None, :]
    scores = tl.load(logits + token * stride + experts, mask=exists, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(scores - tl.max(tl.max(scores, axis=1), axis=0))
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    ranked = scores
    if bias is not None:
        ranked += tl.load(bias + experts, mask=exists, other=0.0).to(tl.float32)
    if GROUPS > 1:
        left = tl.where(exists, ordered(ranked, experts), NEVER)
        worth = tl.zeros((BLOCK_N,), tl.float32)
        for _ in range(BEST):
            best = tl.max(left, axis=1)
            found = left == best[:, None]
            worth += tl.sum(tl.where(found & exists, ranked, 0.0), axis=1)
            left = tl.where(found, NEVER, left)
        order = tl.where(group < GROUPS, ordered(worth, group), NEVER)
        kept = group < 0
        for _ in range(KEPT):
            best_group = tl.max(order, axis=0)
            kept = kept | (order == best_group)
            order = tl.where(order == best_group, NEVER, order)
        exists = exists & kept[:, None]
    left = tl.where(exists, ordered(ranked, experts), NEVER)
    slots = tl.arange(0, BLOCK_K)
    chosen = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK_K,), tl.int64)
    for slot in range(TOP_K):
        best_key = tl.max(tl.max(left, axis=1), axis=0)
        found = left == best_key
        score = tl.sum(tl.sum(tl.where(found, scores, 0.0), axis=1), axis=0)
        chosen = tl.where(slots == slot, score, chosen)
        places = tl.where(slots == slot, place_of(best_key), places)
        left = tl.where(found, NEVER, left)
    if SCORING == "topk_softmax":
        chosen = tl.exp(chosen - tl.max(chosen, axis=0))
        chosen = chosen / tl.sum(chosen, axis=0)
    elif RENORMALIZE:
        chosen = chosen / (tl.sum(tl.where(slots < TOP_K, chosen, 0.0), axis=0) + 1e-20)
    tl.store(weights + token * TOP_K + slots, chosen * scale, mask=slots < TOP_K)
    tl.store(ids + token * TOP_K + slots, places, mask=slots < TOP_K)
