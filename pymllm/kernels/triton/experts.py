"""All routed experts of a layer in a few launches: weights of int4, int8, fp8, codebooks, 16 bits; 16-bit activations.

Each expert is packed as the weight-only linear kernels pack a weight, and the experts are stacked. A slot is a token
and one of its experts. A few slots are blocks of one row each; more are sorted by expert on the device, each expert's
slots padded to whole blocks. The largest possible number of blocks follows from shapes alone, and blocks that are not
needed end at once: nothing is read back, and a CUDA graph serves any routing.
"""

# T tokens, K experts a token, S slots (T·K), E experts, H hidden size, I intermediate size, O out_features

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, DenseType, DenseWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.linear_experts import LinearExperts
from pymllm.kernels.reference.linear import ReferenceLinear
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.codebook_weights import TritonIntegerCodebook
from pymllm.kernels.triton.elementwise import gate_and_mul
from pymllm.kernels.triton.fp4_weights import TritonFp4
from pymllm.kernels.triton.fp8_weights import TritonFp8
from pymllm.kernels.triton.int_weights import TritonInt
from pymllm.kernels.triton.launch import inline, interpreting, kernel
from pymllm.kernels.triton.linear_cases import resized
from pymllm.kernels.triton.requirements import why_not_float_activations
from pymllm.kernels.triton.tuning import architecture_of, divide, next_power
from pymllm.kernels.triton.weight_only import (
    WHOLE,
    Coding,
    Operands,
    coder,
    coding_of,
    largest_tile,
    stages_within,
    tile_shape,
)
from pymllm.kernels.triton.weight_only_kernels import multiply_tile
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear, order_of
from pymllm.kernels.triton.words import Order

if TYPE_CHECKING:
    import triton.language as tl

FEW_SLOTS = 16
SORTED_AT_ONCE = 1024


class DenseWords(WeightOnlyLinear):
    """16-bit floats as "words" of one code, for experts; a single dense layer is left to torch."""

    name = "dense"
    layout = "dense"

    def why_not(self, problem: LinearProblem) -> str | None:
        kind = problem.weight
        if not isinstance(kind, DenseType) or kind.dtype is not problem.dtype:
            return f"takes weights in the inputs' dtype, the weight is {kind}"
        if problem.in_features % 16:
            return f"needs multiples of 16 inputs, the weight has {problem.in_features}"
        return why_not_float_activations(problem, "float")

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        return weight.tensors()

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        return DenseWeight(packed["weight"])

    def operands(self, packed: Packed) -> Operands:
        return Operands(packed["weight"], None)

    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        order = order_of(problem)
        return f"dense {order.span} {order.beside}"

    def examples(self) -> Sequence[CanonicalWeight]:
        return [DenseWeight(torch.empty((1024, 2048), dtype=torch.bfloat16, device="meta"))]


WEIGHTS: tuple[WeightOnlyLinear, ...] = (
    TritonInt(),
    TritonFp8(),
    TritonFp4(),
    TritonIntegerCodebook(),
    DenseWords(),
)


