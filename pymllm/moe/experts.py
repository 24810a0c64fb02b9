"""The experts of one layer that this rank holds: where their tensors are, which method they have, how they run."""

# T tokens, K experts a token, E experts held here, H hidden size, I intermediate size of one expert

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pymllm.config import Execution, current_execution
from pymllm.errors import CheckpointError
from pymllm.kernels.experts import ExpertsBias
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.experts import BoundExperts, ExpertsMethod, Product
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, Written, place_experts
from pymllm.weights.spec import FLOATS, OUT, ExpertsShape, LinearShape, Span, WeightSpec

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
STACKED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertsLayout:
    """How a checkpoint stores the experts below `prefix` ("model.layers.0.mlp.experts", say).

    names: of gate, up and down, each below an expert's index; or, stacked, of gate and up together and of down.
    """

    prefix: str
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return len(self.names) == 2

    @classmethod
    def find(cls, prefix: str, quant_config: QuantizationConfig | None) -> ExpertsLayout:
        """The layout that the checkpoint's tensors have; without any, one name an expert, as most have it.

        CheckpointError where some tensors are an expert's own and others hold all experts (FAULTS 25).
        """
        modules = frozenset() if quant_config is None else quant_config.stored_modules
        single = next(
            (names for names in SPELLINGS if any(f"{prefix}.0.{name}" in modules for name in names)), None
        )
        stacked = [f"{prefix}.{name}" for name in STACKED if f"{prefix}.{name}" in modules]
        if single is not None and stacked:
            assert quant_config is not None
            first = next(name for name in quant_config.stored if name.startswith(stacked[0]))
            raise CheckpointError(
                "the tensor holds all experts of the layer, but other tensors of them are stored for each expert",
                code="experts-layout",
                tensor=first,
                expected=f"all of {prefix}.0.{single[0]} and so on, or all of {stacked[0]}",
                found="both",
                fix="The tool that wrote this checkpoint fused some tensors and not others; quantise it again.",
            )
        if stacked:
            return cls(prefix, STACKED)
        return cls(prefix, single or SPELLINGS[0])

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The names of the parts of each product, with "{}" for an expert's index."""
        if self.stacked:
            return {
                "gate_up": (f"{self.prefix}.{self.names[0]}",),
                "down": (f"{self.prefix}.{self.names[1]}",),
            }
        gate, up, down = (f"{self.prefix}.{{}}.{name}" for name in self.names)
        return {"gate_up": (gate, up), "gate": (gate,), "up": (up,), "down": (down,)}


