"""Linear layers that a forward of transformers calls with one tensor, computed in one product.

Which they are is seen as the model is probed: siblings that got the very same tensor, once each. One layer of ours has
their weights side by side, under their names; a thin module in the place of each hands out its own outputs.
"""

# I in_features, O out_features of a part

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pymllm.layers.linear import MergedColumnParallelLinear
from pymllm.models.generic.layers import ReadWeight, is_plain_linear, is_router
from pymllm.models.generic.probe import Probe
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import bound_weight


@dataclass(frozen=True)
class Siblings:
    """Linear layers of one module that are called with one tensor.  names: within their parent, in order of calls."""

    parent: str
    names: tuple[str, ...]

    def paths(self) -> tuple[str, ...]:
        """Return their full names."""
        return tuple(f"{self.parent}.{name}" if self.parent else name for name in self.names)


class _Taken:
    """The outputs that a product has computed and the parts have not taken yet.

    x, version: the tensor that was multiplied, and how often it had been written to.  outputs: by part; None: taken.
    """

    def __init__(self, x: Tensor, outputs: list[Tensor | None]) -> None:
        self.x, self.version, self.outputs = x, _version(x), outputs


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class FusedLinear(MergedColumnParallelLinear):
    """Several linear layers in one matmul, asked for one by one.

    The first that is called with a tensor computes all; the others, called with the same, take theirs. It is right in
    any order: a part that is asked for twice, or with another tensor, has all computed anew.
    contiguous: whether the class's forward needs outputs without gaps.
    """

    def __init__(
        self,
        siblings: Siblings,
        modules: list[Any],
        contiguous: bool,
        quant_config: QuantizationConfig | None,
    ) -> None:
        first = modules[0]
        super().__init__(
            first.in_features,
            [module.out_features for module in modules],
            first.bias is not None,
            gather_output=False,
            part_names=siblings.names,
            prefix=".".join(filter(None, (siblings.parent, "_".join(siblings.names)))),
            quant_config=quant_config,
        )
        self.contiguous = contiguous
        # What changes in a step is no attribute of a layer, as these are counted (`RevisedModule`).
        self._state: dict[str, _Taken] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return the outputs of a part.  x: [*, I].  Returns [*, O]."""
        taken = self._state.get("taken")
        known = taken is not None and taken.x is x and taken.version == _version(x)
        if taken is None or not known or taken.outputs[index] is None:
            taken = self._state["taken"] = _Taken(x, list(self(x).split(self.output_sizes, dim=-1)))
        output, taken.outputs[index] = taken.outputs[index], None
        if all(other is None for other in taken.outputs):
            del self._state["taken"]
        assert output is not None
        return output.contiguous() if self.contiguous else output


class FusedPart(nn.Module):
    """A linear layer of transformers' whose weight is a part of a fused layer's."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.__dict__["fused"] = fused  # no child: it has its own place in the model
        self.index, self.in_features = index, fused.in_features
        self.out_features = fused.output_sizes[index]

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Multiply the one argument, [*, I].  Returns [*, O]."""
        (x,) = (*args, *named.values())
        return self.fused.part(self.index, x)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and all(bound_weight(held.packed_in) for held in self.fused.held()):
            return ReadWeight(self.fused, self.index)
        if name == "bias":
            bias = self.fused.bias
            return None if bias is None else bias.split(self.fused.output_sizes)[self.index]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"part {self.index} of {self.fused.prefix}"


def find_siblings(model: nn.Module, found: Probe, tied: Iterable[str]) -> tuple[list[Siblings], list[str]]:
    """Find the linear layers that can be computed together, and say which cannot, and why.

    tied: names of modules whose weights are another's, too.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    left = set(tied)
    shared: dict[tuple[str, int, int], list[str]] = {}
    for name, inputs in found.inputs.items():
        module, parent = modules.get(name), name.rpartition(".")[0]
        if is_plain_linear(module) and not is_router(module, name) and name not in left:
            for x, version in zip(inputs, found.versions[name], strict=True):
                shared.setdefault((parent, id(x), version), []).append(name)
    groups: list[Siblings] = []
    notes: dict[str, None] = {}
    for (parent, _, _), names in shared.items():
        if len(set(names)) < 2:
            continue
        by: dict[Any, list[str]] = {}
        for name in names:
            module = modules[name]
            kind = (module.bias is not None, module.weight.dtype, len(found.inputs[name]) == 1)
            by.setdefault(kind, []).append(name)
        for (_, _, once), alike in by.items():
            if once and len(alike) > 1:
                groups.append(Siblings(parent, tuple(name.rpartition(".")[2] for name in alike)))
            if not once or len(by) > 1:
                why = "they have biases or dtypes of their own" if once else "they are called several times"
                notes[_without_index(f"{', '.join(alike)}: by themselves, as {why}")] = None
    return groups, list(notes)


def _without_index(text: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", text)


def put_siblings(
    model: nn.Module, siblings: Siblings, contiguous: bool, quant_config: QuantizationConfig | None
) -> None:
    """Put one layer of ours, and its parts, in the places of siblings."""
    parent = model.get_submodule(siblings.parent)
    fused = FusedLinear(
        siblings, [parent._modules[name] for name in siblings.names], contiguous, quant_config
    )
    own = "_".join(siblings.names)
    children: dict[str, nn.Module | None] = {}
    for name, module in parent._modules.items():
        if name == siblings.names[0]:
            children[own] = fused
        part = name in siblings.names
        children[name] = FusedPart(fused, siblings.names.index(name)) if part else module
    parent._modules.clear()
    parent._modules.update(children)
