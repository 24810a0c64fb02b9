"""Modules to replace, one kind a class: what each will be packed as, what calibrates it, and its replacement."""

# O out_features, I in_features, E experts, H hidden size

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.config import Execution, parse_dtype
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.modules.calibration import Tap
from pymllm.modules.foreign_matrices import ForeignMatrix
from pymllm.modules.layers import QuantizedEmbedding, QuantizedLayer, QuantizedLinear, QuantizedStack
from pymllm.modules.packed import moved
from pymllm.modules.report import QuantizedModule
from pymllm.quantization.binding import BoundWeight, bind, bind_shared
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.rounding.calibrated import (
    InputStatistics,
    needs_inputs,
    quantize_calibrated,
    without_static,
)
from pymllm.weights.spec import FLOATS, LinearShape, Span

Rounding = Callable[[ConvertedLinearMethod, Tensor, LinearShape, InputStatistics], CanonicalWeight]


@dataclass(eq=False)
class Job(ABC):
    """A module to replace.

    names: all the paths at which it stands; it is reported under the first.  execution: what the replacement is for.
    fitted: weights that calibration has rounded, by the names of `sizes`.
    """

    names: tuple[str, ...]
    module: nn.Module
    execution: Execution = field(init=False)
    fitted: dict[str, CanonicalWeight] = field(init=False, default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Return the module's weights that are replaced, by name below the module."""

    @abstractmethod
    def check(self, *, calibrated: bool) -> None:
        """Check that every weight can be packed.  ConfigError or KernelError says why not."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return I of each weight whose inputs' products calibration needs, by name; 0: it needs the largest alone."""

    @abstractmethod
    def tap(self) -> Tap | None:
        """Return where the inputs of its weights are seen; None: nothing of them is used."""

    @abstractmethod
    def fit(self, seen: dict[str, InputStatistics], rounding: Rounding) -> None:
        """Round the weights of these names by the inputs that reach them.  Takes what it uses out of `seen`."""

    @abstractmethod
    def replacement(self, other: Any) -> Any:
        """Make what replaces the module.  other: that of a job with the same `key`; None: there is none."""

    @abstractmethod
    def rows(self, layer: Any, other: Any) -> Iterator[QuantizedModule]:
        """Report on each of `weights`.  layer: the replacement.  other: what that was given."""

    @property
    def key(self) -> Any:
        """A value that is equal for modules that have one weight and one method: they share the packed weight."""
        return id(self.module)

    def set_execution(self, dtype: str | torch.dtype | None, compute: str) -> None:
        """Note what the replacement is for.  dtype: of its arithmetic; None: that of its weight."""
        weight = next(iter(self.weights().values()))
        own = weight.dtype if weight.dtype in FLOATS else torch.float32
        self.execution = Execution(str(weight.device), own if dtype is None else parse_dtype(dtype), compute)


@dataclass(eq=False)
class MatrixJob(Job):
    """A linear layer or an embedding."""

    facts: ForeignMatrix
    method: ConvertedLinearMethod
    rule: str
    calibrated_rows: int = field(init=False, default=0)

    @property
    def operation(self) -> Any:
        return self.facts.kind

    @property
    def shape(self) -> LinearShape:
        return shape_of(self.facts.matrix(self.module), self.name)

    @property
    def key(self) -> Any:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        place = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        return place, self.method, self.execution

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self.module.weight}  # type: ignore[dict-item]

    def check(self, *, calibrated: bool) -> None:
        self.method.target.check(self.shape)
        bind(planned(self.method, self.shape, calibrated and self._linear), self.execution, self.operation)

    def sizes(self) -> dict[str, int]:
        return {self.name: gram_size(self.method, self.shape) if self._linear else 0}

    def tap(self) -> Tap | None:
        def read(
            args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Container[str]
        ) -> Iterator[tuple[str, Tensor]]:
            yield self.name, args[0] if args else kwargs.get("input", next(iter(kwargs.values())))

        return Tap(self.module, read) if self._linear else None

    def fit(self, seen: dict[str, InputStatistics], rounding: Rounding) -> None:
        statistics = seen.pop(self.name)
        if self._linear:
            floats = self.facts.matrix(self.module).detach()
            self.calibrated_rows = statistics.rows
            self.fitted[self.name] = rounding(self.method, floats, self.shape, statistics)

    @torch.no_grad()
    def replacement(self, other: Any) -> QuantizedLayer:
        if other is not None:
            bound = bind_shared(other.bound, self.execution, self.operation)
        else:
            made = self.fitted.pop(self.name, None)
            if made is None:
                floats = self.facts.matrix(self.module).detach()
                made = self.method.convert(DenseWeight(floats), self.shape)
            bound = bind(made, self.execution, self.operation)
        kind = QuantizedLinear if self._linear else QuantizedEmbedding
        layer = kind(self.name, self.shape, self.method.target, self.execution, bound)
        if not self._linear:
            layer.facts = self.facts  # type: ignore[attr-defined]
        layer.register_parameter("bias", getattr(self.module, "bias", None))
        keep_attributes(self.module, layer)
        return layer.train(self.module.training)

    def rows(self, layer: Any, other: Any) -> Iterator[QuantizedModule]:
        shares = other is not None and _same_tensors(layer.bound, other.bound)
        tied_to = other.prefix if shares else None
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        kernel = layer.bound.selection.kernel
        yield QuantizedModule(
            prefix=self.name,
            kind=layer.kind,
            rule=self.rule,
            method=self.method.target.describe(),
            kernel=kernel.name,
            numerics=kernel.numerics(layer.bound.problem),
            bytes_before=0 if tied_to else weight.nbytes,
            bytes_after=0 if tied_to else layer.bound.nbytes,
            tied_to=tied_to,
            calibration_rows=self.calibrated_rows,
        )

    @property
    def _linear(self) -> bool:
        return self.facts.kind == "linear"


