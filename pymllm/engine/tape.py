"""A decoding step that is recorded once and replayed, with other numbers in the same tensors.

While 200 MB of weights stream past, everything else has left the caches, and the Python between two kernels costs as
much as a small kernel. A tape notes down what a step does: the native calls (`kernels/tape.h`) and torch's operations
between them, with the addresses of all tensors. To play it takes one native call, and a torch operation where there is
one. A tape is to a CPU what a captured graph is to a GPU.

A step that cannot be repeated is never recorded: one whose work depends on numbers that Python reads from a tensor, on
lengths that it has as Python integers, or on operations other than torch's own. A new tape is tried twice: on the step
that it was recorded from, with each of its tensors full of NaN until it is written to, and on the next step. Both times
it must give the same logits, bit for bit. `watch.py` tells whether the model still is what was recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pymllm.attention import AttnMetaDataBase
from pymllm.engine.tape_calls import call_natively
from pymllm.engine.tape_memory import NoRoom, StepMemory
from pymllm.engine.watch import is_hooked
from pymllm.kernels.native.extension import native, native_available
from pymllm.layers.held import weight_holders

# Operations of torch's, or what spoils a tensor, each with the number of native calls before it.
Events = list[tuple[int, Callable[[], object]]]

# Of an operation for Python, about: the closure, its arguments and their tensors.
OPERATION_BYTES = 2048


# The reason that may go as it came: nothing counts hooks that are removed.
HOOKED = "modules of the model have hooks"


class NotRepeatable(Exception):
    """The refusal to record a step; its text is the reason."""


class _Repeated:
    """A step whose tensors will hold other numbers when it is replayed: what Python reads of it would be stale."""

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        raise NotRepeatable("a kernel reads the requests' lengths in Python")


@functools.cache
def repeated(metadata: type[AttnMetaDataBase]) -> type[AttnMetaDataBase]:
    """Make the class of a strategy's steps that are replayed."""
    return type(f"Repeated{metadata.__name__}", (_Repeated, metadata), {})


class _NoPeeking(TorchFunctionMode):
    """A guard against code that reads a tensor's numbers without an operation that `_Notes` would see.

    It also notes down whose addresses native calls are given.
    """

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise NotRepeatable(f"{func.__name__} reads a tensor in Python")
        if func is Tensor.data_ptr:
            self.notes.use(args[:1])
        return func(*args, **(kwargs or {}))


class _Notes(TorchDispatchMode):
    """A watcher of torch's operations while a step runs, which puts every tensor that they make into `memory`.

    events: what to run again, and for the trial what spoils each tensor before it is written to, in order.
    spoilers: the numbers of the latter.  outside: the tensors that the step uses and has not made.
    """

    def __init__(self, tape: Any, memory: StepMemory) -> None:
        super().__init__()
        self.tape, self.memory = tape, memory
        self.events: Events = []
        self.spoilers: set[int] = set()
        self.outside: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer torch: True would make it wrap the method below, and import all of its compiler at the first call."""
        return False

    def use(self, args: Sequence[Any]) -> None:
        """Note down tensors that the step has not made."""
        for tensor in _tensors_in(args):
            if tensor.numel() and tensor not in self.memory:
                self.outside[id(tensor)] = tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if _depends_on_numbers(func, args):
            raise NotRepeatable(f"{name} depends on numbers in a tensor")
        # lift_fresh makes a tensor of Python numbers.
        if func.namespace != "aten" or name.startswith("aten.lift_fresh"):
            raise NotRepeatable(f"{name} cannot be noted down")
        if name.split(".")[1] in _RESIZES:
            raise NotRepeatable(f"{name} gives a tensor other memory")
        given = (*args, *kwargs.values())
        self.use(given)
        result = func(*args, **kwargs)
        outputs = _tensors_in((result,))
        if torch.Tag.inplace_view in func.tags or _tells_of_shapes(func, result):
            # Shapes and types are the same at each step.
            return result
        before = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in(given) if tensor.numel()}
        made = [tensor for tensor in outputs if tensor.untyped_storage().data_ptr() not in before]
        if func._schema.is_mutable:
            if any(tensor.numel() for tensor in made):
                raise NotRepeatable(f"{name} writes into a tensor and makes another")
            self._then(functools.partial(func, *self._kept(args), **self._kept(kwargs)))
        elif made:
            if len(made) < len(outputs) and not all(tensor.numel() for tensor in outputs):
                made = outputs
            if len(made) < len(outputs):
                raise NotRepeatable(f"{name} returns tensors that it was given, and others")
            placed = [self._placed(tensor) for tensor in outputs]
            result = placed[0] if isinstance(result, Tensor) else type(result)(placed)
            if name.split(".")[1] not in _ALLOCATIONS:
                for tensor, computed in zip(placed, outputs, strict=True):
                    tensor.copy_(computed)
                if not call_natively(func, args, kwargs, result):
                    self._then(_again(func, self._kept(args), self._kept(kwargs), self._kept(placed)))
        return result

    def _placed(self, tensor: Tensor) -> Tensor:
        """Return a tensor in `memory` for one that an operation has made."""
        if not tensor.numel():
            return tensor
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or type(tensor) is not Tensor:
            raise NotRepeatable(f"it makes a tensor that is no plain one: {tensor.layout} on {tensor.device}")
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise NotRepeatable("it makes a tensor whose rows lie upon each other")
        placed, spoil = self.memory.take(tensor)
        self.spoilers.add(len(self.events))
        self._then(spoil)
        return placed

    def _kept(self, args: Any) -> Any:
        """Return arguments with aliases for the step's own tensors, so that these make room for others."""
        if isinstance(args, Tensor):
            return self.memory.alias(args) if args.numel() and args in self.memory else args
        if isinstance(args, dict):
            return {name: self._kept(value) for name, value in args.items()}
        return type(args)(map(self._kept, args)) if isinstance(args, (tuple, list)) else args

    def _then(self, event: Callable[[], object]) -> None:
        self.events.append((len(self.tape), event))


