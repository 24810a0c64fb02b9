"""The one protocol of whatever holds weights: `WeightHolder`.

Planning, loading, verifying, swapping and writing walk the holders of a model and ask them, and know no kind of layer.
A linear layer, an embedding, a head, the experts of a layer, an attention layer (its KV cache and scales) and a norm
each answer where their tensors go, how they are divided over ranks, what they hold, which kernels run it, what finishes
loading, what proves it right, and how another method takes its place.

Two words for what a holder has: a *part* is a weight as the checkpoint names it (q_proj), and the rules choose its
method; a *held weight* is what is packed together (q, k and v in one).

A new kind of layer is one file: a subclass of `WeightHolder` that answers what differs. What it leaves unanswered is
answered for plain parameters:
- A parameter is one tensor of the checkpoint, named after the module's path, and every rank holds it in full.
- A parameter that ranks divide is registered by `quantization.parameters.add_weight`, which gives it its slots; then
  `shares` raises ShardingError for the numbers of ranks that cannot divide it.
- Children are holders of their own: a layer does not answer for the linear layers, norms and attention within it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.kernels.registry import Operation, Selection
from pymllm.quantization.binding import BoundWeight, bind
from pymllm.quantization.experts import BoundExperts
from pymllm.quantization.kv_cache import KVCacheMethodBase
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, place, slots_of
from pymllm.weights.spec import FLOATS, ExpertsShape, LinearShape, Span, WeightSpec, whole

Bound = BoundWeight | BoundExperts
TRIAL_ROWS = 5  # of inputs, for each weight


@dataclass(frozen=True)
class Place:
    """One tensor's place: the slot that cuts it, and the parameter (or buffer) `param` of `module` that it fills."""

    module: nn.Module
    param: str
    slot: Slot


@dataclass(frozen=True)
class HeldPart:
    """A weight as the checkpoint names it; a fused layer has several.

    name: its name in rules, decisions and plans.  stored: what the names of its tensors begin with, which is another
    name where a head is tied.  kind: as in a plan.  shape: of this weight alone.  module: the one with its parameters.
    stacked: True where its tensors hold this weight of every expert.
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
    """A weight that is packed as one: that of a layer with all its parts, or one product of all experts.

    operation: the operation whose kernels run it.  stored_in: the module that has its parameters as the checkpoint
    stores them.  packed_in: the module that has the packed weight, as `bound`.
    """

    method: LinearMethodBase
    shape: LinearShape | ExpertsShape
    operation: Operation
    stored_in: nn.Module
    packed_in: nn.Module


@dataclass(frozen=True)
class Description:
    """A layer's own share of a plan's row, for one weight or one KV cache: see `pymllm.planning.plan.PlannedLayer`."""

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
    state_bytes: int = 0


@dataclass(frozen=True)
class Trial:
    """A check of a kernel against float64, over the checkpoint's own tensors.

    weights: three float64 tensors for each weight (for each expert of each product): what the method makes of the
    stored tensors; what the stored tensors say, where the method converts them, else None; what the packed weight
    decodes to.
    magnitudes: the sizes of inputs to try, each by the label under which its error is reported.
    answer: computes the kernel's result and the float64 one for random inputs of a magnitude; call it after `weights`
    has been iterated to its end.
    """

    name: str
    kind: str
    method: str
    bound: Bound
    weights: Iterable[tuple[Tensor, Tensor | None, Tensor]]
    magnitudes: Mapping[str, float]
    answer: Callable[[torch.Generator, float], tuple[Tensor, Tensor]]


class HolderState(Protocol):
    """All that a swap changes of a holder: its methods and its packed weights, those that run or those to come."""

    @property
    def layer(self) -> WeightHolder: ...

    @property
    def rearranged(self) -> bool:
        """True where stored tensors are read into other modules than when the layer was built."""

    def same_as(self, other: Any) -> bool:
        """Tell whether these are the very same tensors in the same methods."""

    def packed(self) -> Sequence[Bound]:
        """Return the packed weights."""

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the weights as they are stored, for `verify` to read them again."""

    def install(self) -> None:
        """Put the methods and the packed weights in place.  This is all that changes the holder."""