class TritonExperts(LinearExperts):
    """Grouped matmuls over all experts, for every weight that a weight-only kernel takes."""

    name = "triton_experts"
    device_type = "cuda"  # the only one it runs on
    capturable = True
    layout = "triton words, stacked over experts"

    def linear_kernel(self, problem: LinearProblem) -> Any:
        taken = (kernel for kernel in WEIGHTS if kernel.why_not(problem) is None)
        return next(taken, ReferenceLinear())

    def why_not(self, problem: ExpertsProblem) -> str | None:
        if problem.reordered:
            return "takes inputs in order"
        for product, linear in problem.products().items():
            reasons = [kernel.why_not(linear) for kernel in WEIGHTS]
            if None not in reasons:
                return f"cannot run {product}: " + "; ".join(filter(None, reasons))
        return None

    def numerics(self, problem: ExpertsProblem) -> str:
        return (
            "numbers before scales exact in the activations' dtype, sums and scales in float32, "
            "the gated product rounded to the activations' dtype"
        )

    def tolerance(self, problem: ExpertsProblem) -> float:
        return 2 * TOLERANCES[problem.dtype]

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        tokens, top_k = topk_ids.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if not tokens or not top_k:
            return y.zero_()
        x = x if x.stride(-1) == 1 else x.contiguous()
        ids = topk_ids.contiguous()
        most = largest_tile(architecture_of(problem.device))
        rows = sorted_slots(ids, problem.num_experts, most) if ids.numel() > FEW_SLOTS else None

        def multiply(product: str, x: Tensor, bias: Tensor | None, top_k: int, dtype: torch.dtype) -> Tensor:
            linear = problem.products()[product]
            kernel = self.linear_kernel(linear)
            tensors = {key.partition(".")[2]: t for key, t in packed.items() if key.startswith(product + ".")}
            coding = coding_of(kernel.coding(tensors, linear))
            result = x.new_empty((ids.numel(), linear.out_features), dtype=dtype)
            multiply_experts(
                x, kernel.operands(tensors), bias, coding, problem.device, result, ids, rows, top_k
            )
            return result

        if "gate_up" in problem.products():
            hidden = multiply("gate_up", x, bias.gate_up, top_k, x.dtype)
        else:
            halves = [multiply(name, x, None, top_k, x.dtype) for name in ("gate", "up")]
            hidden = torch.cat(halves, dim=-1)
            if bias.gate_up is not None:
                hidden = hidden + bias.gate_up[ids.flatten().clamp(min=0)]
        hidden = (
            gate_and_mul(hidden, "silu") if problem.activation.kind == "silu" else problem.activation(hidden)
        )
        answers = multiply("down", hidden, bias.down, 1, torch.float32)
        size = x.shape[-1]
        block = min(next_power(size), 1024)
        add_answers.launch(
            (tokens, divide(size, block)),
            answers,
            ids,
            topk_weights.contiguous(),
            y,
            size,
            TOP_K=top_k,
            BLOCK=block,
            num_warps=4,
        )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        """Yield layers of 128 experts of 768, eight a token, in every kind of weight."""
        for example in [kind.examples()[0] for kind in WEIGHTS]:
            shapes = ((2 * 768, 2048), (2048, 768))
            weights = [resized(example, *shape) for shape in shapes]
            first, second = (
                LinearProblem(w.type, w.shape[1], w.shape[0], torch.bfloat16, device) for w in weights
            )
            problem = ExpertsProblem((first,), second, 128, GatedActivation())
            if self.why_not(problem) is not None:
                continue
            packed = self.pack(ExpertsWeight(([weights[0]] * 128,), [weights[1]] * 128), problem)
            for tokens in (1, 16, 512):
                x = torch.empty((tokens, 2048), dtype=torch.bfloat16, device="meta")
                ids = torch.empty((tokens, 8), dtype=torch.int64, device="meta")
                yield Case(
                    f"{first.weight}, {tokens} tokens",
                    lambda p=packed, q=problem, x=x, i=ids: self.run(p, q, x, i, i.float(), ExpertsBias()),  # type: ignore[misc]
                )


def multiply_experts(
    x: Tensor,
    weight: Operands,
    bias: Tensor | None,
    coding: Coding,
    device: Device,
    y: Tensor,
    ids: Tensor,
    rows: tuple[int, Tensor, Tensor] | None,
    top_k: int,
) -> None:
    """Multiply each slot's row by its expert's weight: y[s] = weight of slot s's expert times x[s // top_k].

    x: [S / top_k, I].  weight: of all experts.  y: [S, O].  rows: what `sorted_slots` returns; None: few slots.
    """
    slots, out_features = y.shape
    words = weight.words.shape[-1]
    # A few slots are a block each, of one row.
    block_tokens, order, block_experts = rows or (16, None, ids)
    architecture = architecture_of(device)
    outputs, _, depth, warps = tile_shape(architecture, block_tokens, coding)
    depth = max(depth, coding.span_words)
    multiply_tile.launch(
        (divide(out_features, outputs), block_experts.numel(), 1),
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        weight.row_scales,
        bias,
        y,
        order,
        block_experts,
        slots,
        out_features,
        words,
        divide(words, depth) * depth,
        x.stride(0),
        **coding.decoding(x.dtype, architecture),
        EVEN=words % depth == 0,
        BLOCK_O=outputs,
        BLOCK_W=depth,
        BLOCK_T=block_tokens,
        TOP_K=top_k,
        UPCAST=interpreting(),
        num_warps=warps,
        num_stages=stages_within(architecture.shared_bytes, outputs, block_tokens, depth, coding),
    )


