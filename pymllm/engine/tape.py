"""A decoding step that is recorded once and replayed, with other numbers in the same tensors.

While 200 MB of weights stream past, everything else has left the caches, and the Python between two kernels costs as
much as a small kernel. A tape notes down what a step does: the native calls (`kernels/tape.h`) and torch's operations
between them, with the addresses of all tensors. To play it takes one native call, and a torch operation where there is
one. A tape is to a CPU what a captured graph is to a GPU.

A step that cannot be repeated is never recorded: one whose work depends on numbers that Python reads from a tensor, on
lengths that it has as Python integers, or on operations other than torch's own. A new tape is tried twice: on the step
that it was recorded from, with its intermediate tensors full of NaN, and on the next step. Both times it must give the
same logits, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pymllm.attention import AttnMetaDataBase
from pymllm.engine.tape_calls import call_natively
from pymllm.kernels.native.extension import native, native_available
from pymllm.layers.held import weight_holders

# How much a tape's intermediate tensors may take: all are kept, and none takes another's place.
MAX_BYTES = 64 << 20


class NotRepeatable(Exception):
    """The refusal to record a step; its text is the reason."""


class _Repeated:
    """A step whose tensors will hold other numbers when it is replayed: what Python reads of it would be stale."""

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        raise NotRepeatable("a kernel reads the requests' lengths in Python")


def repeated(metadata: type[AttnMetaDataBase]) -> type[AttnMetaDataBase]:
    """Make the class of a strategy's steps that are replayed."""
    return type(f"Repeated{metadata.__name__}", (_Repeated, metadata), {})


class _NoPeeking(TorchFunctionMode):
    """A guard against code that reads a tensor's numbers without an operation that `_Notes` would see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise NotRepeatable(f"{func.__name__} reads a tensor in Python")
        return func(*args, **(kwargs or {}))


class _Notes(TorchDispatchMode):
    """A watcher of torch's operations while a step runs, which keeps every tensor that they make.

    operations: what to run again, each with the number of native calls before it.  kept: every result, views too.
    made: the results that have memory of their own.
    """

    def __init__(self, tape: Any) -> None:
        super().__init__()
        self.tape = tape
        self.operations: list[tuple[int, Callable[[], None]]] = []
        self.kept: list[Tensor] = []
        self.made: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer torch: True would make it wrap the method below, and import all of its compiler at the first call."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, schema = str(func), func._schema
        if _depends_on_numbers(func, args):
            raise NotRepeatable(f"{name} depends on numbers in a tensor")
        # lift_fresh makes a tensor of Python numbers.
        if func.namespace != "aten" or name.startswith("aten.lift_fresh"):
            raise NotRepeatable(f"{name} cannot be noted down")
        result = func(*args, **kwargs)
        outputs = _tensors_in((result,))
        self.kept += outputs
        if schema.is_mutable:
            self._then(lambda: func(*args, **kwargs))
        elif func in _VIEWS or any(returned.alias_info is not None for returned in schema.returns):
            # A view: its memory is another tensor's.
            pass
        elif name.split(".")[1] in _ALLOCATIONS:
            self.made += outputs
        else:
            self.made += outputs
            if call_natively(func, args, kwargs, result):
                self.kept += _tensors_in(args)
            else:
                self._then(_again(func, args, kwargs, outputs))
        return result

    def _then(self, operation: Callable[[], None]) -> None:
        self.operations.append((len(self.tape), operation))


def _depends_on_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether the result's shape, or a Python value, follows from what a tensor holds."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    # Rows taken by number have a known shape, rows taken by a mask do not.
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _tensors_in(args: tuple[Any, ...]) -> list[Tensor]:
    flat = [t for arg in args for t in (arg if isinstance(arg, (tuple, list)) else [arg])]
    return [t for t in flat if isinstance(t, Tensor)]


# Of its own schema it is none, so that autograd may forget the tensor below.
_VIEWS = (torch.ops.aten._unsafe_view.default,)
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


def _again(func: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> Callable[[], Any]:
    """Return what runs an operation again, with its results in the same tensors."""
    if func is torch.ops.aten._to_copy.default:
        return functools.partial(outputs[0].copy_, args[0])
    into = _with_output(func) if len(outputs) == 1 else None
    if into is not None and all(argument.name != "memory_format" for argument in func._schema.arguments):
        return functools.partial(into, *args, **kwargs, out=outputs[0])

    def again() -> None:
        result = func(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        for output, new in zip(outputs, results, strict=True):
            output.copy_(new)

    return again


@functools.cache
def _with_output(func: Any) -> Any:
    """Find the overload of an operation that takes its arguments, and a tensor for the result.  None: none does."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        *others, last = other._schema.arguments or [None]
        if last is not None and last.is_out and [(a.name, str(a.type)) for a in others] == wanted:
            return other
    return None


@dataclass(eq=False)
class Tape:
    """A recorded step.

    logits: the tensor that `play` fills.  native: the native calls.  operations: torch's operations between them, each
    with the number of native calls before it.  kept: tensors whose addresses the calls have.
    bytes: what its intermediate tensors take.
    """

    logits: Tensor
    native: Any
    operations: list[tuple[int, Callable[[], None]]]
    kept: list[Tensor] = field(repr=False)
    bytes: int = 0

    def play(self) -> Tensor:
        """Run the step again.  Returns the logits, which the next call overwrites."""
        position = 0
        for after, operation in self.operations:
            if after > position:
                self.native.play(position, after)
                position = after
            operation()
        self.native.play(position, len(self.native))
        return self.logits


def why_not_recorded(model: nn.Module) -> str | None:
    """Return what keeps every decoding step of `model` from being recorded, or None."""
    for _, holder in weight_holders(model):
        if holder.state_bytes() and not holder.copies_states:
            return "a layer keeps states that cannot be copied"
    for name, module in model.named_modules():
        if getattr(getattr(module, "parallel", None), "size", 1) > 1:
            return f"{name} is divided over ranks"
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return "modules of the model have hooks" if hooked else None


def record(run: Callable[[], Tensor], expected: Tensor, rewind: Callable[[], None] | None = None) -> Tape:
    """Record a tape of `run`, which has just returned `expected`.

    rewind: undoes what `run` changes besides its own tensors; None: it changes nothing that it reads.
    Raises NotRepeatable if `run` has what a tape cannot have, or if the tape gives other logits.
    """
    if not native_available():
        raise NotRepeatable("the native kernels are not built")
    calls = native().Tape()
    if rewind is not None:
        rewind()
    with _NoPeeking(), _Notes(calls) as notes:
        calls.record()
        try:
            logits = run()
        finally:
            calls.stop()
    size = sum(tensor.nbytes for tensor in notes.made)
    if size > MAX_BYTES:
        raise NotRepeatable(f"its intermediate results take {math.ceil(size / 2**20)} MiB")
    tape = Tape(logits, calls, notes.operations, notes.kept, size)
    for tensor in notes.made:
        # All bits set are NaN in every float type.
        tensor.untyped_storage().fill_(255)
    if rewind is not None:
        rewind()
    if not torch.equal(tape.play(), expected):
        raise NotRepeatable("played back, it gives other logits")
    return tape