class Binder:
    """The binding of weights without their data, on the meta device.

    Each distinct weight is bound once, as a deep model repeats a few.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` gave when this key was first asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def linear(self, method: LinearMethodBase, shape: LinearShape, operation: Operation) -> BoundWeight:
        """Bind a linear layer's or an embedding's weight."""
        key = (method, operation, shape.inputs, shape.outputs)
        return self.once(key, lambda: bind(method.planned(shape), self.execution, operation))


class Recorder(Protocol):
    """Who has recordings of steps."""

    def forget(self) -> None:
        """Drop them."""


class RevisedModule(nn.Module):
    """A module whose changes are counted: what was recorded of a model (engine/tape.py) is stale after one.

    revision: how often an attribute (a packed weight, a method, an adapter) of any such module has been set.
    recorders: who has recordings, and forgets them at once: they keep the memory of weights that are replaced.
    """

    revision: ClassVar[int] = 0
    recorders: ClassVar[WeakSet[Recorder]] = WeakSet()

    def __setattr__(self, name: str, value: Any) -> None:
        RevisedModule.revision += 1
        super().__setattr__(name, value)
        for recorder in tuple(RevisedModule.recorders):
            recorder.forget()


class WeightHolder(RevisedModule):
    """A module that holds tensors of the checkpoint.  As it stands: plain parameters, the same on every rank.

    prefix: the layer's full name, for rules and messages; "" for a layer that rules cannot name.
    """

    prefix: str = ""

    # Whether `save_states` and `restore_states` can copy what the layer keeps of requests.
    copies_states: ClassVar[bool] = False

    # Where its tensors go

    @property
    def module(self) -> nn.Module:
        """The module that has the parameters: this one, but for `PlainParameters`."""
        return self

    @property
    def loads(self) -> bool:
        """True where there is something to load, or to finish once other layers are loaded."""
        return any(param is not None for param in self.module._parameters.values())

    def places(self, name: str) -> Iterator[Place]:
        """Yield the place of every tensor: the slots that a parameter has, else one slot for all of it.

        name: the holder's name in the model, which begins the names of tensors without slots of their own.
        """
        for param_name, param in self.module._parameters.items():
            if param is not None:
                slots = slots_of(param)
                for slot in (whole_slot(name, param_name, param),) if slots is None else slots:
                    yield Place(self.module, param_name, slot)

    def slots_elsewhere(self) -> Iterator[Slot]:
        """Yield the slots of tensors that other ranks alone hold, so that this rank can check that they are there."""
        return iter(())

    # How it is divided over ranks

    def likeness(self) -> Any:
        """Return a value to hash.  Layers with equal ones divide alike, so that `shares` is asked of one of them."""
        return self

    def shares(self, rank: int, size: int) -> Iterable[tuple[LinearMethodBase, LinearShape]]:
        """Return the method of each held weight, and a rank's share of its shape.

        ShardingError if `size` ranks cannot divide the layer.
        """
        return ()

    # What it holds

    def parts(self) -> Iterable[HeldPart]:
        """Return every weight that a rule can name."""
        return ()

    def held(self) -> tuple[HeldWeight, ...]:
        """Return every weight that is packed, or that `finish` will pack."""
        return ()

    def methods(self) -> Iterable[LinearMethodBase]:
        """Return the methods that the load report counts."""
        return () if self.borrows_from is not None else (weight.method for weight in self.held())

    @property
    def borrows_from(self) -> WeightHolder | None:
        """The layer whose packed weight this layer runs too; None: this layer has its own, or none."""
        return None

    @property
    def split(self) -> bool:
        """True for a fused layer that keeps separate weights, as its parts have different methods."""
        return False

    # What runs, from shapes alone

    def describe(self, binder: Binder) -> Iterable[Description]:
        """Describe each weight (and KV cache) for a plan."""
        return ()

    def selections(self, binder: Binder | None = None) -> Iterable[Selection[Any]]:
        """Return every kernel that the layer has chosen.

        binder: chooses the kernels of weights that are not packed yet; None: those are left out.
        """
        return ()

    def kept_bytes(self) -> int:
        """Return the bytes of the parameters that stay as they are, on this rank."""
        return sum(param.nbytes for param in self.module._parameters.values() if param is not None)

    def packed_bytes(self, binder: Binder) -> int:
        """Return the bytes of the packed weights on this rank."""
        return 0

    def bytes_at(self, size: int, binder: Binder) -> int:
        """Return the bytes of the weights on the first of `size` ranks.  size: one that `shares` does not refuse."""
        return self.kept_bytes()

    def converting_bytes(self) -> int | None:
        """Return the bytes that packing takes beside the stored tensors; None: nothing is packed."""
        return None

    def cache_bytes_per_token(self) -> int:
        """Return the bytes that the layer's cache takes for each token; 0: it has none, and is never given pages."""
        return 0

    def attach_cache(self, num_pages: int, page_size: int, device: torch.device) -> None:
        """Give the layer `num_pages` empty pages of `page_size` tokens each."""

    def detach_cache(self) -> None:
        """Take the pages away."""

    def state_bytes(self) -> int:
        """Return the bytes of what the layer keeps of a request, however long that is; 0: it keeps nothing so."""
        return 0

    def attach_states(self, count: int, device: torch.device) -> None:
        """Give the layer room for the states of `count` requests; a request's first token begins with an empty one."""

    def detach_states(self) -> None:
        """Take the states away."""

    def free_state(self, slot: int) -> None:
        """Drop what the layer holds in a slot whose request has ended, where that frees memory."""

    def save_states(self, slots: Tensor) -> Any:
        """Copy the states in `slots`, [R] int64.  Returns what `restore_states` takes."""

    def restore_states(self, slots: Tensor, saved: Any) -> None:
        """Put copies that `save_states` made into `slots`, [R] int64, which may be others than they came from."""

    # Loading, checking, swapping

    def finish(self) -> None:
        """Convert and pack what has just been loaded.  What is packed already stays as it is."""

    def loaded_bytes(self) -> int:
        """Return the bytes of the packed weights, once loaded, without the parameters of `kept_bytes`."""
        return 0

    def trials(self, stored: Callable[[HeldWeight], Mapping[str, Tensor]]) -> Iterable[Trial]:
        """Make the checks of the packed weights.  stored: reads a weight's tensors from the checkpoint again."""
        return ()

    def packed_state(self) -> HolderState | None:
        """Return what runs now; None: there is nothing that a swap could change."""
        return None

    def swapped(
        self, methods: Sequence[LinearMethodBase], staged: Mapping[WeightHolder, HolderState]
    ) -> HolderState | None:
        """Make the state with other methods, and leave the layer as it is.

        methods: one for each of `parts()`.  staged: the new states of the layers before this one.
        Returns None where `packed_state` does.  ConfigError where the layer cannot run the methods.
        """
        return None


class PlainParameters(WeightHolder):
    """The holder of the plain parameters of a module that is no holder itself, a convolution of torch's for example."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_module", module)  # not a child: it has its own place in the model

    @property
    def module(self) -> nn.Module:
        """The module that has the parameters."""
        module: nn.Module = vars(self)["_module"]
        return module


def weight_holders(model: nn.Module) -> Iterator[tuple[str, WeightHolder]]:
    """Yield everything in `model` that holds weights, with its name, in the model's order.

    A module that is no holder is one of its plain parameters; parameters with slots belong to the holder around it.
    """
    for name, module in model.named_modules():
        if isinstance(module, WeightHolder):
            yield name, module
        elif any(param is not None and slots_of(param) is None for param in module._parameters.values()):
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
            for slot in (None if param is None else slots_of(param)) or ():
                yield Place(module, name, slot)
