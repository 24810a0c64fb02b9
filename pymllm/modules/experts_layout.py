"""The layouts in which modules of other libraries stack their experts, as their parameters' shapes allow them."""

# E experts, H hidden size, I intermediate size, T tokens, K experts a token

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymllm.kernels.gated_activation import GatedActivation
from pymllm.modules.twin import arguments_of

# The first product's stacks by their usual names, and whether there is a gate.
USUAL: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_up_proj",), "down_proj", True),
    (("gate_proj", "up_proj"), "down_proj", True),
    (("up_proj",), "down_proj", False),
    (("w13",), "w2", True),
    (("w1", "w3"), "w2", True),
    (("w1", "v1"), "w2", True),
)
ROUTED = ("hidden_states", "top_k_index", "top_k_weights")  # what transformers calls the arguments of most
ROLES = (("x", "ids", "weights"), ("x", "weights", "ids"))


@dataclass(frozen=True)
class ForeignExperts:
    """The layout of a module's experts.

    gate_up: the parameters of the first product: gate and up in one, or one each, or up alone (`gated` is False).
    down: that of the second one.  All are paths below the module.
    bias: whether each product has one, in a parameter NAME_bias [E, outputs].
    interleaved: gate and up take turns along the outputs; else the gate's come first.
    transposed, down_transposed: a stack is [E, inputs, outputs]; else [E, outputs, inputs].
    flat: the experts lie one below the other in two dimensions, [E·rows, columns].
    calls: how the module is called. "routed": (x [T, H], expert of each [T, K], its weight [T, K]), in the order of
    `roles`; "weighted": (x, a weight of every expert [T, E]); "sorted": (rows [E·T, H], as many for each expert).
    arguments: the names of the arguments.  identities: so many indices beyond the experts' return their input.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: GatedActivation
    gate_up: tuple[str, ...]
    down: str
    gated: bool = True
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    down_transposed: bool = False
    flat: bool = False
    calls: Literal["routed", "weighted", "sorted"] = "routed"
    roles: tuple[str, ...] = ROLES[0]
    arguments: tuple[str, ...] = ()
    identities: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stacks, as paths of parameters below the module."""
        return (*self.gate_up, self.down)

    @property
    def bias_names(self) -> tuple[str, ...]:
        """The names of the biases, as parameters of the module."""
        return tuple(f"{name}_bias" for name in self.names) if self.bias else ()

    def sides(self, name: str) -> tuple[int, int]:
        """Return the two sizes of one expert's part of a stack, as it lies there."""
        if name == self.down:
            outputs, inputs, turned = self.hidden_size, self.intermediate_size, self.down_transposed
        else:
            outputs, inputs, turned = self.intermediate_size, self.hidden_size, self.transposed
            outputs *= 2 if self.gated and len(self.gate_up) == 1 else 1
        return (inputs, outputs) if turned else (outputs, inputs)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's stacks, [E, ...], and its biases, [E, outputs], by name."""
        held = {name: module.get_parameter(name).detach() for name in (*self.names, *self.bias_names)}
        if self.flat:
            held |= {name: held[name].view(-1, *self.sides(name)) for name in self.names}
        return held

    def gate_up_of(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """Return the first product's weight of one expert, [2·I, H] with the gate's outputs first."""
        return torch.cat([self._outputs_first(tensors[name][expert]) for name in self.gate_up])

    def down_of(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """Return the second product's weight of one expert, [H, I]."""
        weight = tensors[self.down][expert]
        return weight.t() if self.down_transposed else weight

    def biases(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the biases of all experts, [E, 2·I] with the gate's first and [E, H]; None if there are none."""
        if not self.bias:
            return None
        first = torch.cat([tensors[f"{name}_bias"] for name in self.gate_up], dim=1)
        if self.interleaved:
            first = torch.cat((first[:, ::2], first[:, 1::2]), dim=1)
        return first, tensors[f"{self.down}_bias"]

    def stacked(self, name: str, weights: Sequence[Tensor]) -> Tensor:
        """Put weights of all experts into the layout of a stack.  weights: as of `gate_up_of` or `down_of`."""
        together = torch.stack(list(weights))
        turned = self.down_transposed
        if name != self.down:
            together, turned = (
                together.chunk(len(self.gate_up), dim=1)[self.gate_up.index(name)],
                self.transposed,
            )
            if self.interleaved:
                together = torch.stack(together.chunk(2, dim=1), dim=2).flatten(1, 2)
        together = together.transpose(1, 2) if turned else together
        return together.flatten(0, 1) if self.flat else together

    def routed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Read the arguments of a call: x as it came, [*, H], the experts of each token and their weights, [T, K].

        TypeError for other arguments than the module has.
        """
        given = dict(zip(self.arguments, args)) | dict(kwargs)  # noqa: B905 (named arguments follow)
        names = [own if own in given else usual for own, usual in zip(self.arguments, ROUTED, strict=False)]
        if strange := sorted(given.keys() ^ set(names)):
            raise TypeError(
                f"experts take {', '.join(self.arguments)}; {', '.join(strange)} is missing or unknown"
            )
        x, *rest = (given[name] for name in names)
        tokens = x.numel() // self.hidden_size
        experts = torch.arange(self.num_experts, device=x.device)
        if self.calls == "sorted":
            ids = experts.repeat_interleave(tokens // self.num_experts).unsqueeze(1)
            return x, ids, torch.ones(ids.shape, device=x.device)
        if self.calls == "weighted":
            weights = rest[0].reshape(-1, self.num_experts)
            return x, experts.expand(weights.shape), weights
        ids, weights = (rest[self.roles.index(role) - 1] for role in ("ids", "weights"))
        return x, ids.reshape(tokens, -1), weights.reshape(tokens, -1)

    def _outputs_first(self, weight: Tensor) -> Tensor:
        weight = weight.t() if self.transposed else weight
        return torch.cat((weight[::2], weight[1::2])) if self.interleaved else weight


def compute(
    facts: ForeignExperts, tensors: Mapping[str, Tensor], x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Compute each token's weighted sum over its experts, one at a time, in the weights' dtype.

    tensors: as `ForeignExperts.tensors` returns them.  x: [T, H].  ids, weights: [T, K].  Returns [T, H].
    """
    total, biases = torch.zeros_like(x), facts.biases(tensors)
    for token, chosen in enumerate(ids.tolist()):
        for expert, weight in zip(chosen, weights[token], strict=True):
            if expert >= facts.num_experts:
                total[token] += weight * x[token] if expert < facts.num_experts + facts.identities else 0
                continue
            hidden = facts.gate_up_of(tensors, expert) @ x[token]
            hidden = facts.activation(hidden if biases is None else hidden + biases[0][expert])
            out = facts.down_of(tensors, expert) @ hidden
            total[token] += weight * (out if biases is None else out + biases[1][expert])
    return total


def candidates(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that may be stacks of experts, by their paths below a module; none: there are none.

    They are a module's own with three dimensions, two or more of them; or, where it has none and says how many experts
    it has, those with two dimensions of its only submodule with parameters, which are of one shape.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    stacks = {name: p for name, p in own.items() if p.ndim == 3}
    if len(stacks) > 1:
        return dict(stacks)
    holders = [
        (name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None
    ]
    if own or len(holders) != 1 or not _counts(module):
        return {}
    (path, child), *_ = holders
    flat = {f"{path}.{name}": p for name, p in child._parameters.items() if p is not None and p.ndim == 2}
    alike = len({p.shape for p in flat.values()}) == 1 and len(flat) == 3
    return dict(flat) if alike and len(list(child.parameters())) == 3 else {}


def layouts(module: nn.Module, held: Mapping[str, Tensor]) -> Iterator[ForeignExperts]:
    """Yield the layouts that the shapes of a module's stacks allow, the likeliest first.

    held: as of `candidates`.  The activation is not known yet.
    """
    arguments = arguments_of(module)
    calls: Any = {1: "sorted", 2: "weighted", 3: "routed"}.get(len(arguments))
    said = bool(getattr(module, "is_transposed", False))
    # Both products lie alike in most modules.
    turns = sorted(
        itertools.product((False, True), repeat=2), key=lambda turn: (turn[0] != turn[1], turn[0] != said)
    )
    told = hasattr(module, "is_concatenated") or hasattr(module, "_apply_gate")
    turning = [not getattr(module, "is_concatenated", True)] if told else [False, True]
    for (first, down, gated), (turned, down_turned) in itertools.product(_orders(held), turns):
        joined = gated and len(first) == 1
        for interleaved in turning if joined else [False]:
            for roles in ROLES if calls == "routed" else ROLES[:1]:
                shape = _sizes(
                    module, [held[name] for name in first], held[down], joined, turned, down_turned
                )
                if shape is None:
                    continue
                experts, hidden, intermediate, identities = shape
                yield ForeignExperts(
                    hidden,
                    intermediate,
                    experts,
                    GatedActivation(),
                    first,
                    down,
                    gated=gated,
                    bias=f"{down}_bias" in module._parameters
                    and module._parameters[f"{down}_bias"] is not None,
                    interleaved=interleaved,
                    transposed=turned,
                    down_transposed=down_turned,
                    flat=held[down].ndim == 2,
                    calls=calls,
                    roles=roles,
                    arguments=arguments,
                    identities=identities,
                )


def _orders(held: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield which stack is which: first the usual names, then any order.  Each with whether there is a gate."""
    known = {name.rpartition(".")[2]: name for name in held}
    for names, last, gated in USUAL:
        if {*names, last} == known.keys():
            yield tuple(known[name] for name in names), known[last], gated
            return
    for *first, down in itertools.permutations(held) if len(held) < 4 else ():
        yield tuple(first), down, True
        if len(first) == 1:
            yield tuple(first), down, False


def _sizes(
    module: nn.Module, first: Sequence[Tensor], down: Tensor, joined: bool, turned: bool, down_turned: bool
) -> tuple[int, int, int, int] | None:
    """Return E, H, I and how many indices beyond E the first stacks have, if the shapes are of this layout."""
    shapes = {tuple(weight.shape) for weight in first}
    if len(shapes) > 1:
        return None
    (rows, *sides), (count, *back) = shapes.pop(), down.shape
    if down.ndim == 2:
        counts = [number for number in _counts(module) if count % number == 0]
        if not counts:
            return None
        experts = counts[0]
        sides, back, rows, count = [rows // experts, *sides], [count // experts, *back], experts, experts
    outputs, inputs = sides[::-1] if turned else sides
    hidden, intermediate = back[::-1] if down_turned else back
    if inputs != hidden or outputs != intermediate * (2 if joined else 1) or rows < count:
        return None
    return count, hidden, intermediate, rows - count


def _counts(module: nn.Module) -> list[int]:
    """List the numbers that a module calls its experts'."""
    return [v for name, v in vars(module).items() if "experts" in name and type(v) is int and v > 0]
