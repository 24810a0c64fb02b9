"""Tensors that transformers' class has in another form than the checkpoint: several in one, one in several, turned.

They are made as they are read, by transformers' own operations. What is missing among the parts of one, doubled, or of
another shape than its fellows, is found from headers.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import nearest
from pymllm.weights.report import Problem, raise_problems
from pymllm.weights.tensor_file import TensorInfo

NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class ConvertedTensor(TensorInfo):
    """A tensor that is made of stored ones as it is read.  sources: these.  convert: makes it of their values."""

    sources: tuple[TensorInfo, ...] = field(repr=False)  # type: ignore[misc]
    convert: Callable[[], Tensor] = field(repr=False)

    def read(self, index: tuple[slice, ...] | None = None, out: Tensor | None = None) -> Tensor:
        made = self.convert()[tuple(slice(*bound) for bound in self._bounds(index))]
        return made.contiguous() if out is None else out.copy_(made)


@dataclass(frozen=True)
class Part:
    """A stored tensor that others are made of.

    name: after transformers' renamings.  pattern: the converter's that takes it.
    """

    name: str
    pattern: str
    info: TensorInfo


def describe(
    model: Any,
    target: str,
    converter: Any,
    parts: list[Part],
    shapes: Mapping[str, torch.Size],
    stray: Sequence[str],
) -> dict[str, TensorInfo]:
    """Describe the tensors that a converter makes of parts, without reading any.

    model: transformers'.  target: the (first) tensor that is made.  shapes: of the model's tensors, by name.
    stray: the stored tensors that nothing asks for, among which a misspelt part would be.
    CheckpointError for a part that is missing, or does not fit.
    """
    parts = sorted(parts, key=lambda part: _in_order(part.name))

    def run(read: Callable[[TensorInfo], Tensor]) -> dict[str, Tensor]:
        one = copy.deepcopy(converter)
        for part in parts:
            one.add_tensor(target, part.info.name, part.pattern, _reader(read, part.info))
        made = one.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    raise_problems(str(parts[0].info.file.path), _missing(converter, parts, shapes.get(target), stray))
    raise_problems(str(parts[0].info.file.path), _other_dtypes(parts))
    try:
        made = run(lambda info: torch.empty(info.shape, dtype=info.dtype, device="meta"))
    except Exception as error:
        raise_problems(str(parts[0].info.file.path), _misshapen(target, parts, shapes, str(error)))
        raise
    if any(name in shapes and shapes[name] != meta.shape for name, meta in made.items()):
        found = ", ".join(f"{name} {list(meta.shape)}" for name, meta in made.items())
        raise_problems(str(parts[0].info.file.path), _misshapen(target, parts, shapes, f"they make {found}"))
    first, infos = parts[0].info, tuple(part.info for part in parts)
    return {
        name: ConvertedTensor(
            *(name, first.dtype_name, meta.dtype, tuple(meta.shape), first.file, 0, meta.nbytes),
            sources=infos,
            convert=_one_of(run, name),
        )
        for name, meta in made.items()
    }


def _missing(
    converter: Any, parts: list[Part], shape: torch.Size | None, stray: Sequence[str]
) -> list[Problem]:
    """List the parts that are not there: of a pattern that has none, or fewer numbers than another one, or the shape.

    shape: of what is made.  stray: as for `describe`.
    """
    by_pattern = {
        pattern: [p for p in parts if p.pattern == pattern] for pattern in converter.source_patterns
    }
    numbers = {pattern: {_number(pattern, p.name): p for p in found} for pattern, found in by_pattern.items()}
    every = set().union(*numbers.values())
    counted = [number + 1 for number in every if number is not None]
    if counted:
        stacks = any(type(operation).__name__ == "MergeModulelist" for operation in converter.operations)
        every = set(range(max(*counted, shape[0] if stacks and shape else 0)))
    problems = []
    for pattern, found in numbers.items():
        for number in sorted(every - set(found), key=lambda n: n or 0):
            name = _spell(parts[0], pattern, number)
            text = f"missing; others that go into one tensor with it are there. {nearest(name, stray)}"
            problems.append(Problem("missing", name, text.strip()))
    return problems


def _other_dtypes(parts: list[Part]) -> list[Problem]:
    """List the parts that are not of the dtype that most have."""
    usual = Counter(part.info.dtype_name for part in parts).most_common(1)[0][0]
    return [
        Problem("dtype", p.info.name, f"wrong dtype; expected {usual}, found {p.info.dtype_name}")
        for p in parts
        if p.info.dtype_name != usual
    ]


def _number(pattern: str, name: str) -> int | None:
    """Return the number that stands for a pattern's star in a name, or None: the pattern has none."""
    if "*" not in pattern:
        return None
    head = pattern.split("*")[0].split(".")[-2].replace("\\", "")
    found = re.search(rf"(?:^|\.){re.escape(head)}\.(\d+)\.", name)
    return int(found[1]) if found else None


def _spell(like: Part, pattern: str, number: int | None) -> str:
    """Spell the stored name of a part by that of another one."""
    mine, theirs = (one.replace("\\", "").rpartition("*")[2].strip("^$") for one in (pattern, like.pattern))
    name = like.info.name
    name = name.removesuffix(theirs) + mine if name.endswith(theirs) else f"{name.rpartition('.')[0]}.{mine}"
    old = _number(like.pattern, like.name)
    if number is not None and old is not None:
        head = pattern.split("*")[0].split(".")[-2].replace("\\", "")
        name = re.sub(rf"(^|\.){re.escape(head)}\.{old}\.", rf"\g<1>{head}.{number}.", name)
    return name


def _misshapen(target: str, parts: list[Part], shapes: Mapping[str, torch.Size], why: str) -> list[Problem]:
    """List the parts that are not like most others of their pattern; all of them where none differs."""
    usual: dict[str, Any] = {}
    for pattern in {part.pattern for part in parts}:
        counts = Counter((p.info.shape, p.info.dtype_name) for p in parts if p.pattern == pattern)
        usual[pattern] = counts.most_common(1)[0][0]
    odd = [p for p in parts if (p.info.shape, p.info.dtype_name) != usual[p.pattern]]
    expected = f"what makes {target} {list(shapes[target])}" if target in shapes else f"what makes {target}"
    why = " ".join(why.split())[:200]
    return [
        Problem("shape", p.info.name, f"wrong shape; expected {expected}, found {list(p.info.shape)}: {why}")
        for p in odd or parts
    ]


def _in_order(name: str) -> list[Any]:
    """Return what orders names by the numbers in them, as transformers does: part 2 before part 10."""
    return [int(piece) if piece.isdigit() else piece for piece in NUMBER.split(name)]


def _reader(read: Callable[[TensorInfo], Tensor], info: TensorInfo) -> Callable[[], Tensor]:
    return lambda: read(info)


def _one_of(run: Callable[..., dict[str, Tensor]], name: str) -> Callable[[], Tensor]:
    return lambda: run(lambda info: info.read())[name]