@dataclass(frozen=True)
class ExpertsSize:
    """What a config says of the experts.

    bias: whether each product has one.  interleaved, transposed: how a tensor of all experts is stored, see
    `ExpertsShape` and `UnquantizedLinearMethod`.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: GatedActivation
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False


class Experts(nn.Module):
    """Experts that have one `quant_method` and run together.

    ids: which of the layer's experts these are; others of the layer may have another method, or another rank.
    tensor_parallel: whether this rank has a share of each; else it has them whole.
    """

    kind = "linear"
    operation = "experts"

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
        self.products = nn.ModuleDict()
        quant_method.create_weights(self, self.shapes(self.parallel.rank, self.parallel.size))
        self._add_biases()

    @property
    def empty(self) -> bool:
        """Whether this rank holds none."""
        return not self.ids

    def execution_or_default(self) -> Execution:
        return self.execution or Execution(dtype=self.params_dtype)

    def shapes(self, rank: int, size: int) -> dict[str, ExpertsShape]:
        """The shape of each product, and a rank's share of it.  ShardingError if there is none."""
        what, hidden = f"{self.prefix}, intermediate size", Span.full(self.size.hidden_size)
        if not self.tensor_parallel:
            rank, size = 0, 1
        share = Span.even(self.size.intermediate_size, rank, size, what)
        parts = self.layout.parts()
        interleaved = 2 if self.size.interleaved and self.layout.stacked else 0
        shapes = {}
        for product in self.quant_method.methods():
            outputs: tuple[Span, ...] = (hidden,) if product == "down" else (share,) * len(parts[product])
            names = parts[product]
            if product == "gate_up" and self.layout.stacked:
                total = 2 * share.total
                up = Span(share.total + share.start, share.total + share.stop, total)
                outputs = (replace(share, total=total), up)
                # One span where its outputs lie together in the file: all of them, or a share of interleaved ones.
                if interleaved or size == 1:
                    outputs = (Span(2 * share.start, 2 * share.stop, total),)
            inputs = share if product == "down" else hidden
            one = LinearShape(inputs, outputs, names, self.params_dtype)
            turns = interleaved if product == "gate_up" else 0
            shapes[product] = ExpertsShape(one, self.ids, self.size.num_experts, self.layout.stacked, turns)
        return shapes

    def shares(self, rank: int, size: int) -> Iterator[tuple[LinearMethodBase, LinearShape]]:
        """The method of each product, and one expert's share of it on a rank."""
        methods = self.quant_method.methods()
        return ((methods[name], shape.one) for name, shape in self.shapes(rank, size).items())

    def slots(self) -> Iterator[Slot]:
        """Where every tensor of these experts goes."""
        return (slot for param in self.parameters() for slot in param.slots)  # type: ignore[attr-defined]

    def local_shares(self) -> list[tuple[LinearMethodBase, LinearShape]]:
        """The same for this rank."""
        return list(self.shares(self.parallel.rank, self.parallel.size))

    def products_of(self) -> dict[str, Product]:
        return dict(self.products.items())  # type: ignore[arg-type]

    def names_by_product(self) -> Iterator[tuple[str, str]]:
        """Every weight here: its product, and its checkpoint name."""
        for product, module in self.products_of().items():
            for name in dict.fromkeys(module.shape.one.parts):
                for expert in self.ids[:1] if self.layout.stacked else self.ids:
                    yield product, name.format(expert)

    def parts_held(self) -> Iterator[tuple[str, LinearMethodBase, LinearShape]]:
        """Every weight here by its checkpoint name: its product's method, and its shape alone."""
        for product in self.products_of().values():
            one = product.shape.one
            names = dict.fromkeys(one.parts)
            for expert in self.ids[:1] if self.layout.stacked else self.ids:
                for index, name in enumerate(names):
                    shape = one.part(index) if len(one.parts) == len(names) else one
                    yield name.format(expert), product.quant_method, shape

    def _add_biases(self) -> None:
        """gate_up_bias [E, 2·I] and down_bias [E, H], where the experts have them."""
        self._bias_shapes: dict[str, ExpertsShape] = {}
        if not self.size.bias:
            return
        assert "gate_up" in self.products, "experts with biases keep gate and up in one weight"
        for name, product in self.products_of().items():
            spec = WeightSpec("bias", self.params_dtype, (OUT,), accepts=FLOATS)
            local, slots = place_experts(spec, product.shape)
            param = nn.Parameter(torch.empty(local, dtype=self.params_dtype), requires_grad=False)
            param.slots, param.written = slots, Written()  # type: ignore[attr-defined]
            self.register_parameter(f"{name}_bias", param)
            self._bias_shapes[name] = product.shape

    def process_weights_after_loading(self) -> None:
        """Pack what has been loaded; once."""
        if self.bound is None:
            for name, shape in self._bias_shapes.items():
                param = getattr(self, f"{name}_bias")
                spec = WeightSpec("bias", param.dtype, (OUT,))
                param.data = torch.stack([shape.in_order(spec, row) for row in param.data]).contiguous()
        self.quant_method.process_weights_after_loading(self)

    def bias(self) -> ExpertsBias:
        """The biases that this rank adds: down's, which the ranks' sum must have once, on the first alone."""
        if not self._bias_shapes:
            return ExpertsBias()
        first = not self.tensor_parallel or self.parallel.rank == 0
        return ExpertsBias(self.gate_up_bias, self.down_bias if first else None)  # type: ignore[arg-type]

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x: [T, H]; topk_ids: [T, K], indexes in the checkpoint, other experts' too; topk_weights: [T, K] float32.

        Returns [T, H]: each token's weighted sum over its experts that are here. The ranks' sums are the caller's.
        """
        return self.quant_method.apply(self, x, self.positions(topk_ids), topk_weights)

    def positions(self, topk_ids: Tensor) -> Tensor:
        """Positions among the experts here; -1 for others."""
        if self.ids == tuple(range(self.size.num_experts)):
            return topk_ids
        table = torch.full((self.size.num_experts,), -1, dtype=torch.int64)
        table[list(self.ids)] = torch.arange(len(self.ids))
        return table.to(topk_ids.device)[topk_ids]

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
) -> tuple[list[Experts], list[Experts]]:
    """The experts `held` of the layer's, and the others, in groups of one method each: nearly always one group.

    The others are for accounting alone: a rank checks that the checkpoint has what other ranks will read.
    """
    layout = ExpertsLayout.find(prefix, quant_config)
    probe = _Probe(layout.stacked and size.transposed)
    methods: dict[int, ExpertsMethod] = {}
    for expert in range(size.num_experts):  # all of them: rules are checked against every name on every rank
        methods[expert] = _method(layout, expert, quant_config, probe)
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
    return [e for (here, _), e in made.items() if here], [e for (here, _), e in made.items() if not here]


class _Probe(nn.Module):
    """What a format is asked about, before there is a layer."""

    kind = "linear"

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed


def _method(
    layout: ExpertsLayout, expert: int, quant_config: QuantizationConfig | None, probe: _Probe
) -> ExpertsMethod:
    def of(product: str) -> list[LinearMethodBase]:
        names = [part.format(expert) for part in layout.parts()[product]]
        found = [
            None if quant_config is None else quant_config.get_quant_method(probe, name) for name in names
        ]
        return [method or UnquantizedLinearMethod(probe.transposed) for method in found]

    gate_up, (down,) = of("gate_up"), of("down")
    alike = len(set(gate_up)) == 1 and (len(gate_up) == 1 or gate_up[0].fuses)
    return ExpertsMethod(tuple(gate_up[:1] if alike else gate_up), down)
