"""The experts of other libraries' modules: how their weights are stacked, and proof that we compute the same.

transformers keeps all experts of a layer in one module, whose parameters have an axis of experts first. Names differ,
and so do the order of axes, where the gate lies, the activation, and how the module is called. `read_experts` says all
of that of a module, by its parameters' shapes and not by its class, and then runs a small copy of the module against
what it said. Modules on the meta device can be read, too.
"""

# E experts, H hidden size, I intermediate size, T tokens, K experts a token

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.kernels.gated_activation import GatedActivation, OtherActivation
from pymllm.modules.experts_layout import ForeignExperts, candidates, compute, layouts
from pymllm.modules.twin import ALL_SIZES, answer, near, shrunk, twin_of

__all__ = ["ForeignExperts", "OwnGate", "compute", "read_experts", "stacks_of"]

FUNCTIONS = ("act_fn", "activation_fn", "act")  # what modules call the function between their products


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
            return self.function()(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if own is None:
            return self.function()(gate) * up
        return own(torch.stack((gate, up), dim=-1).flatten(-2) if self.interleaved else hidden)

    def function(self) -> Callable[[Tensor], Tensor]:
        """Return the module's activation.  StopIteration if it has none by the usual names."""
        holders = (self.husk, *self.husk.children())
        return next(f for h in holders for name in FUNCTIONS if callable(f := getattr(h, name, None)))


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """Return the paths of what may be stacks of experts in a module; none: it has none."""
    return tuple(candidates(module))


def read_experts(module: nn.Module) -> ForeignExperts | str:
    """Say how a module stacks its experts, or why that cannot be said.

    What is returned is proven: a copy of the module with random weights computes what `compute` does.
    """
    held = candidates(module)
    if not held:
        return "it has no stacks of experts"
    reason = _why_strange(module, held)
    for facts in layouts(module, held) if reason is None else ():
        if facts.calls is None:
            return (
                f"its forward takes {len(facts.arguments)} arguments, not tokens, their experts and weights"
            )
        tried = _activations(module, facts)
        found = tried if isinstance(tried, str) else _prove(module, facts, tried)
        if isinstance(found, ForeignExperts):
            return found
        reason = reason or found
    stacks = ", ".join(f"{name} {list(weight.shape)}" for name, weight in held.items())
    return reason or f"its stacks fit no layout of experts: {stacks}"


def _why_strange(module: nn.Module, held: Mapping[str, Tensor]) -> str | None:
    """Say what a module has besides experts as they are known, or why its weights cannot be read; None: nothing."""
    if not all(weight.is_floating_point() and weight.itemsize > 1 for weight in held.values()):
        return "its weights hold no floats"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's answer before it weighs it"
    own = {name for name, p in module._parameters.items() if p is not None}
    biases = {f"{name}_bias" for name in held} & own
    if biases and len(biases) < len(held):
        return f"it has {min(biases)}, and not all products have a bias"
    for name in own - biases - held.keys():
        return f"its parameter {name} is no part of experts as they are known here"
    for name in module._buffers:
        return f"its buffer {name} is no part of experts as they are known here"
    for name in _states(module):
        if name not in held and name.split(".")[-2] not in FUNCTIONS:
            return f"its submodule's {name} is no part of experts as they are known here"
    return None


def _states(module: nn.Module) -> Iterator[str]:
    """Yield the paths of the parameters and buffers of a module's submodules."""
    for name, child in module.named_children():
        for below, _ in (*child.named_parameters(), *child.named_buffers()):
            yield f"{name}.{below}"


def _activations(module: nn.Module, facts: ForeignExperts) -> list[GatedActivation] | str:
    """List activations to try: the one that equals the module's own function, or that function.

    A module without such a function may compute any of ours; the proof finds which.
    """
    own = OwnGate(_husk(module, facts), facts.gated, facts.interleaved)
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
    except Exception as error:  # whatever another library's code may raise
        return f"its activation cannot be evaluated by itself: {error}"
    if facts.gated:
        for each in known:
            expected = each(hidden)
            if found.shape == expected.shape and torch.allclose(found.double(), expected, 1e-6, 1e-6):
                return [each]
    function = (getattr(own.husk, "_apply_gate", None) if facts.gated else None) or own.function()
    owner = getattr(function, "__self__", function)
    name = type(owner).__name__ if isinstance(owner, nn.Module) else getattr(function, "__name__", "other")
    return [OtherActivation(function=own, name=f"{name}'s own" if owner is own.husk else name)]


def _number(module: nn.Module, names: tuple[str, ...], default: float) -> float:
    values = (getattr(module, name, None) for name in names)
    return next((float(v) for v in values if isinstance(v, (int, float))), default)


def _husk(module: nn.Module, facts: ForeignExperts) -> nn.Module:
    """Copy a module without its stacks."""
    return _with_stacks(module, facts, {}, {})


def _with_stacks(
    module: nn.Module, facts: ForeignExperts, tensors: Mapping[str, Tensor], replaced: Mapping[int, int]
) -> nn.Module:
    """Copy a module with other stacks, or none, in it and in the submodule that has them.  tensors: by path."""
    path = facts.down.rpartition(".")[0]
    twin = twin_of(module, {n: t for n, t in tensors.items() if "." not in n}, replaced)
    if path:
        below = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        twin._modules[path] = twin_of(module.get_submodule(path), below, replaced)
    return twin


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
    together = experts + facts.identities
    of = replace(
        facts,
        activation=activation,
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
    )
    replaced = {
        facts.hidden_size: hidden,
        facts.intermediate_size: intermediate,
        2 * facts.intermediate_size: 2 * intermediate,
        facts.num_experts: experts,
        facts.num_experts + facts.identities: together,
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors: dict[str, Tensor] = {}
    for name in facts.names:
        sides, turned = of.sides(name), of.down_transposed if name == of.down else of.transposed
        outputs, inputs = sides[::-1] if turned else sides
        stack = random(experts if name == of.down else together, *sides) * inputs**-0.5
        tensors[name] = nn.Parameter(stack.flatten(0, 1) if of.flat else stack, requires_grad=False)
        if of.bias:
            tensors[f"{name}_bias"] = nn.Parameter(random(experts, outputs), requires_grad=False)
    tokens = 2 * experts if facts.calls == "sorted" else 7
    x = random(tokens, hidden) * torch.logspace(-1, 1.2, tokens, dtype=torch.float64).unsqueeze(1)
    if facts.calls == "sorted":
        ids, weights = torch.arange(experts).repeat_interleave(2).unsqueeze(1), torch.ones(tokens, 1).double()
    else:
        order = torch.stack([torch.randperm(together, generator=generator) for _ in range(tokens)])
        ids = torch.arange(experts).expand(tokens, -1) if facts.calls == "weighted" else order[:, :2]
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + 0.1
    twin = _with_stacks(module, facts, tensors, replaced)
    expected = compute(of, of.tensors(twin), x, ids, weights)
    by_role = {"ids": ids, "weights": weights}
    rest = {"sorted": [], "weighted": [weights], "routed": [by_role[role] for role in facts.roles[1:]]}
    reason = ""
    for tried in (x, x.unsqueeze(0)):  # some want sequences
        found = answer(twin, tried.clone(), *rest[facts.calls])
        if isinstance(found, str):
            reason = reason or found
        elif found.shape in (tried.shape, x.shape) and near(found.view_as(x), expected):
            return None
        else:
            reason = reason or f"its forward computes something else than routed experts with {activation} do"
    return reason
