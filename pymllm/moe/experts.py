"""The experts of one layer that this rank holds: the places of their tensors, their method, and how they run."""

# T tokens, K experts a token, E experts held here, H hidden size, I intermediate size of one expert

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution, current_execution
from pymllm.errors import CheckpointError
from pymllm.kernels.experts import ExpertsBias
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.registry import Operation, Selection
from pymllm.layers.held import (
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
from pymllm.moe.swapped import ExpertsState, restage_experts
from pymllm.moe.trial import experts_trial
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.experts import BoundExperts, ExpertsMethod, Product, bind_experts
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, place_experts, track
from pymllm.weights.spec import FLOATS, OUT, ExpertsShape, LinearShape, Span, WeightSpec

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
STACKED = ("gate_up_proj", "down_proj")
# mlx-lm stacks gate and up apart, mostly below another name than the model's own: model.layers.0.mlp.switch_mlp.
STACKED_APART = ("gate_proj", "up_proj", "down_proj")
SWITCH = "switch_mlp"


@dataclass(frozen=True)
class ExpertsLayout:
    """The layout in which a checkpoint stores the experts below `prefix` ("model.layers.0.mlp.experts", for example).

    names: three, of gate, up and down; or two, of gate and up together and of down; or of up and down.
    stacked: whether a tensor holds all experts; else the names stand below an expert's index.
    gated: whether experts have a gate.
    """

    prefix: str
    names: tuple[str, ...]
    stacked: bool = False
    gated: bool = True

    @property
    def joined(self) -> bool:
        """True where gate and up lie in one tensor."""
        return self.gated and len(self.names) == 2

    @classmethod
    def find(cls, prefix: str, quant_config: QuantizationConfig | None, gated: bool = True) -> ExpertsLayout:
        """Find the layout that the checkpoint's tensors have; without any tensors, the usual one: names by expert.

        gated: whether experts have a gate.

        CheckpointError where some tensors are an expert's own and others hold all experts (FAULTS 25).
        """
        modules = frozenset() if quant_config is None else quant_config.stored_modules
        parent, apart = prefix.rpartition(".")[0], STACKED_APART if gated else STACKED_APART[1:]
        for place in (f"{parent}.{SWITCH}" if parent else SWITCH, prefix):
            if any(f"{place}.{name}" in modules for name in apart[:-1]):
                return cls(place, apart, True, gated)
        spellings = SPELLINGS if gated else tuple(names[1:] for names in SPELLINGS)
        single = next(
            (names for names in spellings if any(f"{prefix}.0.{name}" in modules for name in names)), None
        )
        stacked = [f"{prefix}.{name}" for name in STACKED if f"{prefix}.{name}" in modules]
        if single is not None and stacked:
            assert quant_config is not None
            first = next(name for name in quant_config.stored if name.startswith(stacked[0]))
            raise CheckpointError(
                "the tensor holds all experts of the layer, but other tensors of that layer hold one expert each",
                code="experts-layout",
                tensor=first,
                expected=f"all of {prefix}.0.{single[0]} and so on, or all of {stacked[0]}",
                found="both",
                fix="The tool that wrote this checkpoint fused some tensors and not others; quantise it again.",
            )
        if stacked and gated:
            return cls(prefix, STACKED, True)
        return cls(prefix, single or spellings[0], gated=gated)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the names of each product's parts, with "{}" for an expert's index."""
        if self.joined:
            return {
                "gate_up": (f"{self.prefix}.{self.names[0]}",),
                "down": (f"{self.prefix}.{self.names[1]}",),
            }
        below = self.prefix if self.stacked else f"{self.prefix}.{{}}"
        if not self.gated:
            up, down = (f"{below}.{name}" for name in self.names)
            return {"gate_up": (up,), "down": (down,)}
        gate, up, down = (f"{below}.{name}" for name in self.names)
        return {"gate_up": (gate, up), "gate": (gate,), "up": (up,), "down": (down,)}


@dataclass(frozen=True)
class ExpertsSize:
    """The size of a layer's experts, and what else a config says of them.

    bias: whether each product has one.  interleaved, transposed: the order in which a tensor of all experts is stored,
    see `ExpertsShape` and `UnquantizedLinearMethod`.  gated: whether there is a gate; else the first product is up.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: GatedActivation
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    gated: bool = True


class Experts(WeightHolder):
    """Experts that have one `quant_method` and run together.

    ids: the indices of these experts in the layer; its other experts have another method, or are on another rank.
    tensor_parallel: whether this rank has a share of each expert; else it has them whole.
    """

    # For formats, which know each weight of an expert as that of a linear layer.
    kind: ClassVar[str] = "linear"
    operation: ClassVar[Operation] = "experts"
    # The groups of other ranks, which are never loaded here: they say which tensors those ranks will read.
    elsewhere: tuple[Experts, ...] = ()

    def __init__(
        self,
        size: ExpertsSize,
        layout: ExpertsLayout,
        ids: Sequence[int],
        quant_method: ExpertsMethod,
        *,
        tensor_parallel: bool = True,
        params_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.layout, self.ids, self.tensor_parallel = size, layout, tuple(ids), tensor_parallel
        self.parallel, self.execution = current_parallel(), current_execution()
        self.prefix, self.activation, self.quant_method = layout.prefix, size.activation, quant_method
        self.params_dtype = params_dtype or (
            self.execution.dtype if self.execution else torch.get_default_dtype()
        )
        self.bound: BoundExperts | None = None
        self._tables: dict[torch.device, Tensor] = {}  # of `positions`
        self.products = nn.ModuleDict()
        quant_method.create_weights(self, self.shapes(self.parallel.rank, self.parallel.size))
        self._add_biases()

    @property
    def empty(self) -> bool:
        """True where the group has no experts, as a rank may have none."""
        return not self.ids

    def execution_or_default(self) -> Execution:
        """Return the execution that the experts were made for; outside of one, their dtype on a CPU."""
        return self.execution or Execution(dtype=self.params_dtype)

    def shapes(self, rank: int, size: int) -> dict[str, ExpertsShape]:
        """Return the shape of each product with a rank's share.  ShardingError if `size` ranks cannot divide it."""
        what, hidden = f"{self.prefix}, intermediate size", Span.full(self.size.hidden_size)
        if not self.tensor_parallel:
            rank, size = 0, 1
        share = Span.even(self.size.intermediate_size, rank, size, what)
        parts = self.layout.parts()
        interleaved = 2 if self.size.interleaved and self.layout.joined else 0
        shapes = {}
        for product in self.quant_method.methods():
            outputs: tuple[Span, ...] = (hidden,) if product == "down" else (share,) * len(parts[product])
            names = parts[product]
            if product == "gate_up" and self.layout.joined:
                total = 2 * share.total
                up = Span(share.total + share.start, share.total + share.stop, total)
                outputs = (replace(share, total=total), up)
                # One span where these outputs lie together in the file: all of them, or a share of interleaved ones.
                if interleaved or size == 1:
                    outputs = (Span(2 * share.start, 2 * share.stop, total),)
            inputs = share if product == "down" else hidden
            one = LinearShape(inputs, outputs, names, self.params_dtype)
            turns = interleaved if product == "gate_up" else 0
            shapes[product] = ExpertsShape(one, self.ids, self.size.num_experts, self.layout.stacked, turns)
        return shapes

    def products_of(self) -> dict[str, Product]:
        """Return the products by name: gate_up (or gate and up), and down."""
        return dict(self.products.items())  # type: ignore[arg-type]

    # What a holder of weights answers: see `pymllm.layers.held`

    @property
    def loads(self) -> bool:
        """True: a group without experts also takes part, for the tensors that other ranks hold."""
        return True

    def places(self, name: str) -> Iterator[Place]:
        """Yield the place of every tensor, also of those in the modules of products."""
        return slotted_places(self.modules())

    def slots_elsewhere(self) -> Iterator[Slot]:
        """Yield the slots of the experts that other ranks hold."""
        return (place.slot for group in self.elsewhere for place in group.places(""))

    def likeness(self) -> Any:
        """Return a value that is equal for layers that differ in nothing but their names."""
        return self.quant_method, self.size, self.tensor_parallel

    def shares(self, rank: int, size: int) -> Iterable[tuple[LinearMethodBase, LinearShape]]:
        """Return the method of each product, and one expert's share of it on a rank."""
        methods = self.quant_method.methods()
        return [(methods[name], shape.one) for name, shape in self.shapes(rank, size).items()]

    def parts(self) -> Iterator[HeldPart]:
        """Yield every weight that a rule can name; of stacked experts one for all of them."""
        for product in self.products_of().values():
            one, method = product.shape.one, product.quant_method
            names = dict.fromkeys(one.parts)
            for expert in self.ids[:1] if self.layout.stacked else self.ids:
                for index, part in enumerate(names):
                    shape = one.part(index) if len(one.parts) == len(names) else one
                    name = part.format(expert)
                    yield HeldPart(name, name, "experts", method, shape, product, self.layout.stacked)

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the products of all experts here, which are packed together."""
        return tuple(
            HeldWeight(product.quant_method, product.shape, "experts", product, self)
            for product in self.products_of().values()
        )

    def methods(self) -> Iterable[LinearMethodBase]:
        """Return the distinct methods of the products."""
        return dict.fromkeys(self.quant_method.methods().values())

    def _planned(self, binder: Binder, size: int | None = None) -> BoundExperts:
        """Bind the experts without their data.  size: as the first of so many ranks; None: as this one."""
        rank, size = (self.parallel.rank, self.parallel.size) if size is None else (0, size)
        shapes, method, execution = self.shapes(rank, size), self.quant_method, self.execution_or_default()
        alike = tuple((shape.one.inputs, shape.one.outputs) for shape in shapes.values())
        key = (method, len(self.ids), self.activation, self.layout.stacked, alike)
        return binder.once(key, lambda: bind_experts(method.planned(shapes), self.activation, execution))

    def describe(self, binder: Binder) -> Iterator[Description]:
        """Describe each weight for a plan."""
        if self.empty:
            return
        bound = self._planned(binder)
        problem, numerics = bound.problem, bound.selection.kernel.numerics(bound.problem)
        elements = sum(linear.in_features * linear.out_features for linear in problem.products().values())
        elements *= problem.num_experts
        together = len(self.ids) if self.layout.stacked else 1
        rounds = bound.rounds_activations
        for part in self.parts():
            local = (part.shape.out_features_local, part.shape.in_features_local)
            yield Description(
                part.name,
                part.kind,
                part.method,
                part.method.describe(),
                bound.selection,
                numerics,
                rounds,
                (part.shape.out_features, part.shape.in_features),
                local,
                nbytes=bound.nbytes * math.prod(local) * together // max(elements, 1),
            )

    def selections(self, binder: Binder | None = None) -> Iterator[Selection[Any]]:
        """Yield the kernel of the experts; nothing for a group without experts."""
        bound = self.bound
        if bound is None and binder is not None and not self.empty:
            bound = self._planned(binder)
        if bound is not None:
            yield bound.selection

    def packed_bytes(self, binder: Binder) -> int:
        """Return the bytes of the packed experts on this rank."""
        return 0 if self.empty else self._planned(binder).nbytes

    def bytes_at(self, size: int, binder: Binder) -> int:
        """Return the bytes of the experts on the first of `size` ranks; whole ones, as evenly as they divide."""
        kept, here = self.kept_bytes(), self.parallel.size
        if self.empty or not self.tensor_parallel:
            return (self.packed_bytes(binder) + kept) * here // size
        whole = self.get_parameter("down_bias").nbytes if kept else 0  # every rank holds all of down's bias
        return self._planned(binder, size).nbytes + whole + (kept - whole) * here // size

    def converting_bytes(self) -> int:
        """Return the bytes that converting one product of one expert takes at most, beside the stored tensors.

        Experts are converted one at a time.  For each element four bytes; nine between two formats, as in
        `WeightedLayer.converting_bytes`.
        """
        return max(
            shape.in_features_local
            * shape.out_features_local
            * (9 if isinstance(method, ConvertedLinearMethod) else 4)
            for method, shape in self.shares(self.parallel.rank, self.parallel.size)
        )

    def loaded_bytes(self) -> int:
        """Return the bytes of the packed experts, once loaded."""
        return 0 if self.bound is None else self.bound.nbytes

    def trials(self, stored: Callable[[HeldWeight], Mapping[str, Tensor]]) -> Iterator[Trial]:
        """Make one check: of every packed weight, and of each expert's answers to rows routed to it alone."""
        if not self.empty:
            yield experts_trial(self, stored)

    def packed_state(self) -> ExpertsState:
        """Return the methods and the packed experts that run now."""
        return ExpertsState.of(self)

    def swapped(
        self, methods: Sequence[LinearMethodBase], staged: Mapping[WeightHolder, HolderState]
    ) -> ExpertsState:
        """Make the state with other methods, one for each of `parts()`, and leave the experts as they are."""
        return restage_experts(self, methods)

    def _add_biases(self) -> None:
        """Register gate_up_bias [E, 2·I], or one of gate and one of up, and down_bias [E, H], if there are any."""
        self._bias_shapes: dict[str, ExpertsShape] = {}
        if not self.size.bias:
            return
        for name, product in self.products_of().items():
            spec = WeightSpec("bias", self.params_dtype, (OUT,), accepts=FLOATS)
            local, slots = place_experts(spec, product.shape)
            param = nn.Parameter(torch.empty(local, dtype=self.params_dtype), requires_grad=False)
            track(param, slots)
            self.register_parameter(f"{name}_bias", param)
            self._bias_shapes[name] = product.shape

    def finish(self) -> None:
        """Pack what has been loaded.  A second call does nothing."""
        if self.bound is None:
            for name, shape in self._bias_shapes.items():
                param = getattr(self, f"{name}_bias")
                spec = WeightSpec("bias", param.dtype, (OUT,))
                param.data = torch.stack([shape.in_order(spec, row) for row in param.data]).contiguous()
        self.quant_method.process_weights_after_loading(self)
        if self.bound is not None and not self.empty:
            self._table(next(iter(self.bound.packed.values())).device)

    def bias(self) -> ExpertsBias:
        """Return the biases that this rank adds.  Rank 0 alone adds down's, so that the ranks' sum has it once."""
        if not self._bias_shapes:
            return ExpertsBias()
        first = not self.tensor_parallel or self.parallel.rank == 0
        if "gate_up" in self._bias_shapes:
            gate_up: Any = self.gate_up_bias
        else:
            gate_up = torch.cat((self.gate_bias, self.up_bias), dim=1)  # type: ignore[arg-type]
        return ExpertsBias(gate_up, self.down_bias if first else None)  # type: ignore[arg-type]

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute each token's weighted sum over those of its experts that are here.

        x: [T, H].  topk_ids: [T, K], indices in the layer, also of experts that are not here.
        topk_weights: [T, K] float32.  Returns [T, H]; the caller adds up the sums of ranks.
        """
        return self.quant_method.apply(self, x, self.positions(topk_ids), topk_weights)

    def positions(self, topk_ids: Tensor) -> Tensor:
        """Turn indices in the layer into positions among the experts here; -1: not here."""
        if self.ids == tuple(range(self.size.num_experts)):
            return topk_ids
        return self._table(topk_ids.device)[topk_ids]

    def _table(self, device: torch.device) -> Tensor:
        """Return the positions by index in the layer, made once for a device: a captured step cannot copy them."""
        if device not in self._tables:
            # One element more than there are experts, for the index -1 of an expert that is nowhere.
            table = torch.full((self.size.num_experts + 1,), -1, dtype=torch.int64, device="cpu")
            table[list(self.ids)] = torch.arange(len(self.ids), device="cpu")
            self._tables[device] = table.to(device)
        return self._tables[device]

    def extra_repr(self) -> str:
        return f"experts={len(self.ids)}/{self.size.num_experts}, method={self.quant_method.describe()}"


def make_experts(
    size: ExpertsSize,
    prefix: str,
    held: Sequence[int],
    quant_config: QuantizationConfig | None,
    *,
    tensor_parallel: bool = True,
    params_dtype: torch.dtype | None = None,
) -> list[Experts]:
    """Make the experts of the indices `held`, in groups of one method each: nearly always one group.

    The first group knows the layer's other experts, which other ranks hold (`elsewhere`), so that every rank checks
    that the checkpoint has their tensors.
    """
    layout = ExpertsLayout.find(prefix, quant_config, size.gated)
    probe = _Probe((layout.joined or (layout.stacked and not size.gated)) and size.transposed)
    methods: dict[int, ExpertsMethod] = {}
    # All experts, not only those held: on every rank, rules are checked against every name.
    for expert in range(size.num_experts):
        methods[expert] = _method(layout, expert, quant_config, probe, size)
        if layout.stacked:
            methods = dict.fromkeys(range(size.num_experts), methods[expert])
            break
    others = () if layout.stacked else [expert for expert in methods if expert not in held]
    groups: dict[tuple[bool, ExpertsMethod], list[int]] = {} if held else {(True, methods[0]): []}
    for here, experts in ((True, held), (False, others)):
        for expert in experts:
            groups.setdefault((here, methods[expert]), []).append(expert)
    made = {
        (here, method): Experts(
            size, layout, ids, method, tensor_parallel=tensor_parallel, params_dtype=params_dtype
        )
        for (here, method), ids in groups.items()
    }
    groups_here = [group for (here, _), group in made.items() if here]
    groups_here[0].elsewhere = tuple(group for (here, _), group in made.items() if not here)
    return groups_here


class _Probe(nn.Module):
    """A stand-in for the layer that a format is asked about, before there is one."""

    kind = "linear"
    in_features = out_features = 0  # of one part of the product that is asked about

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed


def _method(
    layout: ExpertsLayout,
    expert: int,
    quant_config: QuantizationConfig | None,
    probe: _Probe,
    size: ExpertsSize,
) -> ExpertsMethod:
    def of(product: str) -> list[LinearMethodBase]:
        sides = size.hidden_size, size.intermediate_size
        probe.in_features, probe.out_features = sides[::-1] if product == "down" else sides
        names = [part.format(expert) for part in layout.parts()[product]]
        found = [
            None if quant_config is None else quant_config.get_quant_method(probe, name) for name in names
        ]
        return [method or UnquantizedLinearMethod(probe.transposed) for method in found]

    gate_up, (down,) = of("gate_up"), of("down")
    alike = len(set(gate_up)) == 1 and (len(gate_up) == 1 or gate_up[0].fuses)
    return ExpertsMethod(tuple(gate_up[:1] if alike else gate_up), down)
