"""The experts of a layer in any format that linear layers have: `ExpertsMethod`.

An expert is two products, gate and up together and down, and each product has a linear method. The method describes
one expert's weight; the tensors of all experts have an axis EXPERT before its dimensions, weights are converted one
expert at a time, and one kernel is chosen for all experts together.
"""

# T tokens, K experts a token, E experts held here, H hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, IntWeight, on_meta
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight, LazyWeights
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.registry import Packed, Selection, select
from pymllm.quantization.method import LinearMethodBase, QuantizeMethodBase
from pymllm.weights.loader import copy_full_tensor, place_experts, slots_of, track, written_of
from pymllm.weights.spec import ExpertsShape


@dataclass(frozen=True)
class BoundExperts:
    """The packed experts of a layer and the kernel that runs them, chosen once."""

    selection: Selection[Any]
    problem: ExpertsProblem
    packed: Packed

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.packed.values())

    @property
    def tolerance(self) -> float:
        """The relative error that the kernel owns up to; without a word of its own, what two products explain."""
        explained = 2 * TOLERANCES[self.problem.dtype]
        return getattr(self.selection.kernel, "tolerance", lambda _: explained)(self.problem)

    @property
    def rounds_activations(self) -> bool:
        """True if the kernel owns up to an error beyond what the activations' dtype explains."""
        return self.tolerance > 2 * TOLERANCES[self.problem.dtype]

    def run(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, bias: ExpertsBias) -> Tensor:
        """Run the kernel.  Shapes as of `pymllm.kernels.registry.ExpertsKernel.run`."""
        return self.selection.kernel.run(self.packed, self.problem, x, topk_ids, topk_weights, bias)

    def canonical(self) -> ExpertsWeight:
        """Unpack the weights to their canonical layout again."""
        return self.selection.kernel.unpack(self.packed, self.problem)


def bind_experts(weight: ExpertsWeight, activation: GatedActivation, execution: Execution) -> BoundExperts:
    """Choose the kernel for `weight` and pack it.  A plan binds meta tensors, to count bytes without data."""
    device = probe_device(execution.device)
    firsts = [experts[0] for experts in weight.products().values()]
    *gate_up, down = (
        LinearProblem(first.type, first.shape[1], first.shape[0], execution.dtype, device, execution.compute)
        for first in firsts
    )
    reordered = any(isinstance(first, IntWeight) and first.input_order is not None for first in firsts)
    problem = ExpertsProblem(tuple(gate_up), down, weight.num_experts, activation, reordered)
    selection = select("experts", problem, execution.forced_kernel("experts"))
    return BoundExperts(selection, problem, selection.kernel.pack(weight, problem))


class Product(nn.Module):
    """The checkpoint's tensors of one product of all experts, as parameters [E, ...], until they are packed."""

    kind = "linear"
    operation = "experts"

    def __init__(self, shape: ExpertsShape, quant_method: LinearMethodBase, prefix: str) -> None:
        super().__init__()
        self.shape, self.quant_method, self.prefix = shape, quant_method, prefix
        quant_method.check(shape.expert(shape.ids[0] if shape.ids else 0))
        for spec in quant_method.weight_specs(shape.one):
            local, slots = place_experts(spec, shape)
            param = nn.Parameter(torch.empty(local, dtype=spec.dtype), requires_grad=False)
            self.register_parameter(spec.name, param)
            track(param, slots)

    def weight_loader(
        self, param: Tensor, loaded_weight: Tensor, shard_id: tuple[int, int] | int = 0
    ) -> None:
        """Cut a full checkpoint tensor for this rank and write it to `param`.

        shard_id: (expert, part) as the checkpoint counts them, or the part alone where experts are stacked in one
        tensor.  A tensor of an expert that another rank holds is ignored.
        """
        expert, part = shard_id if isinstance(shard_id, tuple) else (None, shard_id)
        if expert is not None and expert not in self.shape.ids:
            return
        position = None if expert is None else self.shape.ids.index(expert)
        slots = [slot for slot in slots_of(param) or () if slot.expert == position and slot.part == part]
        copy_full_tensor(param.data, slots, loaded_weight, written_of(param), 0, self.prefix)

    def canonical(
        self, tensors: Mapping[str, Tensor] | None = None, method: LinearMethodBase | None = None
    ) -> LazyWeights:
        """Convert each expert's weight to the canonical layout, when it is asked for.

        tensors: what to convert, by name; None: this product's parameters.  method: what reads them; None: its own.
        """
        held = {name: p.data for name, p in self.named_parameters()} if tensors is None else tensors
        shape, reader = self.shape, method or self.quant_method
        specs = {spec.name: spec for spec in reader.weight_specs(shape.one)}

        def one(position: int) -> CanonicalWeight:
            mine = {name: shape.in_order(specs[name], tensor[position]) for name, tensor in held.items()}
            weight = reader.to_canonical(mine, shape.expert(shape.ids[position]))
            return on_meta(weight) if any(tensor.is_meta for tensor in mine.values()) else weight

        return LazyWeights(one, len(shape.ids))


