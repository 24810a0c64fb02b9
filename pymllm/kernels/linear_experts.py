"""Experts one after the other, each product by the linear kernel that is best for it.

Every linear kernel thereby runs experts. The tensors that it packs for one expert are stacked over experts under their
own names ("gate_up.blocks" is [E, ...], say), so that a kernel for all experts at once can take over the layout.
"""

# T tokens, K experts a token, S slots (a token and one of its experts), E experts, H hidden size

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight, LazyWeights
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.reference.linear import ReferenceLinear
from pymllm.kernels.registry import Packed, select

INPUT_ORDER = (
    "input_order"  # the input that each column multiplies, beside the tensors that a linear kernel packed
)


class PackedExperts(dict[str, Tensor]):
    """Tensors stacked over experts, by "product.name"; `expert` returns those of one expert, which it slices once."""

    def __init__(self, tensors: Mapping[str, Tensor], num_experts: int) -> None:
        super().__init__(tensors)
        self._experts: list[dict[str, Packed] | None] = [None] * num_experts

    def expert(self, index: int) -> dict[str, Packed]:
        """Return one expert's packed tensors, by product."""
        found = self._experts[index]
        if found is None:
            split: dict[str, dict[str, Tensor]] = {}
            for key, tensor in self.items():
                product, _, name = key.partition(".")
                split.setdefault(product, {})[name] = tensor[index]
            found = self._experts[index] = dict(split)
        return found


class LinearExperts:
    """Experts by linear kernels: slots are sorted by expert, and an expert's rows go through its products together."""

    name = "linear"
    layout = "linear kernels' own, stacked over experts"

    def linear_kernel(self, problem: LinearProblem) -> Any:
        """Choose the kernel for one product of one expert."""
        return select("linear", problem).kernel

    def why_not(self, problem: ExpertsProblem) -> str | None:
        for product, linear in problem.products().items():
            if isinstance(self.linear_kernel(linear), ReferenceLinear):
                return f"no linear kernel but the reference runs {product}, whose weight is {linear.weight}"
        return None

    def numerics(self, problem: ExpertsProblem) -> str:
        kernels = {linear: self.linear_kernel(linear) for linear in problem.products().values()}
        said = dict.fromkeys(
            f"{kernel.name}: {kernel.numerics(linear)}" for linear, kernel in kernels.items()
        )
        return f"an expert at a time by {'; '.join(said)}"

    def tolerance(self, problem: ExpertsProblem) -> float:
        """Return the relative error that `verify` allows: the first product's error passes through the second one."""

        def allowed(linear: LinearProblem) -> float:
            kernel = self.linear_kernel(linear)
            return getattr(kernel, "tolerance", lambda p: TOLERANCES[p.dtype])(linear)

        return 2 * max(map(allowed, problem.products().values()))

    def pack(self, weight: ExpertsWeight, problem: ExpertsProblem) -> Packed:
        stacked: dict[str, Tensor] = {}
        for product, experts in weight.products().items():
            for index in range(problem.num_experts):
                packed = self._pack_product(experts[index], problem.products()[product])
                named = {f"{product}.{name}": tensor for name, tensor in packed.items()}
                stack(stacked, named, index, problem)
                if all(tensor.is_meta for tensor in packed.values()):
                    break  # a plan, for which one expert stands for all
        return PackedExperts(stacked, problem.num_experts)

    def _pack_product(self, weight: CanonicalWeight, linear: LinearProblem) -> Packed:
        if not isinstance(weight, IntWeight) or weight.input_order is None:
            return self.linear_kernel(linear).pack(weight, linear)
        packed = self.linear_kernel(linear).pack(replace(weight, input_order=None), linear)
        return {**packed, INPUT_ORDER: weight.input_order}

    def unpack(self, packed: Packed, problem: ExpertsProblem) -> ExpertsWeight:
        def product(name: str, linear: LinearProblem) -> Sequence[CanonicalWeight]:
            kernel = self.linear_kernel(linear)

            def expert(index: int) -> CanonicalWeight:
                tensors = experts_of(packed).expert(index)[name]
                weight = kernel.unpack(tensors, linear)
                order = tensors.get(INPUT_ORDER)
                return weight if order is None else replace(weight, input_order=order)

            return LazyWeights(expert, problem.num_experts)

        *gate_up, down = (product(name, linear) for name, linear in problem.products().items())
        return ExpertsWeight(tuple(gate_up), down)

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        experts, products = experts_of(packed), problem.products()
        kernels = {product: self.linear_kernel(linear).run for product, linear in products.items()}

        def expert(index: int, rows: Tensor) -> Tensor:
            tensors = experts.expert(index)

            def multiply(product: str, x: Tensor, bias: Tensor | None) -> Tensor:
                order = tensors[product].get(INPUT_ORDER)
                x = x if order is None else x[:, order]
                return kernels[product](tensors[product], products[product], x, bias)

            first = None if bias.gate_up is None else bias.gate_up[index]
            if "gate_up" in products:
                hidden = multiply("gate_up", rows, first)
            else:
                hidden = torch.cat((multiply("gate", rows, None), multiply("up", rows, None)), dim=-1)
                hidden = hidden if first is None else hidden + first
            second = None if bias.down is None else bias.down[index]
            return multiply("down", problem.activation(hidden), second)

        return run_by_expert(expert, x, topk_ids, topk_weights)


def experts_of(packed: Packed) -> PackedExperts:
    """Return packed tensors as the `PackedExperts` that `LinearExperts.pack` made."""
    assert isinstance(packed, PackedExperts)
    return packed


def stack(
    stacked: dict[str, Tensor], packed: Mapping[str, Tensor], index: int, problem: ExpertsProblem
) -> None:
    """Put one expert's packed tensors at `index` of the stacked ones, which are made with the first expert."""
    for name, tensor in packed.items():
        if name not in stacked:
            stacked[name] = tensor.new_empty((problem.num_experts, *tensor.shape))
        if not tensor.is_meta:
            stacked[name][index] = tensor


def run_by_expert(
    expert: Callable[[int, Tensor], Tensor], x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Call `expert(index, rows of x)` for every expert that tokens were routed to.

    x: [T, H].  topk_ids, topk_weights: [T, K].  Returns the weighted sums of the answers, [T, H].
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if x.shape[0] == 1:  # decode: nothing to sort
        for index, weight in zip(topk_ids[0].tolist(), topk_weights[0], strict=True):
            if index >= 0:
                total += expert(index, x).float() * weight
        return total.to(x.dtype)
    for index, slots in slots_by_expert(topk_ids):
        tokens = slots // topk_ids.shape[1]
        answer = expert(index, x[tokens]).float() * topk_weights.flatten()[slots].unsqueeze(-1)
        total.index_add_(0, tokens, answer)
    return total.to(x.dtype)


def slots_by_expert(topk_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that occurs in topk_ids, [T, K], with its slots, [n], in order.  A slot: token · K + k."""
    ids, order = topk_ids.flatten().sort(stable=True)
    experts, counts = ids.unique_consecutive(return_counts=True)
    for index, slots in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        if index >= 0:
            yield index, slots
