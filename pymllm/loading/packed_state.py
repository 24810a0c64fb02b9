"""Every tensor of a model's modules, under a path that another build of the same model has too.

Packed weights are kept (`packed_cache.py`) under these paths, and come back under them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.layers.held import WeightHolder
from pymllm.quantization.binding import BoundWeight
from pymllm.quantization.experts import BoundExperts

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.Size, enum.Enum)


@dataclass(frozen=True)
class Found:
    """A tensor of a model.  put: sets another one in its place."""

    path: str
    tensor: Tensor
    put: Callable[[Tensor], None]


def tensors_of(model: nn.Module) -> Iterator[Found]:
    """Yield every parameter, buffer and packed tensor of a model, in one order."""
    for name, module in model.named_modules():
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in held.items():
                if tensor is not None:
                    yield Found(f"{name}:{kind}:{key}", tensor, _putter(held, key))
        for key, value in vars(module).items():
            if isinstance(value, (BoundWeight, BoundExperts)):
                path = f"{name}:{key}"
                for part, tensor in value.packed.items():
                    yield Found(f"{path}:{part}", tensor, _putter(value.packed, part))
                order = getattr(value, "input_order", None)
                if order is not None:
                    yield Found(f"{path}:input_order", order, _order_putter(value))


def _putter(held: Any, key: str) -> Callable[[Tensor], None]:
    def put(tensor: Tensor) -> None:
        held[key] = tensor

    return put


def alike(old: Tensor, data: Tensor) -> Tensor:
    """Return `data` as a tensor of the kind of `old`, with what is written on it."""
    new = nn.Parameter(data, requires_grad=False) if isinstance(old, nn.Parameter) else data
    vars(new).update(vars(old))
    return new


def _order_putter(bound: Any) -> Callable[[Tensor], None]:
    return lambda tensor: object.__setattr__(bound, "input_order", tensor)


def describe_tensors(model: nn.Module) -> list[list[Any]]:
    """Return the path, dtype, shape, strides and alias of every tensor: the index of the first that is the same."""
    first: dict[int, int] = {}
    found = []
    for index, item in enumerate(tensors_of(model)):
        tensor = item.tensor
        alias = first.setdefault(id(tensor), index)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append([item.path, dtype, list(tensor.shape), list(tensor.stride()), alias])
    return found


def describe_modules(model: nn.Module) -> Iterator[str]:
    """Yield what decides how a model runs beside its tensors: plain values, methods, and the kernels that are bound.

    Loading that sets a value by a tensor's content shows here.
    """
    for name, module in model.named_modules():
        yield f"{name}={type(module).__qualname__}"
        for key, value in vars(module).items():
            if isinstance(value, (BoundWeight, BoundExperts)):
                kernel = value.selection.kernel
                yield f" {key}={type(kernel).__qualname__} {kernel.layout} {value.problem!r}"
            elif key.startswith("_") or key == "training":
                continue
            elif (
                key == "quant_method"
                or isinstance(value, PLAIN)
                or (isinstance(value, (tuple, list)) and all(isinstance(item, PLAIN) for item in value))
            ):
                yield f" {key}={value!r}"
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                yield f" {key}:{type(value).__qualname__}"


class Rehearsal:
    """A load without data: while it lasts, every holder is as it will be once loaded, on the meta device.

    leave: puts the model back as it was built.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: list[tuple[Any, ...]] = [
            (
                module,
                dict(vars(module)),
                dict(module._parameters),
                dict(module._buffers),
                dict(module._modules),
            )
            for module in model.modules()
        ]
        self._data = [(param, param.data) for param in model.parameters() if param.is_meta]

    def finish(self, holders: Iterable[WeightHolder]) -> None:
        """Finish holders as loading does.  Raises what one raises that needs the content of its tensors."""
        for holder in holders:
            holder.finish()

    def leave(self) -> None:
        """Put the model back."""
        for module, attributes, *registered in self._before:
            vars(module).clear()
            vars(module).update(attributes)
            for held, before in zip(
                (module._parameters, module._buffers, module._modules), registered, strict=True
            ):
                held.clear()
                held.update(before)
        for param, data in self._data:
            param.data = data