@dataclass(frozen=True)
class ExpertsMethod(QuantizeMethodBase):
    """The method of a layer's experts, made of the linear methods of their products.

    gate_up: the method of gate and up as one weight, or one for each where they cannot be one.  down: down's method.
    """

    gate_up: tuple[LinearMethodBase, ...]
    down: LinearMethodBase
    name: ClassVar[str] = "experts"

    def methods(self) -> dict[str, LinearMethodBase]:
        """Return the linear methods by product, under the names of `ExpertsWeight.products`."""
        names = ("gate_up",) if len(self.gate_up) == 1 else ("gate", "up")
        return {**dict(zip(names, self.gate_up, strict=True)), "down": self.down}

    def create_weights(
        self, layer: Any, shapes: Mapping[str, ExpertsShape], **extra_weight_attrs: Any
    ) -> None:  # type: ignore[override]
        """Register the parameters of each product in a module of its own, a `Product`.  shapes: by product."""
        for product, method in self.methods().items():
            layer.products[product] = Product(shapes[product], method, f"{layer.prefix} {product}")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bind the loaded experts to a kernel and free the checkpoint's layout.  A second call does nothing."""
        if layer.bound is not None or layer.empty:
            return
        products: dict[str, Product] = dict(layer.products.items())
        layer.bound = bind_experts(
            experts_weight({name: product.canonical() for name, product in products.items()}),
            layer.activation,
            layer.execution_or_default(),
        )
        for product in products.values():
            for name in list(product._parameters):
                delattr(product, name)

    def planned(self, shapes: Mapping[str, ExpertsShape]) -> ExpertsWeight:
        """Make the canonical weights without their data, on the meta device.  shapes: by product."""
        with torch.device("meta"):
            products = {name: Product(shapes[name], method, name) for name, method in self.methods().items()}
        made = {name: on_meta(product.canonical()[0]) for name, product in products.items()}
        size = len(shapes["down"].ids)
        return experts_weight({name: LazyWeights(lambda _, w=w: w, size) for name, w in made.items()})  # type: ignore[misc]

    def apply(self, layer: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:  # type: ignore[override]
        """Run each token's experts and sum their outputs by weight: x [T, H] -> [T, H].

        topk_ids: [T, K], positions among the experts held here; below 0: an expert that another rank holds, which
        adds nothing.  topk_weights: [T, K] float32.
        """
        if layer.empty:
            return torch.zeros_like(x)
        if layer.bound is None:
            raise ConfigError(
                "the experts' weights are not packed yet",
                code="not-packed",
                tensor=layer.prefix,
                fix="Load them, then call quant_method.process_weights_after_loading(layer).",
            )
        return layer.bound.run(x, topk_ids, topk_weights, layer.bias())

    def describe(self) -> str:
        return " | ".join(dict.fromkeys(method.describe() for method in self.methods().values()))


def experts_weight(products: Mapping[str, Any]) -> ExpertsWeight:
    """Make the experts' weight from those of each product.  products: by name, "down" and the others."""
    return ExpertsWeight(tuple(w for name, w in products.items() if name != "down"), products["down"])
