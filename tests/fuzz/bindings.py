"""Native calls with wrong tensors: short, strided, emptied, of another type or device, with ids out of range.

Each call goes to a kernel as a layer makes it, and is compared with the reference kernel over the same tensors. Under
AddressSanitizer (`make sanitize`) a read or write outside of any of them ends the child.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from .inputs import Input
from .native_calls import Call, calls

# How far a kernel may be from its reference, by the norm: roughly, as only nonsense is looked for.
WITHIN = 0.05
FILE = "call.json"
DTYPES = {
    str(dtype)[6:]: dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)
}
DTYPES |= {
    str(dtype)[6:]: dtype for dtype in (torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64)
}
NUMBERS = (-1, -2, 1, 7, 1000, 2**31 - 1, 2**31, -(2**31), 2**32, 2**32 + 1, 2**62, -(2**62))


def _spaced(tensor: Tensor) -> Tensor:
    """Copy a tensor into memory with gaps."""
    wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def _emptied(tensor: Tensor, keep: float) -> Tensor:
    """Copy a tensor, and take (some of) its memory away."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(int(tensor.nbytes * keep))
    return copy


def _poked(tensor: Tensor, number: int, at: int) -> Tensor:
    """Change one element in place, as far as the type holds the number."""
    if tensor.numel() and not tensor.is_complex():
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
        if tensor.dtype in (torch.int32, torch.uint8, torch.int8):
            info = torch.iinfo(tensor.dtype)
            number = (number - info.min) % (info.max - info.min + 1) + info.min
        flat[at % tensor.numel()] = number
    return tensor


# What is done to a tensor, by name.  Those of SAME say nothing else.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "spaced": _spaced,
    "turned": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else _spaced(t),
    "offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape) if t.numel() else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() and t.dtype.itemsize > 1 else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "requires_grad": lambda t: (
        t.clone().requires_grad_() if t.is_floating_point() and t.dtype.itemsize > 1 else t
    ),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "emptied": lambda t: _emptied(t, 0),
    "half of the memory": lambda t: _emptied(t, 0.5),
    "meta": lambda t: t.to("meta"),
    "shorter": lambda t: t[:-1],
    "narrower": lambda t: t[..., :-1],
    "empty": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
    "wider": lambda t: torch.cat([t, t], -1),
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim else t,
    "huge": lambda t: t.reshape(-1)[:1].expand(1 << 40),
    "flat": lambda t: t.reshape(-1),
    "deeper": lambda t: t[None],
    "a number": lambda t: t.reshape(-1)[:1].reshape(()),
    "sparse": lambda t: t.to_sparse(),
    **{f"as {name}": (lambda t, dtype=dtype: t.to(dtype)) for name, dtype in DTYPES.items()},
    **{f"seen as {name}": (lambda t, dtype=dtype: t.view(dtype)) for name, dtype in DTYPES.items()},
}
UNREAD = ("emptied", "half of the memory", "huge")


class Bindings:
    """Native calls, each with one or two of its tensors made wrong, at once or after a right call."""

    name = "bindings"

    def prepare(self, folder: Path) -> None:
        made: dict[str, Call] = {name: make() for name, make in calls().items()}
        for name, call in made.items():
            found = _listed(call.run(_copied(call.tensors), call.begin()))
            assert _near(found, _listed(call.exact(_copied(call.tensors)))), name
        self.calls = made

    def inputs(self) -> SearchStrategy[Input]:
        return st.sampled_from(sorted(self.calls)).flatmap(self._inputs_of)

    def _inputs_of(self, name: str) -> SearchStrategy[Input]:
        tensors = sorted(self.calls[name].tensors)
        ways = st.sampled_from([*SAME, *SAME, *WRONG])
        whole = st.tuples(st.sampled_from(tensors), ways, st.just(0), st.just(0))
        numbers = [
            each for each in tensors if not self.calls[name].tensors[each].is_floating_point()
        ] or tensors
        pokes = st.tuples(
            st.sampled_from(numbers), st.just("poked"), st.sampled_from(NUMBERS), st.integers(0, 20)
        )
        changes = st.lists(st.one_of(whole, pokes), min_size=1, max_size=2)
        return st.builds(self._input, st.just(name), changes, st.booleans())

    def _input(self, name: str, changes: list[tuple[str, str, int, int]], again: bool) -> Input:
        recipe = {"call": name, "changes": changes, "after a right call": again}
        done = ", ".join(
            f"{tensor} {way}" + (f" {number}" if number else "") for tensor, way, number, _ in changes
        )
        meaning = "keeps" if all(way in SAME for _, way, _, _ in changes) else "means"
        return Input(name, {FILE: json.dumps(recipe).encode()}, done + (", again" if again else ""), meaning)

    def judge(self, given: Input, folder: Path) -> bool:
        recipe = json.loads(given.files[FILE])
        call = self.calls[recipe["call"]]
        tensors, kept = _copied(call.tensors), None
        if recipe["after a right call"]:
            kept = call.begin()
            call.run(_copied(tensors), kept)
        unreadable = set()
        for name, way, number, at in recipe["changes"]:
            before = tensors[name]
            # To change it once more would be a read outside of ours.
            if name in unreadable:
                return True
            # What a kernel packed is never a view that torch negates: to ask each tensor costs more than it tells.
            if way == "negated" and name in call.hidden:
                return True
            if way in UNREAD:
                unreadable.add(name)
            try:
                tensors[name] = _poked(before, number, at) if way == "poked" else (SAME | WRONG)[way](before)
            # No such tensor: nothing is asked.
            except (RuntimeError, TypeError, ValueError, IndexError, OverflowError):
                return True
        ways = [way for _, way, _, _ in recipe["changes"]]
        own = {
            name: tensor if set(ways) & set(UNREAD) else _alone(tensor) for name, tensor in tensors.items()
        }
        found = _listed(call.run(tensors, kept))
        changed = {name for name, *_ in recipe["changes"]}
        if set(ways) & set(UNREAD) or (changed & call.hidden and not set(ways) <= set(SAME)):
            return True
        try:
            expected = _listed(call.exact(own))
        # The reference has other wrong tensors that it does not take.
        except Exception:
            return True
        return _near(found, expected)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors with their strides: what a call writes is no other's."""
    return {
        name: tensor.detach().clone(memory_format=torch.preserve_format) for name, tensor in tensors.items()
    }


def _alone(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta or tensor.is_sparse else tensor.detach().clone()


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [*result]


def _near(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Tell whether tensors are alike, NaN where NaN is due."""
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return False
        a, b = a.detach().double(), b.detach().double()
        strange = ~(a.isfinite() & b.isfinite())
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.masked_fill(strange, 0), b.masked_fill(strange, 0)
        if (a - b).norm() > WITHIN * b.norm() + 1e-6:
            return False
    return True
