"""Our experts in the place of a module of transformers' that stacks the weights of all experts of a layer."""

# T tokens, K experts a token, H hidden size, I intermediate size

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.models.generic.alike import likeness
from pymllm.models.generic.classes import on_cpu
from pymllm.models.generic.probe import probing
from pymllm.modules.foreign_experts import ForeignExperts, read_experts, stacks_of
from pymllm.moe.dispatcher import expert_range
from pymllm.moe.experts import SPELLINGS, ExpertsLayout, ExpertsSize, make_experts
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig

# What stands behind the name of a layer's experts: an expert's own tensor.
SINGLE = re.compile(r"(?P<expert>\d+)\.(?P<name>" + "|".join({n for s in SPELLINGS for n in s}) + r")\.[^.]+")


class RoutedExperts(nn.Module):
    """The experts of a layer, called as transformers calls its own.  facts: how it stacks and calls them."""

    def __init__(self, facts: ForeignExperts, name: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.facts, self.parallel = facts, current_parallel()
        size = ExpertsSize(
            facts.hidden_size,
            facts.intermediate_size,
            facts.num_experts,
            facts.activation,
            facts.bias,
            facts.interleaved,
            facts.transposed,
            facts.gated,
        )
        ids, whole = range(facts.num_experts), self.parallel.expert_parallel
        if whole:
            ids = expert_range(facts.num_experts, self.parallel.rank, self.parallel.size)
        self.groups = nn.ModuleList(make_experts(size, name, ids, quant_config, tensor_parallel=not whole))
        self.num_experts = facts.num_experts

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Run the tokens' experts, as the module did whose place they take: see `ForeignExperts.calls`."""
        if probing() is not None:
            return torch.empty_like(args[0] if args else next(iter(options.values())))
        x, ids, weights = self.facts.routed(args, options)
        rows, count = x.reshape(-1, self.facts.hidden_size), self.facts.num_experts
        routed = ids if not self.facts.identities else ids.masked_fill(ids >= count, -1)
        first, *others = self.groups
        weights = weights.float()
        y = first(rows, routed, weights)
        for group in others:
            y = y + group(rows, routed, weights)
        y = self.parallel.all_reduce(y)
        if self.facts.identities:
            passed = (ids >= count) & (ids < count + self.facts.identities)
            y = y + rows * (weights * passed).sum(1, keepdim=True)
        return y.reshape(x.shape).to(x.dtype)

    def why_not_needed(self, tensor: str) -> str | None:
        """Return why a tensor of the checkpoint is not needed; None: it is, as far as is known here.

        tensor: its name behind that of the experts.
        """
        found = SINGLE.fullmatch(tensor)
        beyond = found is not None and self.num_experts <= int(found["expert"])
        within = found is not None and int(found["expert"]) < self.num_experts + self.facts.identities
        return "an expert that returns its input computes with no weights" if beyond and within else None


def is_stored_so(name: str, facts: ForeignExperts, quant_config: QuantizationConfig | None) -> bool:
    """Tell whether a checkpoint has these experts in a form that ours read.  True where there is no checkpoint."""
    modules = frozenset() if quant_config is None else quant_config.stored_modules
    if not modules:
        return True
    layout = ExpertsLayout.find(name, quant_config, facts.gated)
    return any(part.format(0) in modules for parts in layout.parts().values() for part in parts)


_known: weakref.WeakKeyDictionary[nn.Module, dict[str, ForeignExperts | str]] = weakref.WeakKeyDictionary()


@on_cpu
def find_experts(model: nn.Module) -> Mapping[str, ForeignExperts | str]:
    """Say of each module of a model that stacks experts how it does so, or why ours cannot take its place.

    Of modules that are alike, one is tried.
    """
    if model not in _known:
        tried: dict[Hashable, ForeignExperts | str] = {}
        found: dict[str, ForeignExperts | str] = {}
        for name, module in model.named_modules():
            if not any("." not in stack for stack in stacks_of(module)):
                continue
            key = likeness(module)
            if key not in tried:
                tried[key] = read_experts(module)
            found[name] = tried[key]
        _known[model] = found
    return _known[model]
