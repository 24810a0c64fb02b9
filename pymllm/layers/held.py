"""The one protocol of whatever holds weights: `WeightHolder`.

Planning, loading, verifying, swapping and writing walk the holders of a model and ask them, and know no kind of layer.
A linear layer, an embedding, a head, the experts of a layer, an attention layer (its KV cache and scales) and a norm
each say here where their tensors go, how they are divided over ranks, what they hold, which kernels run it, what
finishes loading, what proves it right, and how another method takes its place. A new kind of layer is one file that
answers these questions; what it leaves unanswered is answered for plain parameters, which every rank holds in full.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.kernels.registry import Operation, Selection
from pymllm.quantization.binding import BoundWeight, bind
from pymllm.quantization.experts import BoundExperts
from pymllm.quantization.kv_cache import KVCacheMethodBase
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, place
from pymllm.weights.spec import FLOATS, ExpertsShape, LinearShape, Span, WeightSpec, whole

Bound = BoundWeight | BoundExperts
TRIAL_ROWS = 5  # of inputs, for each weight


@dataclass(frozen=True)
class Place:
    """A slot of the checkpoint, and the parameter (or buffer) `param` of `module` that it fills a part of."""

    module: nn.Module
    param: str
    slot: Slot


@dataclass(frozen=True)
class HeldPart:
    """One weight under a checkpoint name of its own; a fused layer has several.

    name: in rules, decisions and plans.  stored: what its tensors' names begin with: another name where a head is
    tied.  kind: as in a plan.  shape: of this weight alone.  module: has its parameters.
    stacked: its tensors hold this weight of every expert.
    """

    name: str
    stored: str
    kind: str
    method: LinearMethodBase
    shape: LinearShape
    module: nn.Module
    stacked: bool = False


@dataclass(frozen=True)
class HeldWeight:
    """One packed weight, or one product of all experts.

    operation: the one that kernels run it for.  stored_in: the module whose parameters, as the checkpoint stores them,
    it is packed from.  packed_in: the module whose `bound` it then is.
    """

    method: LinearMethodBase
    shape: LinearShape | ExpertsShape
    operation: Operation
    stored_in: nn.Module
    packed_in: nn.Module


@dataclass(frozen=True)
class Description:
    """What a plan says of one weight, or of one layer's KV cache: see `pymllm.planning.plan.PlannedLayer`."""

    name: str
    kind: str
    method: LinearMethodBase | KVCacheMethodBase
    method_detail: str
    selection: Selection[Any]
    numerics: str
    rounds_activations: bool
    shape: tuple[int, ...]
    shape_local: tuple[int, ...]
    nbytes: int = 0
    fused_with: tuple[str, ...] = ()
    tied_to: str | None = None
    kv_bytes_per_token: int = 0


@dataclass(frozen=True)
class Trial:
    """A check of a kernel against float64 over the checkpoint's own tensors.

    weights: for each weight (for each expert of each product), in float64: what the method makes of the stored tensors,
    what they say themselves where that is something else, and what the packed weight decodes to.
    magnitudes: of the inputs, by the label of the error.
    answer: the kernel's result and the float64 one, for inputs of a magnitude; to be asked once `weights` is used up.
    """

    name: str
    kind: str
    method: str
    bound: Bound
    weights: Iterable[tuple[Tensor, Tensor | None, Tensor]]
    magnitudes: Mapping[str, float]
    answer: Callable[[torch.Generator, float], tuple[Tensor, Tensor]]


class HolderState(Protocol):
    """All that a swap changes of a holder: its methods and its packed weights."""

    @property
    def layer(self) -> WeightHolder: ...

    @property
    def rearranged(self) -> bool:
        """Whether stored tensors are read into other modules than when the layer was built."""

    def same_as(self, other: Any) -> bool:
        """Return whether these are the very same tensors in the same methods."""

    def packed(self) -> Sequence[Bound]:
        """Return the packed weights."""

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the weights as they are stored, for `verify` to read them again."""

    def install(self) -> None:
        """Put the weights in place."""


class Binder:
    """Binds weights without their data, on the meta device: each distinct one once, as a deep model repeats a few."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` gave for this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def linear(self, method: LinearMethodBase, shape: LinearShape, operation: Operation) -> BoundWeight:
        """Bind a linear layer's or an embedding's weight."""
        key = (method, operation, shape.inputs, shape.outputs)
        return self.once(key, lambda: bind(method.planned(shape), self.execution, operation))


class RevisedModule(nn.Module):
    """A module that counts changes: what was recorded of a model (engine/tape.py) is stale after one.

    revision: how often an attribute (a packed weight, a method, an adapter) of any such module was set.
    """

    revision: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        RevisedModule.revision += 1
        super().__setattr__(name, value)


