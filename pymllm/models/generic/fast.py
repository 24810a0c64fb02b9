"""What runs faster than the class's own modules: products in one, our norms, gated MLPs and rotations.

Nothing takes a module's place that is not shown to compute the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pymllm.layers.mlp import GATED
from pymllm.models.generic.fused import FusedLinear, Siblings, find_siblings, put_siblings
from pymllm.models.generic.gated import Gated, GenericGatedMLP, find_gated
from pymllm.models.generic.layers import make_linear, replace_module
from pymllm.models.generic.norms import make_norm
from pymllm.models.generic.probe import Probe
from pymllm.models.generic.rotary import put_rotations
from pymllm.quantization.base import QuantizationConfig


def put_fast(
    model: Any,
    found: Probe,
    tied: Iterable[str],
    dtype: torch.dtype,
    quant_config: QuantizationConfig | None,
) -> list[str]:
    """Put fused products, norms and gated MLPs of ours in the places of the class's modules that equal them.

    tied: names of parameters that are two modules'.  dtype: of activations.
    Returns what a plan should say of products that are not fused.
    """
    left = {name.rpartition(".")[0] for name in tied}
    for name, module in list(model.named_modules()):
        if set(found.given.get(name, ())) == {1} and name not in left:
            norm = make_norm(module, dtype)
            if norm is not None:
                replace_module(model, name, norm)
    siblings, notes = find_siblings(model, found, left)
    for name, module in list(model.named_modules()):
        mlp = find_gated(module, name, found) if name else None
        if mlp is not None and not left & {f"{name}.{part}" for part in (*mlp.gate_up, mlp.down)}:
            _put_gated(model, name, mlp, quant_config)
            siblings = [group for group in siblings if group.parent != name]
    for group in siblings:
        put_siblings(model, group, found.contiguous, quant_config)
    put_rotations(model, found.attention, dtype)
    return notes


def _put_gated(model: Any, name: str, mlp: Gated, quant_config: QuantizationConfig | None) -> None:
    module = model.get_submodule(name)
    down: Any = make_linear(module.get_submodule(mlp.down), f"{name}.{mlp.down}", quant_config)
    first, *others = mlp.gate_up
    if others:
        pair = Siblings(name, mlp.gate_up)
        layers = [module.get_submodule(part) for part in mlp.gate_up]
        gate_up: Any = FusedLinear(pair, layers, False, quant_config)
    else:
        gate_up = make_linear(module.get_submodule(first), f"{name}.{first}", quant_config)
    names = ("_".join(mlp.gate_up), mlp.down)
    replace_module(model, name, GenericGatedMLP(gate_up, GATED[mlp.act](), down, names))