@dataclass(eq=False)
class StackJob(Job):
    """Linear layers of all experts in one tensor, [E, O, I]: each becomes a layer of its own."""

    facts: ForeignMatrix
    method: ConvertedLinearMethod
    rule: str
    calibrated_rows: int = field(init=False, default=0)

    def weights(self) -> Mapping[str, Tensor]:
        return {"weight": self.module.weight}  # type: ignore[dict-item]

    def check(self, *, calibrated: bool) -> None:
        self.method.target.check(self._shape(0))
        bind(planned(self.method, self._shape(0), calibrated), self.execution, "linear")

    def sizes(self) -> dict[str, int]:
        size = gram_size(self.method, self._shape(0))
        return {self._expert(index): size for index in range(len(self._stack()))}

    def tap(self) -> Tap:
        def read(
            args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Container[str]
        ) -> Iterator[tuple[str, Tensor]]:
            inputs, sizes = (*args, *kwargs.values())
            parts = inputs.split(sizes.tolist() if isinstance(sizes, Tensor) else list(sizes))
            yield from ((name, rows) for i, rows in enumerate(parts) if (name := self._expert(i)) in wanted)

        return Tap(self.module, read)

    def fit(self, seen: dict[str, InputStatistics], rounding: Rounding) -> None:
        mine = {name: index for index in range(len(self._stack())) if (name := self._expert(index)) in seen}
        self.calibrated_rows += sum(seen[name].rows for name in mine)
        fill_unseen(self.method, [seen[name] for name in mine])
        for name, index in mine.items():
            statistics = seen.pop(name)
            self.fitted[name] = rounding(self.method, self._stack()[index], self._shape(index), statistics)

    @torch.no_grad()
    def replacement(self, other: Any) -> QuantizedStack:
        layers = []
        for index, floats in enumerate(self._stack()):
            made = self.fitted.pop(self._expert(index), None)
            made = made or self.method.convert(DenseWeight(floats), self._shape(index))
            bound = bind(made, self.execution, "linear")
            name = f"{self.name}.experts.{index}"
            layer = QuantizedLinear(name, self._shape(index), self.method.target, self.execution, bound)
            layer.register_parameter("bias", None)
            layers.append(layer)
        stack = QuantizedStack(layers)
        keep_attributes(self.module, stack)
        return stack.train(self.module.training)

    def rows(self, layer: Any, other: Any) -> Iterator[QuantizedModule]:
        bound: BoundWeight = layer.experts[0].bound
        yield QuantizedModule(
            prefix=self.name,
            kind="experts",
            rule=self.rule,
            method=self.method.target.describe(),
            kernel=bound.selection.kernel.name,
            numerics=bound.selection.kernel.numerics(bound.problem),
            bytes_before=self._stack().nbytes,
            bytes_after=sum(one.bound.nbytes for one in layer.experts),
            calibration_rows=self.calibrated_rows,
        )

    def _stack(self) -> Tensor:
        return self.facts.matrix(self.module).detach()

    def _expert(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _shape(self, index: int) -> LinearShape:
        return shape_of(self._stack()[index], self._expert(index))


def shape_of(matrix: Tensor, name: str) -> LinearShape:
    """Describe a whole weight, [O, I]."""
    out_features, in_features = matrix.shape
    return LinearShape(Span.full(in_features), (Span.full(out_features),), (name,), matrix.dtype)


def planned(method: ConvertedLinearMethod, shape: LinearShape, calibrated: bool) -> CanonicalWeight:
    """Make the weight that the replacement will have, without its data."""
    target = without_static(method.target) if calibrated else method.target
    made = replace(method, target=target).planned(shape)
    if calibrated and needs_inputs(method.target):
        assert isinstance(made, (IntWeight, Fp8Weight))
        return replace(made, activations="static", input_scales=torch.empty(1, device="meta"))
    return made


def gram_size(method: ConvertedLinearMethod, shape: LinearShape) -> int:
    """Return I if rounding by calibration uses the inputs' products; 0 if it uses the largest input alone."""
    made = planned(method, shape, True)
    return shape.in_features if isinstance(made, IntWeight) and made.offsets is None else 0


def fill_unseen(method: ConvertedLinearMethod, seen: Sequence[InputStatistics]) -> None:
    """Let experts that no calibration input reached be rounded by themselves, in the type that the others have.

    They get inputs of all directions alike, and the largest input of the others for a static scale.
    """
    peak = max((each.peak for each in seen), default=0.0)
    for each in seen:
        if each.rows:
            continue
        each.rows, each.peak = 1, peak if needs_inputs(method.target) else 0.0
        if each.gram is not None:
            each.gram.fill_diagonal_(1.0)


def rounding_by(algorithm: str, act_order: bool) -> Rounding:
    """Return how a weight is rounded by its inputs."""

    def rounded(
        method: ConvertedLinearMethod, floats: Tensor, shape: LinearShape, statistics: InputStatistics
    ) -> CanonicalWeight:
        weight = floats.detach().to("cpu", torch.float32).contiguous()
        made = quantize_calibrated(
            method.target, weight, shape, statistics, algorithm=algorithm, act_order=act_order
        )
        return moved(made, floats.device)

    return rounded


def keep_attributes(module: nn.Module, layer: nn.Module) -> None:
    """Carry over what a module says of itself as plain values, such as `padding_idx`, where the layer says nothing."""
    for name, value in vars(module).items():
        plain = value is None or isinstance(value, (bool, int, float, str))
        if plain and not name.startswith("_") and not hasattr(layer, name):
            setattr(layer, name, value)


def _same_tensors(one: BoundWeight, other: BoundWeight) -> bool:
    pointers = {tensor.data_ptr() for tensor in other.packed.values()}
    return all(tensor.data_ptr() in pointers for tensor in one.packed.values())
