"""Checkpoint names that are not parameter names: a module says where such a tensor goes, and this file puts it there.

A module may define `resolve_checkpoint_weight(suffix, ctx) -> ResolvedWeight | None`, which returns the place of the
tensor whose name, after the module's own, is `suffix`. The module nearest to the tensor is asked first, then those
around it, up to the root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pymllm.errors import CheckpointError, ConfigError
from pymllm.weights.loader import same_shape

# "q_proj": ("qkv_proj", "q"), from a module's name to the packed module that it is a part of, and the part's shard id.
PackedMapping = Mapping[str, tuple[str, int | str]]


@dataclass(frozen=True)
class LoadContext:
    """The load that a resolver is asked in.

    config: the one that the model is loaded with.  full_name: the tensor's whole name in the checkpoint.
    """

    config: Any
    full_name: str


@dataclass(frozen=True)
class ResolvedWeight:
    """The place of a checkpoint tensor.

    skip: the tensor goes nowhere.  transform: changes the tensor first.  param: the parameter that it goes to, with
    shard_id the part of it.  buffer: the buffer that it goes to.  loader: takes the tensor in place of the parameter's
    own loader; `param` then says which parameter it fills.
    """

    param: nn.Parameter | None = None
    buffer: Tensor | None = None
    shard_id: int | str | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    loader: Callable[[Tensor], None] | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        if self.param is not None and self.buffer is not None:
            raise ConfigError(
                "a ResolvedWeight has both a parameter and a buffer; a tensor goes to one of them, not to both",
                code="resolved-weight",
            )


def defines_resolver(model: nn.Module) -> bool:
    """Tell whether any module of `model` resolves names of its own."""
    return any(hasattr(module, "resolve_checkpoint_weight") for module in model.modules())


def resolve_weight_spec(model: nn.Module, name: str, config: Any = None) -> ResolvedWeight | None:
    """Ask the modules for a tensor's place: the longest prefix of its name first, the root last.

    config: the one that the model is loaded with.  None: no module names a place.
    """
    context = LoadContext(config, name)
    modules, segments = _modules_along(model, name), name.split(".")
    for depth in range(len(modules) - 1, -1, -1):
        resolve = getattr(modules[depth], "resolve_checkpoint_weight", None)
        if resolve is not None:
            resolved = resolve(".".join(segments[depth:]), context)
            if resolved is not None:
                return resolved
    return None


def _modules_along(model: nn.Module, name: str) -> list[nn.Module]:
    """List the root, then the module of each further segment of a tensor's name, as far as there are any."""
    modules = [model]
    for segment in name.split("."):
        child = modules[-1]._modules.get(segment)
        if child is None:
            break
        modules.append(child)
    return modules


def apply_resolved_weight(resolved: ResolvedWeight, loaded: Tensor) -> None:
    """Put a tensor in its place: skip or transform it, then give it to the loader, the parameter or the buffer.

    Raises ConfigError if the place names none of them, CheckpointError if the tensor does not fit.
    """
    if resolved.skip:
        return
    if resolved.transform is not None:
        loaded = resolved.transform(loaded)
    if resolved.loader is not None:
        resolved.loader(loaded)
    elif resolved.param is not None:
        load_parameter(resolved.param, loaded, resolved.shard_id)
    elif resolved.buffer is not None:
        _copy_once(resolved.buffer, loaded, "the buffer")
    else:
        raise ConfigError(
            "a ResolvedWeight gives its tensor no place to go",
            code="resolved-weight",
            expected="one of skip, loader, param and buffer",
            fix="Set one of them in the module's resolve_checkpoint_weight.",
        )


