"""The names of a checkpoint's tensors in transformers' model: its renamings, and what it converts as it loads.

A tensor that the class has in another form is converted (`converted.py`); our experts read each expert's tensor as
it is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from torch import nn

from pymllm.errors import CheckpointError
from pymllm.models.generic.converted import Part, describe
from pymllm.models.generic.experts import SINGLE, find_experts
from pymllm.modules.foreign_experts import ForeignExperts
from pymllm.weights.tensor_file import TensorInfo


def rename(model: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Give the tensors of a checkpoint the names that they have in `model`.

    model: transformers', on the meta device, before any of our layers are in it.
    CheckpointError where two tensors would have one name.
    """
    renamings, converters = _conversions(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    known = set(shapes)
    ours = {name for name, found in find_experts(model).items() if isinstance(found, ForeignExperts)}
    renamed: dict[str, TensorInfo] = {}
    groups: dict[str, list[Part]] = {}
    taken: dict[str, TensorInfo] = {}
    stray: list[str] = []
    for stored, info in tensors.items():
        if _is_single(stored, ours):
            add_once(renamed, stored, info)
            continue
        name = stored if stored in known else apply_renamings(stored, renamings)
        name = _with_base(model, name)
        target, pattern = (name, None) if name in known else apply_converters(name, converters)
        target = _with_base(model, target)
        if pattern is not None and target in known and not _read_as_stored(name, target, ours):
            add_once(taken, name, info)
            groups.setdefault(target, []).append(Part(name, pattern, info))
            continue
        add_once(renamed, name, info)
        stray += [stored] if name not in known else []
    patterns = {pattern: one for one in converters for pattern in one.source_patterns}
    for target, parts in groups.items():
        for made, info in describe(model, target, patterns[parts[0].pattern], parts, shapes, stray).items():
            add_once(renamed, _with_base(model, made), info)
    return renamed | _tied(model, renamed, {name.rpartition(".")[0] for name in renamed.keys() - known})


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Return what transformers does to the names and tensors of a class's checkpoints: renamings, and converters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(model)
    converters: list[Any] = [one for one in mapping if isinstance(one, WeightConverter)]
    return [one for one in mapping if not isinstance(one, WeightConverter)], converters


def apply_renamings(name: str, renamings: Iterable[Any]) -> str:
    """Rename a stored tensor by every one of transformers' renamings, in their order."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def apply_converters(name: str, converters: Iterable[Any]) -> tuple[str, str | None]:
    """Rename a tensor by the first of transformers' converters that takes it.

    Returns the new name and the converter's pattern, or the name as it is and None.
    """
    found = (converter.rename_source_key(name) for converter in converters)
    return next(((renamed, pattern) for renamed, pattern in found if pattern is not None), (name, None))


def _tied(model: Any, renamed: Mapping[str, TensorInfo], quantised: Set[str]) -> dict[str, TensorInfo]:
    """Describe what the files hold once for two parameters that the class ties, but for the head's table.

    quantised: the modules that have tensors which the class does not know: these are not tied.
    """
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    twins = {}
    for pair in model.all_tied_weights_keys.items():
        for name, source in (pair, pair[::-1]):
            module, _, last = name.rpartition(".")
            # The table that a head shares is its embedding's, and a bias its own.
            shared = module == head and last != "bias"
            if source in renamed and name not in renamed and module not in quantised and not shared:
                twins[name] = replace(renamed[source], name=name)
    return twins


def _is_single(name: str, ours: set[str]) -> bool:
    """Tell whether a tensor is a single expert's, under the name that our experts read."""
    parts = name.rsplit(".", 3)
    return len(parts) == 4 and parts[0] in ours and SINGLE.fullmatch(".".join(parts[1:])) is not None


def _read_as_stored(name: str, target: str, ours: set[str]) -> bool:
    """Tell whether a tensor of stacked experts is one that our experts read: a single expert's, under a usual name."""
    experts = target.rpartition(".")[0]
    return experts in ours and SINGLE.fullmatch(name.removeprefix(f"{experts}.")) is not None


def names_in_class(model: Any, tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return what transformers calls tensors in `model`, by their stored names: as renamed only, and as converted.

    The second is the name of (the first of) what a tensor would become, where the model has that, else the first.
    """
    find = _name_finder(model)
    return {stored: find(stored) for stored in tensors}


def _name_finder(model: Any) -> Callable[[str], tuple[str, str]]:
    """Return what finds the names of one tensor for `names_in_class`."""
    renamings, converters = _conversions(model)
    known = set(model.state_dict())

    def find(stored: str) -> tuple[str, str]:
        name = stored if stored in known else _with_base(model, apply_renamings(stored, renamings))
        target = name if name in known else _with_base(model, apply_converters(name, converters)[0])
        return name, target if target in known else name

    return find


def stored_spelling(model: Any, pairs: Iterable[tuple[str, str]]) -> Callable[[str, str], str]:
    """Return what says, of its name in `model` and a guess, how a tensor that is not there would be stored.

    pairs: (name in the model, stored name) of those that are there: they show whether the files have the class's names.
    """

    @functools.cache
    def renamings() -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        found = get_model_conversion_mapping(model, add_legacy=False)[::-1]
        turned = [one.reverse_transform() for one in found if not isinstance(one, PrefixChange)]
        return [one for one in turned if isinstance(one, WeightRenaming)]

    def turn(name: str) -> str:
        return str(apply_renamings(name, renamings()))

    @functools.cache
    def as_in_class() -> bool:
        return any(mine == stored != turn(mine) for mine, stored in pairs)

    find = functools.cache(lambda: _name_finder(model))

    def spell(name: str, guess: str) -> str:
        turned = name if as_in_class() else turn(name)
        for other in (guess,) if turned == name else (turned, guess):
            if find()(other)[0] == name:
                return other
        return name

    return spell


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
