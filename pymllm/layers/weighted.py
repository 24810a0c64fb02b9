"""The base of linear layers, embeddings and heads: a shape, a rank's share of it, a `quant_method`, adapters.

A layer knows its shape, its share of it and the checkpoint names of its parts. Its `quant_method` does the rest: it
creates the weights, packs them and multiplies.
"""

# I in_features, O out_features, N test rows

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.errors import ConfigError, choices
from pymllm.kernels.registry import Operation, Selection
from pymllm.layers.held import (
    TRIAL_ROWS,
    Binder,
    Description,
    HeldPart,
    HeldWeight,
    HolderState,
    Place,
    Trial,
    WeightHolder,
    slotted_places,
)
from pymllm.layers.lora import LoRAMixin
from pymllm.layers.split import SplitLinearMethod
from pymllm.layers.swapped import LayerState, restage
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import BoundWeight, bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.parameters import add_weight, load_into
from pymllm.weights.spec import FLOATS, OUT, LinearShape, Span, WeightSpec, side_by_side

# Of a trial's inputs. Sums in f16 stay below 65504 for the layers that models have.
MAGNITUDES = {"ordinary": 1.0, "large": 200.0}


class WeightedLayer(LoRAMixin, WeightHolder):
    """A layer with one weight, or with several that it fuses.

    kind: "linear", "router", "embedding" or "lm_head", for formats and plans.
    operation: the operation whose kernels run it.
    kept: the names of parameters that stay as they are, while those of the method are packed.
    tied_to: the layer from whose tensors this one is loaded; None: from its own.
    shares_table: True where this layer runs the packed weight of `tied_to`.
    """

    kind: ClassVar[str] = "linear"
    operation: ClassVar[Operation] = "linear"
    kept: ClassVar[tuple[str, ...]] = ("bias",)
    shape: LinearShape
    bias: nn.Parameter | None
    quant_method: Any  # LinearMethodBase, or SplitLinearMethod; never None
    tied_to: WeightedLayer | None = None
    shares_table: bool = False

    def __init__(self, prefix: str, params_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._setup_lora()
        parallel = current_parallel()
        self.parallel, self.tp_rank, self.tp_size = parallel, parallel.rank, parallel.size
        self.execution = current_execution()
        self.prefix = prefix
        self.params_dtype = params_dtype or (
            self.execution.dtype if self.execution else torch.get_default_dtype()
        )

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        """Return a rank's share of the inputs, and of each part's outputs.

        ShardingError if `size` ranks cannot divide them.
        """
        raise NotImplementedError

    def shape_for(self, rank: int, size: int, parts: Sequence[str]) -> LinearShape:
        """Return the layer's shape with the share of a rank.  parts: the checkpoint names of what it fuses."""
        inputs, outputs = self.shard(rank, size)
        if len(parts) < len(outputs):  # one tensor holds several outputs
            # A single rank reads it as it is, even if a block of it lies across two outputs.
            total = sum(span.total for span in outputs)
            outputs = (Span.full(total),) if size == 1 else side_by_side(outputs)
        return LinearShape(inputs, outputs, tuple(parts), self.params_dtype)

    def _setup(
        self,
        parts: Sequence[str],
        quant_method: LinearMethodBase | None,
        quant_config: QuantizationConfig | None,
        bias: bool,
    ) -> None:
        """Choose the method and create the weights; `shard` must work by now."""
        self.shape = self.shape_for(self.tp_rank, self.tp_size, parts)
        chosen: LinearMethodBase | SplitLinearMethod | None = quant_method
        if chosen is None and quant_config is not None:
            methods = [
                quant_config.get_quant_method(self, part)
                or UnquantizedLinearMethod(getattr(self, "transposed", False))
                for part in parts
            ]
            alike = len(methods) == 1 or (len(set(methods)) == 1 and methods[0].fuses)
            chosen = methods[0] if alike else SplitLinearMethod(tuple(methods))
        self.quant_method = chosen or UnquantizedLinearMethod(getattr(self, "transposed", False))
        shape = self.shape
        self.quant_method.create_weights(
            self,
            shape.in_features_local,
            [span.size for span in shape.outputs],
            shape.in_features,
            shape.out_features,
            self.params_dtype,
        )
        if bias:
            own = (
                shape if self.tied_to is None else replace(shape, parts=(self.prefix,))
            )  # a table has no bias
            add_weight(self, WeightSpec("bias", self.params_dtype, (OUT,), accepts=FLOATS), own)
        else:
            self.register_parameter("bias", None)

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The dtype that plain weights keep (`Execution.kept_floats`); None: the layer's, also if its parts differ."""
        kept = self.execution.kept_floats if self.execution else {}
        first, *others = (kept.get(f"{part}.weight") for part in self.shape.parts)
        return first if all(other is first for other in others) else None

    def weight_loader(self, param: Tensor, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        """Cut a full checkpoint tensor for this rank and write it to `param`.

        shard_id: the index or name of the part that it is; None: the only one, or all parts side by side.
        CheckpointError names layer, tensor, expected and found, if the tensor does not fit or its place was written.
        """
        load_into(param, loaded_weight, self.part_index(shard_id), self.prefix)

    def part_index(self, shard_id: int | str | None) -> int | None:
        """Return the index of a part.  shard_id: its index, or its name's last segment; None gives None."""
        names = [part.rpartition(".")[2] for part in self.shape.parts]
        if shard_id is None or (isinstance(shard_id, int) and 0 <= shard_id < len(names)):
            return shard_id
        if shard_id in names:
            return names.index(str(shard_id))
        raise ConfigError(
            f"{self.prefix or type(self).__name__} has no part {shard_id!r}",
            code="shard-id",
            expected=choices(names, shard_id),
            found=str(shard_id),
        )

    # What a holder of weights answers: see `pymllm.layers.held`

    @property
    def loads(self) -> bool:
        """True: where there are no tensors to load, there is the table of another layer to share."""
        return True

    def places(self, name: str) -> Iterator[Place]:
        """Yield the place of every tensor, also of those in the modules of parts."""
        return slotted_places(self.modules())

    def likeness(self) -> Any:
        """Return a value that is equal for layers that differ in nothing but their names."""
        return type(self), self.quant_method, replace(self.shape, parts=("",) * len(self.shape.parts))

    def shares(self, rank: int, size: int) -> Iterable[tuple[LinearMethodBase, LinearShape]]:
        """Return the method of each weight, and a rank's share.  ShardingError if `size` ranks cannot divide it."""
        shape, held = self.shape_for(rank, size, self.shape.parts), self.held()
        return [(w.method, shape if len(held) == 1 else shape.part(i)) for i, w in enumerate(held)]

    def names(self) -> tuple[str, ...]:
        """Return the names by which rules, decisions and adapters know the parts."""
        return self.shape.parts

    def parts(self) -> Iterable[HeldPart]:
        """Return every part under its checkpoint name."""
        names = dict(zip(self.shape.parts, self.names(), strict=True))
        return [
            HeldPart(names[part], part, self.kind, weight.method, shape.part(index), weight.stored_in)
            for weight, shape in self._weights()
            for index, part in enumerate(shape.parts)
        ]

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the packed weights: one, or one for each part where their methods differ."""
        if not isinstance(self.quant_method, SplitLinearMethod):
            stored_in = self.tied_to if self.shares_table and self.tied_to is not None else self
            return (HeldWeight(self.quant_method, self.shape, self.operation, stored_in, self),)
        return tuple(
            HeldWeight(holder.quant_method, holder.shape, self.operation, holder, holder)
            for holder in self.quant_method.holders(self)
        )

    def _weights(self) -> Iterator[tuple[HeldWeight, LinearShape]]:
        """Yield the packed weights with their shapes."""
        for weight in self.held():
            assert isinstance(weight.shape, LinearShape)
            yield weight, weight.shape

    @property
    def borrows_from(self) -> WeightedLayer | None:
        """The layer whose packed weight this layer runs too; None: it has its own."""
        return self.tied_to if self.shares_table else None

    @property
    def split(self) -> bool:
        """True where the layer keeps separate weights, as its parts have different methods."""
        return len(self.held()) > 1

    def _bound(
        self, weight: HeldWeight, shape: LinearShape, binder: Binder, size: int | None = None
    ) -> tuple[BoundWeight, int]:
        """Bind a weight without its data.  Returns it, and its bytes: 0 where they are those of another layer.

        size: of how many ranks `shape` is the first one's share; None: it is this rank's own.
        """
        bound, table = binder.linear(weight.method, shape, weight.operation), self.borrows_from
        if table is not None:
            share = table.shape if size is None else table.shape_for(0, size, table.shape.parts)
            other = binder.linear(weight.method, share, table.operation)
            if other.selection.kernel.layout == bound.selection.kernel.layout:
                return bound, 0
        return bound, bound.nbytes

    def describe(self, binder: Binder) -> Iterable[Description]:
        """Describe each part for a plan."""
        names = dict(zip(self.shape.parts, self.names(), strict=True))
        for weight, shape in self._weights():
            bound, nbytes = self._bound(weight, shape, binder)
            kernel = bound.selection.kernel
            for index, part in enumerate(shape.parts):
                alone = shape.part(index)
                yield Description(
                    names[part],
                    self.kind,
                    weight.method,
                    weight.method.describe(),
                    bound.selection,
                    kernel.numerics(bound.problem),
                    bound.rounds_activations,
                    (alone.out_features, alone.in_features),
                    (alone.out_features_local, alone.in_features_local),
                    nbytes=nbytes * alone.out_features_local // max(shape.out_features_local, 1),
                    fused_with=tuple(other for other in shape.parts if other != part),
                    tied_to=None if self.borrows_from is None else self.borrows_from.prefix,
                )

    def selections(self, binder: Binder | None = None) -> Iterable[Selection[Any]]:
        """Yield the kernel of each weight."""
        for weight, shape in self._weights():
            bound = bound_weight(weight.packed_in)
            if bound is None and binder is not None:
                bound = binder.linear(weight.method, shape, weight.operation)
            if bound is not None:
                yield bound.selection

    def kept_bytes(self) -> int:
        """Return the bytes of the parameters that stay as they are, on this rank."""
        kept = (self._parameters.get(name) for name in self.kept)
        return sum(param.nbytes for param in kept if param is not None)

    def packed_bytes(self, binder: Binder) -> int:
        """Return the bytes of the packed weights on this rank, without a table that another layer counts."""
        return sum(self._bound(weight, shape, binder)[1] for weight, shape in self._weights())

    def bytes_at(self, size: int, binder: Binder) -> int:
        """Return the bytes of the weights on the first of `size` ranks."""
        here, there = self.shape, self.shape_for(0, size, self.shape.parts)
        # What is kept (biases) follows the outputs.
        kept = self.kept_bytes() * there.out_features_local // max(here.out_features_local, 1)
        shares = zip(self.held(), self.shares(0, size), strict=True)
        return kept + sum(self._bound(weight, share, binder, size)[1] for weight, (_, share) in shares)

    def converting_bytes(self) -> int:
        """Return the bytes that packing takes beside the stored tensors.

        A byte an element for the canonical codes; between two formats also twice the float32 weight, as one copy is
        being rounded to another.
        """
        converts = any(isinstance(weight.method, ConvertedLinearMethod) for weight in self.held())
        return self.shape.in_features_local * self.shape.out_features_local * (9 if converts else 1)

    def finish(self) -> None:
        """Convert and pack what has been loaded.  A second call does nothing."""
        self.quant_method.process_weights_after_loading(self)

    def loaded_bytes(self) -> int:
        """Return the bytes of the packed weights, once loaded, without a table that another layer counts."""
        bound = [] if self.borrows_from else [bound_weight(weight.packed_in) for weight in self.held()]
        return sum(weight.nbytes for weight in bound if weight is not None)

    def trials(self, stored: Callable[[HeldWeight], Mapping[str, Tensor]]) -> Iterable[Trial]:
        """Make a check of each packed weight."""
        for weight, shape in self._weights():
            name = shape.name if self.tied_to is None else self.prefix
            yield self._trial(name, weight, shape, stored(weight))

    def _trial(
        self, name: str, weight: HeldWeight, shape: LinearShape, stored: Mapping[str, Tensor]
    ) -> Trial:
        method, bound = weight.method, bound_weight(weight.packed_in)
        assert bound is not None
        problem, device = bound.problem, bound.problem.device.torch_device
        expected = source = method.source_method().to_canonical(stored, shape)
        original = None
        if isinstance(method, ConvertedLinearMethod):
            expected = method.target.quantize(source.dequantize(torch.float32), shape)
            original = source.dequantize(torch.float64)
        wanted = expected.dequantize(torch.float64)
        decoded = bound.canonical().dequantize(torch.float64).cpu()

        def answer(generator: torch.Generator, magnitude: float) -> tuple[Tensor, Tensor]:
            if weight.operation == "embedding":
                ids = torch.randint(0, wanted.shape[0], (TRIAL_ROWS,), generator=generator)
                return bound.run(ids.to(device)), wanted[ids]
            x = torch.randn((TRIAL_ROWS, wanted.shape[1]), generator=generator, dtype=torch.float32)
            x = (x * magnitude).to(problem.dtype)
            return bound.run(x.to(device), None), x.double() @ wanted.t()

        weights = [(wanted, original, decoded)]
        return Trial(name, self.kind, method.describe(), bound, weights, MAGNITUDES, answer)

    def packed_state(self) -> LayerState:
        """Return the methods and the packed weights that run now."""
        return LayerState.of(self)

    def swapped(
        self, methods: Sequence[LinearMethodBase], staged: Mapping[WeightHolder, HolderState]
    ) -> LayerState:
        """Make the state with other methods, one for each part, and leave the layer as it is."""
        return restage(self, LayerState.of(self), methods)


def weighted_layers(model: nn.Module) -> Iterator[WeightedLayer]:
    """Yield the linear layers, embeddings and heads of a model, in its order."""
    for module in model.modules():
        if isinstance(module, WeightedLayer):
            yield module