def load_parameter(param: nn.Parameter, loaded: Tensor, shard_id: int | str | None = None) -> None:
    """Give a tensor to the parameter's own `weight_loader`, or to the default one."""
    loader = getattr(param, "weight_loader", None)
    if loader is not None:
        loader(param, loaded, shard_id)
    elif shard_id is not None:
        raise ConfigError(
            f"a tensor is meant for one part of a parameter, which has no weight_loader and so no part {shard_id!r}",
            code="shard-id",
            expected="no shard_id, or a parameter with a weight_loader",
            found=str(shard_id),
        )
    else:
        default_weight_loader(param, loaded)


def default_weight_loader(param: Tensor, loaded_weight: Tensor) -> None:
    """Copy a whole tensor to a parameter, once.  CheckpointError for another shape or dtype, or a second time."""
    _copy_once(param, loaded_weight, "the parameter")


def _copy_once(place: Tensor, loaded: Tensor, what: str) -> None:
    _check_fits(place, loaded, what)
    written = getattr(place, "written", None)
    if written is not None:
        written.add(tuple(slice(0, side) for side in place.shape), what)
    place.data.copy_(loaded.reshape(place.shape))


def _check_fits(place: Tensor, loaded: Tensor, what: str) -> None:
    if loaded.dtype is not place.dtype and not (loaded.is_floating_point() and place.is_floating_point()):
        raise CheckpointError(
            f"the dtype does not fit {what}",
            code="dtype",
            expected=str(place.dtype).removeprefix("torch."),
            found=str(loaded.dtype).removeprefix("torch."),
        )
    if not same_shape(tuple(loaded.shape), tuple(place.shape)):
        raise CheckpointError(
            f"the shape does not fit {what}",
            code="shape",
            expected=str(list(place.shape)),
            found=str(list(loaded.shape)),
        )


def find_direct(model: nn.Module, name: str) -> ResolvedWeight | None:
    """Find the parameter or buffer of exactly this name.  None: there is none."""
    path, _, last = name.rpartition(".")
    modules = _modules_along(model, path) if path else [model]
    if path and len(modules) <= len(path.split(".")):
        return None
    param, buffer = modules[-1]._parameters.get(last), modules[-1]._buffers.get(last)
    if param is not None:
        return ResolvedWeight(param=param)
    return None if buffer is None else ResolvedWeight(buffer=buffer)


def find_packed(model: nn.Module, packed: PackedMapping, name: str) -> ResolvedWeight | None:
    """Find the part of a packed parameter that this name means.  None: the mapping does not place it.

    A key of the mapping is one segment of the name, or several in a row, of which the target replaces the last.
    """
    segments = name.split(".")
    for key, (target, shard_id) in packed.items():
        at = _index_of(segments, key.split("."))
        if at is None:
            continue
        last = at + key.count(".")
        found = find_direct(model, ".".join((*segments[:last], target, *segments[last + 1 :])))
        if found is not None and found.param is not None:
            return ResolvedWeight(param=found.param, shard_id=shard_id)
    return None


def _index_of(segments: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Find `wanted` in a row among the segments before the last (which names the tensor).  None: it is not there."""
    starts = range(len(segments) - len(wanted))
    return next((i for i in starts if list(segments[i : i + len(wanted)]) == list(wanted)), None)


def try_load_direct(model: nn.Module, name: str, loaded_weight: Tensor) -> bool:
    """Load a tensor whose name is a parameter's or a buffer's.  Returns False if it is neither's."""
    return _applied(find_direct(model, name), loaded_weight)


def try_load_via_packed_mapping(
    model: nn.Module, packed_mapping: PackedMapping, name: str, loaded_weight: Tensor, config: Any = None
) -> bool:
    """Load a tensor that is a part of a packed parameter.  Returns False if nothing places it.

    The modules' own resolvers are asked first, with `config`, then the mapping.
    """
    resolved = resolve_weight_spec(model, name, config)
    return _applied(resolved or find_packed(model, packed_mapping, name), loaded_weight)


def _applied(resolved: ResolvedWeight | None, loaded: Tensor) -> bool:
    if resolved is None:
        return False
    apply_resolved_weight(resolved, loaded)
    return True