class WeightHolder(RevisedModule):
    """A module that holds tensors of the checkpoint.  As it stands: plain parameters, the same on every rank.

    prefix: the layer's full name; "" for one that rules cannot name.
    """

    prefix: str = ""

    # Where its tensors go

    @property
    def module(self) -> nn.Module:
        """The module that has the parameters: this one."""
        return self

    @property
    def loads(self) -> bool:
        """Whether there is anything to load, or to do once other layers are loaded."""
        return any(param is not None for param in self.module._parameters.values())

    def places(self, name: str) -> Iterator[Place]:
        """Yield the place of every tensor.  name: the holder's name in the model."""
        for param_name, param in self.module._parameters.items():
            if param is not None:
                yield Place(self.module, param_name, whole_slot(name, param_name, param))

    def slots_elsewhere(self) -> Iterator[Slot]:
        """Yield the slots of tensors that other ranks hold, so that this one can check that they are there."""
        return iter(())

    # How it is divided over ranks

    def likeness(self) -> Any:
        """Return a value to hash, which is equal for layers that differ in nothing but their names."""
        return type(self)

    def shares(self, rank: int, size: int) -> Iterable[tuple[LinearMethodBase, LinearShape]]:
        """Return the method and a rank's share of each weight.  ShardingError if it cannot be divided so."""
        return ()

    # What it holds

    def parts(self) -> Iterable[HeldPart]:
        """Return every weight under its checkpoint name."""
        return ()

    def held(self) -> tuple[HeldWeight, ...]:
        """Return every packed weight."""
        return ()

    def methods(self) -> Iterable[LinearMethodBase]:
        """Return the methods to count in the load report."""
        return () if self.shares_with is not None else (weight.method for weight in self.held())

    @property
    def shares_with(self) -> WeightHolder | None:
        """The layer whose packed weight is this one's too; None: it has its own, or none."""
        return None

    @property
    def split(self) -> bool:
        """Whether a fused layer keeps separate weights, as its parts have different methods."""
        return False

    # What runs, from shapes alone

    def describe(self, binder: Binder) -> Iterable[Description]:
        """Return what a plan says of each weight."""
        return ()

    def selections(self, binder: Binder | None = None) -> Iterable[Selection[Any]]:
        """Return the chosen kernels, but for weights that are not packed.  binder: plans those."""
        return ()

    def kept_bytes(self) -> int:
        """Return the bytes of the parameters that stay as they are, on this rank."""
        return sum(param.nbytes for param in self.module._parameters.values() if param is not None)

    def packed_bytes(self, binder: Binder) -> int:
        """Return the bytes of the packed weights on this rank."""
        return 0

    def bytes_at(self, size: int, binder: Binder) -> int:
        """Return the bytes of the weights on the first of `size` ranks."""
        return self.kept_bytes()

    def converting_bytes(self) -> int | None:
        """Return the bytes that packing takes beside the stored tensors; None: nothing is packed."""
        return None

    def cache_bytes_per_token(self) -> int:
        """Return what a cache of this layer takes for each token."""
        return 0

    def attach_cache(self, num_pages: int, page_size: int, device: torch.device) -> None:
        """Give the layer `num_pages` empty pages."""

    def detach_cache(self) -> None:
        """Take the pages away."""

    # Loading, checking, swapping

    def finish(self) -> None:
        """Convert and pack what has been loaded.  What is packed already stays as it is."""

    def loaded_bytes(self) -> int:
        """Return the bytes of the packed weights, once loaded."""
        return 0

    def trials(self, stored: Callable[[HeldWeight], Mapping[str, Tensor]]) -> Iterable[Trial]:
        """Return the checks of the packed weights.  stored: reads a weight's tensors from the checkpoint again."""
        return ()

    def state(self) -> HolderState | None:
        """Return what runs now; None: there is nothing that a swap could change."""
        return None

    def swapped(
        self, methods: Sequence[LinearMethodBase], staged: Mapping[WeightHolder, HolderState]
    ) -> HolderState | None:
        """Make the state with other methods, one for each of `parts()`, and touch nothing.

        staged: the new states of the layers before this one.  None: as `state`.
        ConfigError where the layer cannot run them.
        """
        return None


class PlainParameters(WeightHolder):
    """The plain parameters of a module that is no holder itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_module", module)  # not a child: it has its own place in the model

    @property
    def module(self) -> nn.Module:
        """The module that has the parameters."""
        module: nn.Module = vars(self)["_module"]
        return module


def weight_holders(model: nn.Module) -> Iterator[tuple[str, WeightHolder]]:
    """Yield everything in `model` that holds weights, with its name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, WeightHolder):
            yield name, module
        elif any(p is not None and not hasattr(p, "slots") for p in module._parameters.values()):
            yield name, PlainParameters(module)


def whole_slot(prefix: str, name: str, tensor: Tensor) -> Slot:
    """Make the one slot of a plain parameter or buffer, which every rank holds in full."""
    spec = WeightSpec(name, tensor.dtype, tuple(map(whole, tensor.shape)), accepts=FLOATS)
    shape = LinearShape(Span.full(1), (Span.full(1),), (prefix,), tensor.dtype)
    return place(spec, shape)[1][0]


def slotted_places(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """Yield the places of all parameters of these modules that have slots."""
    for module in modules:
        for name, param in module._parameters.items():
            for slot in getattr(param, "slots", ()):
                yield Place(module, name, slot)