def sorted_slots(ids: Tensor, num_experts: int, largest: int = 64) -> tuple[int, Tensor, Tensor]:
    """Sort slots by expert, keep their order within one, and pad each expert's to whole blocks.

    ids: [T, K] int64; below 0: no expert.  largest: number of slots of a block.  Returns the slots of a block;
    [blocks * that] int32 slots, S where there is none; [blocks] int32 experts, below 0 for blocks that are not needed.
    """
    slots = ids.numel()
    block = min(largest, max(16, next_power(slots // num_experts)))
    blocks = min(slots, num_experts + slots // block)
    counts = ids.new_empty(num_experts, dtype=torch.int32)
    order = ids.new_empty(blocks * block, dtype=torch.int32)
    experts = ids.new_empty(blocks, dtype=torch.int32)
    at_once = min(next_power(slots), SORTED_AT_ONCE)
    count_slots.launch((num_experts,), ids, counts, slots, BLOCK=at_once, num_warps=4)
    place_slots.launch(
        (num_experts + 1,),
        ids,
        counts,
        order,
        experts,
        slots,
        num_experts,
        blocks,
        BLOCK=at_once,
        BLOCK_E=next_power(num_experts),
        BLOCK_T=block,
        num_warps=4,
    )
    return block, order, experts


@coder("dense")
def dense_coding(span: str, beside: str) -> Coding:
    return Coding(as_float, 32, Order(int(span), int(beside)), WHOLE)


@inline
def as_float(words, n: tl.constexpr):
    return words.to(tl.float32)


@kernel(varying=("ids", "slots"))
def count_slots(ids, counts, slots, BLOCK: tl.constexpr):
    """Count the slots of one expert.  ids: [S].  counts: [E].  Grid: (E,)."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found += (tl.load(ids + slot, mask=slot < slots, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@kernel(varying=("ids", "slots", "blocks"))
def place_slots(
    ids,
    counts,
    order,
    experts,
    slots,
    num_experts,
    blocks,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Place the slots of one expert in blocks of its own.

    order: [blocks * BLOCK_T].  experts: [blocks].  Grid: (E + 1,); the last program marks the blocks left over.
    """
    expert = tl.program_id(0)
    all_experts = tl.arange(0, BLOCK_E)
    count = tl.load(counts + all_experts, mask=all_experts < num_experts, other=0)
    needed = (count + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(tl.where(all_experts < expert, needed, 0), axis=0)
    if expert == num_experts:
        for block in range(first, blocks):
            tl.store(experts + block, -1)
    else:
        mine = tl.sum(tl.where(all_experts == expert, count, 0), axis=0)
        for block in range(first, first + (mine + BLOCK_T - 1) // BLOCK_T):
            tl.store(experts + block, expert)
        start_of_mine = first * BLOCK_T
        placed = 0
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            chosen = tl.load(ids + slot, mask=slot < slots, other=-1) == expert
            rank = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(order + start_of_mine + placed + rank, slot, mask=chosen)
            placed += tl.sum(chosen.to(tl.int32), axis=0)
        rest = mine + tl.arange(0, BLOCK_T)
        padded = (mine + BLOCK_T - 1) // BLOCK_T * BLOCK_T
        tl.store(order + start_of_mine + rest, tl.full((BLOCK_T,), 0, tl.int32) + slots, mask=rest < padded)


@kernel(varying=("ids",))
def add_answers(answers, ids, weights, y, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Add up one block of a token's answers, each times its weight.

    answers: [T·K, H] float32.  ids, weights: [T, K].  y: [T, H].  Grid: (T, H / BLOCK).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        # The answer of a slot without an expert was never written.
        written = tl.where(tl.load(ids + slot) >= 0, size, 0)
        answer = tl.load(answers + slot * size + columns, mask=columns < written, other=0.0)
        total += answer * tl.load(weights + slot).to(tl.float32)
    tl.store(y + token * size + columns, total.to(y.dtype.element_ty), mask=columns < size)
