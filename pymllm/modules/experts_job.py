"""Stacked experts to replace: what each product will be packed as, what calibrates it, and the replacement."""

# T tokens, K experts a token, E experts, I intermediate size, H hidden size

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, DenseWeight
from pymllm.kernels.experts import ExpertsWeight, LazyWeights
from pymllm.modules.calibration import Tap
from pymllm.modules.experts import QuantizedExperts
from pymllm.modules.foreign_experts import ForeignExperts
from pymllm.modules.jobs import Job, Rounding, gram_size, keep_attributes, planned, shape_of, share_peaks
from pymllm.modules.report import QuantizedModule
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.experts import bind_experts
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.calibrated import InputStatistics
from pymllm.weights.spec import LinearShape

PRODUCTS = ("gate_up", "down")


@dataclass(eq=False)
class ExpertsJob(Job):
    """All experts of a layer.

    methods: by product, gate_up and down; one that no rule names keeps its floats.  rules: those that name a product.
    """

    facts: ForeignExperts
    methods: Mapping[str, LinearMethodBase]
    rules: Mapping[str, str]
    calibrated_rows: dict[str, int] = field(init=False, default_factory=dict)

    def weights(self) -> Mapping[str, Tensor]:
        return {name: self._tensors()[name] for product in self.rules for name in self._names(product)}

    def check(self, *, calibrated: bool) -> None:
        made = {product: self._planned(product, calibrated) for product in PRODUCTS}
        bind_experts(self._weight(made), self.facts.activation, self.execution)

    def _planned(self, product: str, calibrated: bool) -> CanonicalWeight:
        method, shape = self.methods[product], self._shape(product, 0)
        if not isinstance(method, ConvertedLinearMethod):
            sides = shape.out_features, shape.in_features
            return DenseWeight(torch.empty(sides, dtype=self.execution.dtype, device="meta"))
        method.target.check(shape)
        return planned(method, shape, calibrated)

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for product in self.rules:
            method = self.methods[product]
            assert isinstance(method, ConvertedLinearMethod)
            size = gram_size(method, self._shape(product, 0))
            found |= {self._expert(product, index): size for index in range(self.facts.num_experts)}
        return found

    def tap(self) -> Tap:
        return Tap(self.module, self._read)

    def _read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Container[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Find each expert's rows, and what its gate makes of them, in the module's floats."""
        facts, tensors = self.facts, self._tensors()
        biases = facts.biases(tensors)
        x, ids, _ = facts.routed(args, kwargs)
        for expert in range(facts.num_experts):
            first, second = (self._expert(product, expert) for product in PRODUCTS)
            if first not in wanted and second not in wanted:
                continue
            rows = x.reshape(-1, facts.hidden_size)[(ids == expert).any(dim=1)]
            if first in wanted:
                yield first, rows
            if second in wanted and rows.numel():
                hidden = rows.to(tensors[facts.down].dtype) @ facts.gate_up_of(tensors, expert).t()
                yield second, facts.activation(hidden if biases is None else hidden + biases[0][expert])

    def fit(self, seen: dict[str, InputStatistics], rounding: Rounding) -> None:
        for product in self.rules:
            method = self.methods[product]
            assert isinstance(method, ConvertedLinearMethod)
            experts = range(self.facts.num_experts)
            mine = {name: index for index in experts if (name := self._expert(product, index)) in seen}
            share_peaks(method, [seen[name] for name in mine])
            for name, index in mine.items():
                statistics = seen.pop(name)
                self.calibrated_rows[product] = self.calibrated_rows.get(product, 0) + statistics.rows
                floats = self._of(product, index)
                self.fitted[name] = rounding(method, floats, self._shape(product, index), statistics)

    @torch.no_grad()
    def replacement(self, other: Any) -> QuantizedExperts:
        weight = self._weight()
        bound = bind_experts(weight, self.facts.activation, self.execution)
        self.fitted.clear()
        methods = {
            product: method.target if isinstance(method, ConvertedLinearMethod) else method
            for product, method in self.methods.items()
        }
        layer = QuantizedExperts(self.name, self.facts, methods, self.execution, bound, self._tensors())
        keep_attributes(self.module, layer)
        return layer.train(self.module.training)

    def rows(self, layer: Any, other: Any) -> Iterator[QuantizedModule]:
        kernel = layer.bound.selection.kernel
        for product, rule in self.rules.items():
            method, names = self.methods[product], self._names(product)
            assert isinstance(method, ConvertedLinearMethod)
            packed = [t.nbytes for key, t in layer.bound.packed.items() if key.startswith(product + ".")]
            for name in names:
                yield QuantizedModule(
                    prefix=f"{self.name}.{name}",
                    kind="experts",
                    rule=rule,
                    method=method.target.describe(),
                    kernel=kernel.name,
                    numerics=kernel.numerics(layer.bound.problem),
                    bytes_before=self._tensors()[name].nbytes,
                    bytes_after=sum(packed) // len(names),
                    calibration_rows=self.calibrated_rows.get(product, 0),
                )

    def _weight(self, made: Mapping[str, CanonicalWeight] | None = None) -> ExpertsWeight:
        """Collect all experts' weights.  made: what stands for every expert's, by product; None: each is converted."""
        count = self.facts.num_experts

        def product(name: str) -> LazyWeights:
            return LazyWeights(lambda index: made[name] if made else self._converted(name, index), count)

        return ExpertsWeight((product("gate_up"),), product("down"))

    def _converted(self, product: str, index: int) -> CanonicalWeight:
        fitted = self.fitted.get(self._expert(product, index))  # the first expert is asked for twice
        if fitted is not None:
            return fitted
        method, floats = self.methods[product], self._of(product, index)
        if not isinstance(method, ConvertedLinearMethod):
            return DenseWeight(floats.to(self.execution.dtype).contiguous())
        return method.convert(DenseWeight(floats), self._shape(product, index))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module._parameters.items() if p is not None}

    def _names(self, product: str) -> tuple[str, ...]:
        return self.facts.gate_up if product == "gate_up" else (self.facts.down,)

    def _of(self, product: str, index: int) -> Tensor:
        """Return one expert's weight as floats, [O, I]."""
        read = self.facts.gate_up_of if product == "gate_up" else self.facts.down_of
        return read(self._tensors(), index)

    def _expert(self, product: str, index: int) -> str:
        return f"{self.name}.{self._names(product)[0]}[{index}]"

    def _shape(self, product: str, index: int) -> LinearShape:
        hidden, inner = self.facts.hidden_size, self.facts.intermediate_size
        sides = (inner * (2 if self.facts.gated else 1), hidden) if product == "gate_up" else (hidden, inner)
        dtype = next(iter(self._tensors().values())).dtype
        return shape_of(torch.empty(sides, dtype=dtype, device="meta"), self._expert(product, index))
