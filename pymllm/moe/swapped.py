"""The state of a layer's experts: a swap makes one in other methods, and then puts it in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymllm.errors import ConfigError
from pymllm.kernels.experts import LazyWeights
from pymllm.layers.held import HeldWeight
from pymllm.layers.swapped import encode
from pymllm.quantization.experts import BoundExperts, ExpertsMethod, bind_experts, experts_weight
from pymllm.quantization.method import LinearMethodBase

if TYPE_CHECKING:
    from pymllm.moe.experts import Experts


@dataclass(frozen=True, eq=False)
class ExpertsState:
    """All that a swap changes of a layer's experts: the method, and the packed weights."""

    layer: Experts
    method: ExpertsMethod
    bound: BoundExperts | None
    rearranged: bool = False  # tensors are always read into the modules of products

    @classmethod
    def of(cls, layer: Experts) -> ExpertsState:
        """Note what the experts run now."""
        return cls(layer, layer.quant_method, layer.bound)

    def same_as(self, other: Any) -> bool:
        """Tell whether these are the very same tensors in the same method."""
        return self.bound is other.bound and self.method == other.method

    def packed(self) -> list[BoundExperts]:
        """Return the packed experts."""
        return [] if self.bound is None else [self.bound]

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the products as they are stored."""
        return self.layer.held()

    def install(self) -> None:
        """Put the method and the packed experts in place."""
        self.layer.quant_method, self.layer.bound = self.method, self.bound
        for name, method in self.method.methods().items():
            self.layer.products_of()[name].quant_method = method


def restage_experts(layer: Experts, methods: Sequence[LinearMethodBase]) -> ExpertsState:
    """Make the state of a layer's experts with other methods, one for each of `parts()`.  The experts stay as they are.

    ConfigError where only some experts would change, or gate without up.
    """
    old, running = layer.quant_method.methods(), layer.bound
    products, wanted = layer.products_of(), {name: set[LinearMethodBase]() for name in old}
    for part, chosen in zip(layer.parts(), methods, strict=True):
        wanted[next(name for name, product in products.items() if product is part.module)].add(chosen)
    for product, distinct in wanted.items():
        if len(distinct) > 1:
            raise ConfigError(
                "the experts of a running layer can only be swapped together, and so can gate and up",
                code="swap-experts",
                tensor=f"{layer.prefix}, {product}",
                expected="a pattern that names all of them, or none",
                fix=f"For example {layer.prefix + '.**'!r}; when loading, a rule may name some of them.",
            )
    new = {product: next(iter(distinct), old[product]) for product, distinct in wanted.items()}
    if new == old or running is None:
        return ExpertsState.of(layer)
    canonical = running.canonical().products()

    def encoded(product: str) -> LazyWeights:
        shape, was, method = products[product].shape, old[product], new[product]
        method.check(shape.expert(shape.ids[0]))
        return LazyWeights(
            lambda i: encode(canonical[product][i], was, method, shape.expert(shape.ids[i])), len(shape.ids)
        )

    weight = experts_weight({product: encoded(product) for product in new})
    method = ExpertsMethod(tuple(m for name, m in new.items() if name != "down"), new["down"])
    return ExpertsState(layer, method, bind_experts(weight, layer.activation, layer.execution_or_default()))