def _depends_on_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether the result's shape, or a Python value, follows from what a tensor holds."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    # Rows taken by number have a known shape, rows taken by a mask do not.
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _tells_of_shapes(func: Any, result: Any) -> bool:
    """Tell whether a result is no tensor but follows from shapes or types.  NotRepeatable if it may not."""
    if all(one is None or isinstance(one, Tensor) for one in _flat((result,))):
        return False
    if func.name().split("::")[1].split(".")[0] not in _OF_SHAPES:
        raise NotRepeatable(f"{func} gives Python a number")
    return True


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for arg in args:
        yield from arg if isinstance(arg, (tuple, list)) else (arg,)


def _tensors_in(args: Sequence[Any]) -> list[Tensor]:
    return [one for one in _flat(args) if isinstance(one, Tensor)]


_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_RESIZES = {"resize_", "resize_as_", "set_", "set_data", "_resize_output_"}
_OF_SHAPES = {
    *("size", "stride", "numel", "dim", "storage_offset", "is_contiguous", "is_same_size", "is_pinned"),
    *(
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "sym_is_contiguous",
        "is_strides_like_format",
    ),
    *("is_non_overlapping_and_dense", "promote_types", "result_type", "can_cast"),
}


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

    logits: the tensor that `play` fills.  native: the native calls.  operations: torch's operations between them.
    outside: the tensors that the step uses and has not made.  memory: where it makes its own.
    bytes: what the tape itself takes.
    """

    logits: Tensor
    native: Any
    operations: Events
    outside: list[Tensor] = field(repr=False)
    memory: StepMemory = field(repr=False)
    bytes: int = 0

    def play(self) -> Tensor:
        """Run the step again.  Returns the logits, which the next step overwrites, of whichever tape."""
        _play(self.native, self.operations)
        return self.logits


def _play(calls: Any, events: Events) -> None:
    position = 0
    for after, event in events:
        if after > position:
            calls.play(position, after)
            position = after
        event()
    calls.play(position, len(calls))


def why_not_recorded(model: nn.Module) -> str | None:
    """Return what keeps every decoding step of `model` from being recorded, or None."""
    for _, holder in weight_holders(model):
        if holder.state_bytes() and not holder.copies_states:
            return "a layer keeps states that cannot be copied"
    for name, module in model.named_modules():
        if getattr(getattr(module, "parallel", None), "size", 1) > 1:
            return f"{name} is divided over ranks"
    return HOOKED if any(map(is_hooked, model.modules())) else None


def record(
    run: Callable[[], Tensor],
    expected: Tensor,
    rewind: Callable[[], None] | None = None,
    memory: StepMemory | None = None,
) -> Tape:
    """Record a tape of `run`, which has just returned `expected`.

    rewind: undoes what `run` changes besides its own tensors; None: it changes nothing that it reads.
    memory: the region of all tapes, any two of which are never played at a time; None: one for this tape.
    Raises NotRepeatable if `run` has what a tape cannot have, or if the tape gives other logits.
    """
    if not native_available():
        raise NotRepeatable("the native kernels are not built")
    calls, memory = native().Tape(), memory or StepMemory()
    if rewind is not None:
        rewind()
    notes = _Notes(calls, memory)
    with _NoPeeking(notes), notes:
        calls.record()
        try:
            logits = run()
        except NoRoom as error:
            raise NotRepeatable(str(error)) from None
        finally:
            calls.stop()
    operations = [event for number, event in enumerate(notes.events) if number not in notes.spoilers]
    tape = Tape(
        memory.alias(logits) if logits in memory else logits,
        calls,
        operations,
        list(notes.outside.values()),
        memory,
        calls.bytes() + OPERATION_BYTES * len(operations),
    )
    if rewind is not None:
        rewind()
    _play(calls, notes.events)
    if not torch.equal(tape.logits, expected):
        raise NotRepeatable("played back, it gives other logits")
    return tape
