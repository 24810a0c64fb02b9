"""The tensor-parallel sizes that a model can be divided over, and what stands in the way of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pymllm.errors import ShardingError
from pymllm.layers.linear import weighted_layers
from pymllm.models.causal_lm import CausalLM
from pymllm.moe.experts import Experts
from pymllm.weights.loader import place


def legal_tp_sizes(model: CausalLM) -> list[int]:
    """The tensor-parallel sizes that every layer of the model can be divided over, whatever its own is."""
    heads, refused = model.config.size("num_attention_heads"), refused_tp_sizes(model)
    return [size for size in range(1, heads + 1) if heads % size == 0 and size not in refused]


def refused_tp_sizes(model: CausalLM) -> dict[int, str]:
    """Why the model cannot be divided over other sizes: those that divide the heads, and the powers of two to them."""
    heads = model.config.size("num_attention_heads")
    # Names apart, a deep model repeats a few layers.
    distinct: dict[Any, Any] = {
        (type(layer), layer.quant_method, replace(layer.shape, parts=("",) * len(layer.shape.parts))): layer
        for layer in weighted_layers(model)
    }
    distinct |= {
        (e.quant_method, e.size, e.tensor_parallel): e for e in model.modules() if isinstance(e, Experts)
    }
    reasons = {
        size: f"{heads} attention heads cannot be divided over {size} ranks"
        for size in (2**power for power in range(1, heads.bit_length()))
        if heads % size
    }
    for size in range(2, heads + 1):
        reason = _why_not_divided(distinct.values(), size) if heads % size == 0 else None
        if reason is not None:
            reasons[size] = reason
    return dict(sorted(reasons.items()))


def _why_not_divided(layers: Any, size: int) -> str | None:
    """What first stands in the way of this size; None: nothing."""
    try:
        for layer in layers:
            for rank in range(size):
                if isinstance(layer, Experts):
                    shares = list(layer.shares(rank, size))
                else:
                    shape = layer.shape_for(rank, size, layer.shape.parts)
                    methods = getattr(layer.quant_method, "methods", (layer.quant_method,))
                    shares = [
                        (m, shape.part(i) if len(methods) > 1 else shape) for i, m in enumerate(methods)
                    ]
                for method, share in shares:
                    method.check(share)
                    for spec in method.weight_specs(share):
                        place(spec, share)
    except ShardingError as error:
        return error.message.lstrip(": ")
    return None
