"""What a recorded step rests on, and whether it still is as it was.

A tape or a captured graph has the addresses of weights, and numbers that Python read from attributes. So it is stale
once an attribute of a layer is set, a parameter, a buffer or a layer is replaced, a hook comes or goes, or a tensor's
memory is another one (`p.data = ...` tells nobody). A `Watch` looks at all that can be reached from the model, before
every step: at dictionaries by the number that Python gives each change of one, at tensors by their place, shape,
strides and type. Once weights have gone through the caches, a look costs memory accesses (docs/performance.md): the
extension asks for what it will look at ahead. An edit in place needs no look: a replayed step reads the
same memory.

A watch keeps the memory that the tensors had. Even a step that plays while another thread replaces its weights reads
nothing that is freed.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from pymllm.kernels.native.extension import native, native_available
from pymllm.layers.held import RevisedModule, WeightHolder

# What has nothing within it that can change.
_LEAVES = (
    *(str, bytes, int, float, complex, type(None), Enum, PurePath),
    *(torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator, types.ModuleType),
)

# Where weights come from: no step reads it, and there is much of it.
_UNREAD = ("pymllm.weights", "pymllm.loading", "pymllm.planning", "pymllm.text")

_FUNCTIONS = tuple(
    f"aoti_torch_{name}"
    for name in ("get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_dtype", "delete_tensor_object")
)


class Watch:
    """A look at everything that can be reached from `roots`: objects by the name that stands for them in reasons.

    Objects are looked at with their attributes, their classes too. Three kinds of change are not looked for, as others
    count them or nothing makes them: new hooks (`RemovableHandle.next_id`), attributes of frozen values, and another
    `__code__` of a function.
    """

    def __init__(self, **roots: Any) -> None:
        functions = _functions()
        self._native = None if functions is None else native().Watch(functions)
        # All that is looked at, each with what it held; the extension has the addresses alone.
        self._tensors: dict[int, tuple[Tensor, Tensor, tuple[Any, ...]]] = {}
        self._dicts: dict[int, tuple[dict[Any, Any], tuple[list[Any], list[Any]]]] = {}
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._objects: list[tuple[Any, type]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._types: dict[type, tuple[list[Any], list[Any]]] = {}
        self._walk(roots)
        if self._native is not None:
            self._native.settle()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Look at these tensors, too, and keep their memory."""
        for tensor in tensors:
            if id(tensor) in self._tensors:
                continue
            # An alias: the tensor itself may be given other memory.
            self._tensors[id(tensor)] = tensor, tensor.detach(), _place(tensor)
            if self._native is not None:
                (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
                self._native.add_tensor(capsule, tensor._cdata, tensor.untyped_storage()._cdata)

    def changed(self) -> bool:
        """Tell whether anything was set, replaced or moved."""
        if self._native is not None:
            return self._native.changed() and self._differs(self._native)
        return (
            any(_place(tensor) != place for tensor, _, place in self._tensors.values())
            or any(type(found) is not kind for found, kind in self._objects)
            or any(not _same(now, then) for now, then in self._lists)
            or any(not _is_full(cell) or cell.cell_contents is not then for cell, then in self._cells)
            or any(_differ(found, then) for found, then in self._dicts.values())
            or any(_differ(vars(kind), then) for kind, then in self._types.items())
        )

    def _differs(self, watch: Any) -> bool:
        """Tell whether dictionaries that were changed hold anything else now.

        Some layers count their calls within a step, or hand each other something: from now on these are compared by
        what they hold.
        """
        for found in watch.stirred():
            kept = self._dicts.get(id(found))
            if kept is None or _differ(*kept):
                return True
            watch.compare(found)
        watch.settle()
        differs: bool = watch.changed()
        return differs

    def _walk(self, roots: dict[str, Any]) -> None:
        seen: dict[int, Any] = {}  # objects, so that no number is given again
        left = list(roots.values())
        while left:
            found = left.pop()
            if isinstance(found, (*_LEAVES, type)) or id(found) in seen:
                continue
            seen[id(found)] = found
            left += self._within(found)

    def _within(self, found: Any) -> Iterable[Any]:
        """Look at one object.  Returns what it holds."""
        if isinstance(found, Tensor):
            self.hold((found,))
            return ()
        if isinstance(found, dict):
            self._add_dict(found)
            return list(found.values())
        if isinstance(found, list):
            self._lists.append((found, list(found)))
            if self._native is not None:
                self._native.add_list(found)
            return list(found)
        if isinstance(found, (tuple, set, frozenset)):
            return list(found)
        if isinstance(found, types.FunctionType):
            return [
                *self._variables(found),
                *(found.__defaults__ or ()),
                *(found.__kwdefaults__ or {}).values(),
            ]
        if isinstance(found, types.MethodType):
            return (found.__self__, found.__func__)
        if isinstance(found, functools.partial):
            return (found.func, found.args, found.keywords)
        return self._attributes(found)

    def _variables(self, function: types.FunctionType) -> Iterator[Any]:
        """Look at the variables around a function.  Yields what they hold."""
        for cell in filter(_is_full, function.__closure__ or ()):
            self._cells.append((cell, cell.cell_contents))
            if self._native is not None:
                self._native.add_cell(cell)
            yield cell.cell_contents

    def _attributes(self, found: Any) -> list[Any]:
        kind = type(found)
        if kind.__module__.startswith(_UNREAD):
            return []
        slots = [
            getattr(found, name)
            for base in kind.__mro__
            for name in _slots(base)
            if isinstance(name, str) and hasattr(found, name)
        ]
        attributes = getattr(found, "__dict__", None)
        if type(attributes) is not dict:
            return slots
        for base in kind.__mro__:
            self._add_type(base)
        if not _is_frozen(kind):
            self._objects.append((found, kind))
            if self._native is not None:
                self._native.add_object(found)
        values = list(attributes.items())
        if isinstance(found, nn.Module):
            # The other dictionaries of torch's are for hooks, for training and for saving.
            read = ("_parameters", "_buffers", "_modules")
            values = [(name, value) for name, value in values if name in read or name not in _OF_MODULES]
        if isinstance(found, WeightHolder) and found.state_bytes():
            # Which slots requests have is a layer's own account of them, as the states themselves are.
            values = [(name, value) for name, value in values if not _are_numbers(value)]
        holds = any(isinstance(value, (Tensor, dict, list)) for value in attributes.values())
        if holds or not _is_frozen(kind):
            self._add_dict(attributes)
        return [value for _, value in values] + slots

    def _add_dict(self, found: dict[Any, Any]) -> None:
        if id(found) in self._dicts:
            return
        self._dicts[id(found)] = found, _contents(found)
        if self._native is not None:
            self._native.add_dict(found)

    def _add_type(self, kind: type) -> None:
        # Classes of Python's own and of torch's stand; one counts what is set of its objects.
        if kind in self._types or not kind.__flags__ & _ON_HEAP or kind is RevisedModule:
            return
        if kind.__module__.startswith(("torch.", "builtins")):
            return
        self._types[kind] = ([], []) if self._native is not None else _contents(vars(kind))
        if self._native is not None:
            self._native.add_type(kind)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of the module calls hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    )


_OF_MODULES = frozenset(vars(nn.Module()))
_ON_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _are_numbers(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, int) for one in found)


def _is_frozen(kind: type) -> bool:
    return getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _contents(found: Mapping[Any, Any]) -> tuple[list[Any], list[Any]]:
    return list(found), list(found.values())


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _differ(found: Mapping[Any, Any], then: tuple[list[Any], list[Any]]) -> bool:
    keys, values = _contents(found)
    return keys != then[0] or not _same(values, then[1])


@functools.cache
def _functions() -> list[int] | None:
    """Return the addresses of what the extension calls of torch's C interface.  None: there is no extension."""
    if not native_available():
        return None
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        found = [ctypes.cast(getattr(library, function), ctypes.c_void_p).value for function in _FUNCTIONS]
        torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors  # noqa: B018  it came with torch 2.6
    except (OSError, AttributeError):
        return None
    return [address for address in found if address is not None]
