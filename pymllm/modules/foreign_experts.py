"""The experts of other libraries' modules: how their weights are stacked, and proof that we compute the same.

transformers keeps all experts of a layer in one module, whose parameters have an axis of experts first. Names differ,
and so do the order of axes, where the gate lies, the activation, and how the module is called. `read_experts` says all
of that of a module, by its parameters' shapes and not by its class, and then runs a small copy of the module against
what it said. Modules on the meta device can be read, too.
"""

# E experts, H hidden size, I intermediate size, T tokens, K experts a token

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymllm.kernels.gated_activation import GatedActivation, OtherActivation
from pymllm.modules.twin import ALL_SIZES, answer, arguments_of, near, shrunk, twin_of

JOINED, APART, UNGATED = ("gate_up_proj",), ("gate_proj", "up_proj"), ("up_proj",)
DOWN = "down_proj"
ROUTED = ("hidden_states", "top_k_index", "top_k_weights")  # what transformers calls the arguments of most
FUNCTIONS = ("act_fn", "activation_fn", "act")  # what modules call the function between their products


@dataclass(frozen=True)
class ForeignExperts:
    """The layout of a module's experts.

    gate_up: the parameters of the first product: gate and up in one, or one each, or up alone (`gated` is False).
    bias: whether each product has one, in a parameter NAME_bias [E, outputs].
    interleaved: gate and up take turns along the outputs; else the gate's come first.
    transposed: a stack is [E, inputs, outputs]; else [E, outputs, inputs].
    calls: how the module is called. "routed": (x [T, H], expert of each [T, K], its weight [T, K]); "weighted":
    (x, a weight of every expert [T, E]); "sorted": (rows [E·T, H], as many for each expert, in order).
    arguments: the names of the arguments.  identities: so many indices beyond the experts' return their input.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: GatedActivation
    gate_up: tuple[str, ...]
    down: str = DOWN
    gated: bool = True
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    calls: Literal["routed", "weighted", "sorted"] = "routed"
    arguments: tuple[str, ...] = ()
    identities: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the stacks, as parameters of the module."""
        return (*self.gate_up, self.down)

    @property
    def bias_names(self) -> tuple[str, ...]:
        """Return the names of the biases, as parameters of the module."""
        return tuple(f"{name}_bias" for name in self.names) if self.bias else ()

    def gate_up_of(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """Return the first product's weight of one expert, [2·I, H] with the gate's outputs first."""
        return torch.cat([self._outputs_first(tensors[name][expert]) for name in self.gate_up])

    def down_of(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """Return the second product's weight of one expert, [H, I]."""
        weight = tensors[self.down][expert]
        return weight.t() if self.transposed else weight

    def biases(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the biases of all experts, [E, 2·I] with the gate's first and [E, H]; None if there are none."""
        if not self.bias:
            return None
        first = torch.cat([tensors[f"{name}_bias"] for name in self.gate_up], dim=1)
        if self.interleaved:
            first = torch.cat((first[:, ::2], first[:, 1::2]), dim=1)
        return first, tensors[f"{self.down}_bias"]

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
        ids, weights = (each.reshape(-1, each.shape[-1]) for each in rest)
        return x, ids, weights

    def _outputs_first(self, weight: Tensor) -> Tensor:
        weight = weight.t() if self.transposed else weight
        return torch.cat((weight[::2], weight[1::2])) if self.interleaved else weight


class OwnGate:
    """A module's own function between its products, without the module's weights.

    husk: a copy of the module without its stacks.  interleaved: it expects gate and up to take turns.
    """

    def __init__(self, husk: nn.Module, gated: bool, interleaved: bool) -> None:
        self.husk, self.gated, self.interleaved = husk, gated, interleaved

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute it.  hidden: [*, 2·I], gate first, or [*, I] where there is no gate.  Returns [*, I]."""
        own: Any = getattr(self.husk, "_apply_gate", None)
        if not self.gated:
            return self._function()(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if own is None:
            return self._function()(gate) * up
        return own(torch.stack((gate, up), dim=-1).flatten(-2) if self.interleaved else hidden)

    def _function(self) -> Callable[[Tensor], Tensor]:
        return next(f for name in FUNCTIONS if callable(f := getattr(self.husk, name, None)))


def stacks_of(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the stacks of experts among a module's own parameters, down's last; None: it has none."""
    stacked = {
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3
    }
    for names in (JOINED, APART, UNGATED):
        if {*names, DOWN} <= stacked:
            return (*names, DOWN)
    return None


def read_experts(module: nn.Module) -> ForeignExperts | str:
    """Say how a module stacks its experts, or why that cannot be said.

    What is returned is proven: a copy of the module with random weights computes what `compute` does.
    """
    names = stacks_of(module)
    if names is None:
        return "it has no stacks of experts that are known by their names"
    facts = _read_shapes(module, names)
    if isinstance(facts, str):
        return facts
    husk = twin_of(module, {})
    own = OwnGate(husk, facts.gated, facts.interleaved)
    tried = _activations(module, own, facts)
    if isinstance(tried, str):
        return tried
    return _prove(module, facts, tried)


def compute(
    facts: ForeignExperts, tensors: Mapping[str, Tensor], x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Compute each token's weighted sum over its experts, one at a time, in the weights' dtype.

    x: [T, H].  ids, weights: [T, K].  Returns [T, H].
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


def _read_shapes(module: nn.Module, names: tuple[str, ...]) -> ForeignExperts | str:
    """Read all but the activation from the parameters' shapes, the module's attributes and its forward's arguments."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    *first, down = names
    gated = names != (*UNGATED, DOWN)
    joined = len(first) == 1 and gated
    given = [name for name in names if f"{name}_bias" in held]
    if given and len(given) < len(names):
        return f"{given[0]} has a bias, and not all products have one"
    expected = {*names, *(f"{name}_bias" for name in given)}
    if strange := [name for name in held if name not in expected]:
        return f"its parameter {strange[0]} is no part of experts as they are known here"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's answer before it weighs it"
    for name, child in module.named_children():
        if name not in FUNCTIONS and any(True for _ in (*child.parameters(), *child.buffers())):
            return f"its submodule {name} is no part of experts as they are known here"
    if module._buffers:
        return f"its buffer {next(iter(module._buffers))} is no part of experts as they are known here"
    if not all(held[name].is_floating_point() and held[name].itemsize > 1 for name in names):
        return "its weights hold no floats"
    shapes = [tuple(held[name].shape) for name in names]
    (all_experts, *sides), (num_experts, *back) = shapes[0], shapes[-1]
    half = 2 if joined else 1
    same = len(set(shapes[:-1])) == 1
    fits = {
        False: same and sides == [half * back[1], back[0]],
        True: same and sides == [back[1], half * back[0]],
    }
    if not any(fits.values()):
        stacks = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        return f"its stacks fit no layout of experts: {stacks}"
    said = bool(
        getattr(module, "is_transposed", False)
    )  # decides where both fit: without a gate, or with two stacks
    transposed = said if all(fits.values()) else fits[True]
    hidden, intermediate = (back[1], back[0]) if transposed else (back[0], back[1])
    arguments = arguments_of(module)
    calls: Any = {1: "sorted", 2: "weighted", 3: "routed"}.get(len(arguments))
    if calls is None:
        return f"its forward takes {len(arguments)} arguments, and not tokens, their experts and weights"
    if all_experts < num_experts:
        return f"its stacks hold {all_experts} and {num_experts} experts"
    return ForeignExperts(
        hidden,
        intermediate,
        num_experts,
        GatedActivation(),
        tuple(first),
        down,
        gated=gated,
        bias=bool(given),
        interleaved=joined and not getattr(module, "is_concatenated", True),
        transposed=transposed,
        calls=calls,
        arguments=arguments,
        identities=all_experts - num_experts,
    )


def _activations(module: nn.Module, own: OwnGate, facts: ForeignExperts) -> list[GatedActivation] | str:
    """List activations to try: the one that equals the module's own function, or that function.

    A module without such a function may compute any of ours; the proof finds which.
    """
    alpha = _number(module, ("alpha", "swiglu_alpha"), 1.0)
    limit = _number(module, ("limit", "swiglu_limit"), float("inf"))
    known = [GatedActivation("silu"), GatedActivation("gelu_tanh"), GatedActivation("swiglu", alpha, limit)]
    probe = torch.linspace(-30, 30, 241, dtype=torch.float64)
    probe = torch.stack((probe.repeat(3), torch.cat((probe.flip(0), probe / 9, torch.ones_like(probe)))), -1)
    hidden = probe.t().reshape(1, -1) if facts.gated else probe[:, 0]
    try:
        found = own(hidden)
    except StopIteration:
        return known if facts.gated else "it says nowhere which activation stands between its products"
    except Exception as error:
        return f"its activation cannot be evaluated by itself: {error}"
    if facts.gated:
        for each in known:
            close = torch.isclose(found.double(), each(hidden), rtol=1e-6, atol=1e-6)
            if found.shape == each(hidden).shape and bool(close.all()):
                return [each]
    function = (getattr(own.husk, "_apply_gate", None) if facts.gated else None) or own._function()
    owner = getattr(function, "__self__", function)
    name = type(owner).__name__ if isinstance(owner, nn.Module) else getattr(function, "__name__", "other")
    return [OtherActivation(function=own, name=f"{name}'s own" if owner is own.husk else name)]


def _number(module: nn.Module, names: tuple[str, ...], default: float) -> float:
    values = (getattr(module, name, None) for name in names)
    return next((float(v) for v in values if isinstance(v, (int, float))), default)


def _prove(module: nn.Module, facts: ForeignExperts, tried: list[GatedActivation]) -> ForeignExperts | str:
    """Run a copy of the module, and return the facts with the activation that gives the same.

    The copy is small: its sizes are replaced wherever the module keeps them. A module that keeps them elsewhere is run
    in its own size, if that is small, too.
    """
    own = (facts.num_experts, facts.hidden_size, facts.intermediate_size)
    elements = facts.num_experts * facts.hidden_size * facts.intermediate_size
    reason = ""
    for small in (shrunk(*own), own if elements <= ALL_SIZES else None):
        if small is None:
            continue
        for activation in tried:
            found = _run(module, facts, activation, small)
            if found is None:
                return replace(facts, activation=activation)
            reason = reason or found
    return reason


def _run(
    module: nn.Module, facts: ForeignExperts, activation: GatedActivation, sizes: tuple[int, int, int]
) -> str | None:
    """Say how a copy of these sizes, (E, H, I), differs from `compute`, or None."""
    experts, hidden, intermediate = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def stack(count: int, outputs: int, inputs: int) -> nn.Parameter:
        sides = (inputs, outputs) if facts.transposed else (outputs, inputs)
        return nn.Parameter(random(count, *sides, scale=inputs**-0.5), requires_grad=False)

    together = experts + facts.identities
    first = intermediate * (2 if facts.gated and len(facts.gate_up) == 1 else 1)
    tensors = {name: stack(together, first, hidden) for name in facts.gate_up}
    tensors[facts.down] = stack(experts, hidden, intermediate)
    if facts.bias:
        for name in facts.names:
            outputs = hidden if name == facts.down else first
            tensors[f"{name}_bias"] = nn.Parameter(random(experts, outputs), requires_grad=False)
    replaced = {
        facts.hidden_size: hidden,
        facts.intermediate_size: intermediate,
        2 * facts.intermediate_size: 2 * intermediate,
        facts.num_experts: experts,
        facts.num_experts + facts.identities: together,
    }
    twin = twin_of(module, dict(tensors), replaced)
    of = replace(
        facts,
        activation=activation,
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
    )
    tokens = 2 * experts if facts.calls == "sorted" else 7
    x = random(tokens, hidden) * torch.logspace(-1, 1.2, tokens, dtype=torch.float64).unsqueeze(1)
    if facts.calls == "sorted":
        ids, weights = torch.arange(experts).repeat_interleave(2).unsqueeze(1), torch.ones(tokens, 1).double()
    else:
        order = torch.stack([torch.randperm(together, generator=generator) for _ in range(tokens)])
        ids = torch.arange(experts).expand(tokens, -1) if facts.calls == "weighted" else order[:, :2]
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + 0.1
    given = {"routed": (x.clone(), ids, weights), "weighted": (x.clone(), weights), "sorted": (x.clone(),)}
    found = answer(twin, *given[facts.calls])
    if isinstance(found, str):
        return found
    expected = compute(of, tensors, x, ids, weights)
    if not near(found, expected):
        return f"its forward computes something else than routed experts with {activation} do"
    return None
