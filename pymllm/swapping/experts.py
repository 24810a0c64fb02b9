"""Another method for the experts of a running layer: the part of `pymllm.swapping.swap` that knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.experts import LazyWeights
from pymllm.moe.experts import Experts
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.experts import BoundExperts, ExpertsMethod, bind_experts, experts_weight
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape


class Chooser(Protocol):
    """What decides on the method of a weight."""

    def choose_one(self, layer: nn.Module, stored: str) -> LinearMethodBase: ...


@dataclass(frozen=True, eq=False)
class ExpertsState:
    """All that a swap changes of a layer's experts: the method, and the packed weights."""

    layer: Experts
    method: ExpertsMethod
    bound: BoundExperts | None
    holders: tuple[nn.Module, ...] = ()  # none: experts have no weights but the packed ones

    def before(self) -> ExpertsState:
        """What the experts run now."""
        return ExpertsState(self.layer, self.layer.quant_method, self.layer.bound)

    def install(self) -> None:
        self.layer.quant_method, self.layer.bound = self.method, self.bound
        for name, method in self.method.methods().items():
            self.layer.products_of()[name].quant_method = method


def experts_of(root: nn.Module) -> list[Experts]:
    """All experts that this rank holds."""
    return [module for module in root.modules() if isinstance(module, Experts)]


def choose_experts(layer: Experts, quant: Chooser) -> dict[str, set[LinearMethodBase]]:
    """The methods that the parts of each product of these experts should have."""
    wanted: dict[str, set[LinearMethodBase]] = {name: set() for name in layer.products_of()}
    for product, name in layer.names_by_product():
        wanted[product].add(quant.choose_one(layer, name))
    return wanted


def swapped_experts(layer: Experts, wanted: dict[str, set[LinearMethodBase]]) -> ExpertsState | None:
    """The experts in their new methods; None: nothing changes.  ConfigError where some of them alone should change."""
    old, bound = layer.quant_method.methods(), layer.bound
    for product, methods in wanted.items():
        if len(methods) > 1:
            raise ConfigError(
                "the experts of a running layer can only be swapped together, gate and up likewise",
                code="swap-experts",
                tensor=f"{layer.prefix}, {product}",
                expected="a pattern that names all of them, or none",
                fix=f"For example {layer.prefix + '.**'!r}; when loading, a rule may name some of them.",
            )
    new = {product: next(iter(methods), old[product]) for product, methods in wanted.items()}
    if new == old or bound is None:
        return None
    running, products = bound.canonical().products(), layer.products_of()

    def encoded(product: str) -> LazyWeights:
        shape, was, method = products[product].shape, old[product], new[product]
        method.check(shape.expert(shape.ids[0]))
        return LazyWeights(
            lambda i: encode(running[product][i], was, method, shape.expert(shape.ids[i])), len(shape.ids)
        )

    weight = experts_weight({product: encoded(product) for product in new})
    method = ExpertsMethod(tuple(m for name, m in new.items() if name != "down"), new["down"])
    return ExpertsState(layer, method, bind_experts(weight, layer.activation, layer.execution_or_default()))


def encode(
    weight: CanonicalWeight, was: LinearMethodBase, method: LinearMethodBase, shape: LinearShape
) -> CanonicalWeight:
    """A running weight of method `was` in `method`, step by step as `method` has been converted since."""
    if method == was:
        return weight
    assert isinstance(method, ConvertedLinearMethod)
    return method.convert(encode(weight, was, method.source, shape), shape)
