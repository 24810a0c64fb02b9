"""The names of a checkpoint's tensors in transformers' model: its renamings, and what it converts as it loads.

A tensor that the class has in another form (several in one, one in several, turned) is converted as it is read, by
transformers' own operations; our experts read each expert's tensor as it is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import CheckpointError
from pymllm.models.generic.experts import find_experts
from pymllm.weights.tensor_file import TensorInfo


@dataclass(frozen=True)
class ConvertedTensor(TensorInfo):
    """A tensor that is made of stored ones as it is read.  sources: these.  convert: makes it of their values."""

    sources: tuple[TensorInfo, ...] = field(repr=False)
    convert: Callable[[], Tensor] = field(repr=False)

    def read(self, index: tuple[slice, ...] | None = None, out: Tensor | None = None) -> Tensor:
        made = self.convert()[tuple(slice(*bound) for bound in self._bounds(index))]
        return made.contiguous() if out is None else out.copy_(made)


def rename(model: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Give the tensors of a checkpoint the names that they have in `model`.

    model: transformers', on the meta device, before any of our layers are in it.
    CheckpointError where two tensors would have one name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in mapping if not isinstance(one, WeightConverter)]
    known = set(model.state_dict())
    ours = {name for name, module in model.named_modules() if find_experts(module) is not None}
    renamed: dict[str, TensorInfo] = {}
    groups: dict[str, list[tuple[str, TensorInfo]]] = {}
    for stored, info in tensors.items():
        name = stored if stored in known else apply_renamings(stored, renamings)
        name = _with_base(model, name)
        target, pattern = (name, None) if name in known else apply_converters(name, converters)
        target = _with_base(model, target)
        if pattern is not None and target in known and not _within(target, ours):
            groups.setdefault(target, []).append((pattern, info))
            continue
        add_once(renamed, name, info)
    patterns = {pattern: one for one in converters for pattern in one.source_patterns}
    for target, sources in groups.items():
        for name, info in _converted(model, target, patterns[sources[0][0]], sources).items():
            add_once(renamed, name, info)
    return renamed


def names_in_class(model: Any, tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return what transformers calls tensors in `model`, by their stored names: as renamed only, and as converted.

    The second is the name of (the first of) what a tensor would become, where the model has that, else the first.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, apply_renamings

    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    known = set(model.state_dict())
    names: dict[str, tuple[str, str]] = {}
    for stored in tensors:
        name = stored if stored in known else _with_base(model, apply_renamings(stored, renamings))
        target = name if name in known else _with_base(model, apply_converters(name, converters)[0])
        names[stored] = name, target if target in known else name
    return names


def add_once(found: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    """Add a tensor under a name.  CheckpointError where another one has it."""
    if name in found:
        raise CheckpointError(
            f"two tensors of the checkpoint are the model's {name!r}",
            code="duplicate-tensor",
            file=str(info.file.path),
            tensor=info.name,
            fix="The checkpoint is badly written: convert or download it again.",
        )
    found[name] = info if info.name == name else replace(info, name=name)


def _within(name: str, modules: set[str]) -> bool:
    return name.rpartition(".")[0] in modules or name in modules


def _with_base(model: Any, name: str) -> str:
    """Add or take away the name of the inner model, which a checkpoint of another head may lack or have."""
    base, (first, _, rest) = model.base_model_prefix, name.partition(".")
    children = dict(model.named_children())
    if not base or first in children or first in model._parameters or first in model._buffers:
        return name
    if first == base:
        return rest
    inner = getattr(model, base, None)
    below = isinstance(inner, nn.Module) and (first in inner._modules or first in inner._parameters)
    return f"{base}.{name}" if below else name


def _converted(
    model: Any, target: str, converter: Any, sources: list[tuple[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Describe the tensors that a converter makes of its sources, without reading any."""

    def run(read: Callable[[TensorInfo], Tensor]) -> dict[str, Tensor]:
        one = copy.deepcopy(converter)
        for pattern, info in sources:
            one.add_tensor(target, info.name, pattern, _reader(read, info))
        made = one.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    infos = tuple(info for _, info in sources)
    try:
        shapes = run(lambda info: torch.empty(info.shape, dtype=info.dtype, device="meta"))
    except Exception as error:
        raise CheckpointError(
            "tensors of the checkpoint cannot be brought into the form that the model has",
            code="shape",
            file=str(infos[0].file.path),
            tensor=infos[0].name,
            expected=f"what transformers makes {target} of",
            found=f"{', '.join(str(list(info.shape)) for info in infos[:4])}: {error}",
        ) from error
    first = infos[0]
    described: dict[str, TensorInfo] = {}
    for name, meta in shapes.items():
        full = _with_base(model, name)
        described[full] = ConvertedTensor(
            *(full, first.dtype_name, meta.dtype, tuple(meta.shape), first.file, 0, meta.nbytes),
            sources=infos,
            convert=_part(run, name),
        )
    return described


def _reader(read: Callable[[TensorInfo], Tensor], info: TensorInfo) -> Callable[[], Tensor]:
    return lambda: read(info)


def _part(run: Callable[..., dict[str, Tensor]], name: str) -> Callable[[], Tensor]:
    return lambda: run(lambda info: info.read())[name]
