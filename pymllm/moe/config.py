"""The readers of what a model's config says of experts, whichever names it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _first(config: Any, *names: str) -> Any:
    """Return the first of these settings that is there and not null; None: there is none."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def get_num_experts(config: Any) -> int:
    """Return the number of routed experts of a sparse layer; 0: the model has none."""
    return _first(config, "num_experts", "n_routed_experts", "num_local_experts") or 0


def get_num_experts_per_tok(config: Any) -> int:
    """Return the number of experts that each token is routed to; 2 where the config does not say."""
    found = _first(config, "num_experts_per_tok", "moe_top_k", "top_k")
    return 2 if found is None else found


def get_moe_intermediate_size(config: Any) -> int:
    """Return the intermediate size of one expert.  AttributeError if the config has none."""
    found = _first(config, "moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
    if found is None:
        raise AttributeError("the config has neither moe_intermediate_size nor intermediate_size")
    return found


def get_norm_topk_prob(config: Any) -> bool:
    """Tell whether the weights of a token's experts are made to sum to one; True where the config does not say."""
    found = _first(config, "norm_topk_prob")
    return True if found is None else bool(found)


def get_mlp_only_layers(config: Any) -> Sequence[int]:
    """Return the indices of layers that are dense whatever else the config says."""
    return _first(config, "mlp_only_layers") or ()


def get_first_k_dense_replace(config: Any) -> int | None:
    """Return the number of layers that are dense, from the first on; None: the config does not count so."""
    return _first(config, "first_k_dense_replace")


def get_decoder_sparse_step(config: Any) -> int:
    """Return the step from one sparse layer to the next; 1: all are sparse, 0 or less: none is."""
    found = _first(config, "decoder_sparse_step")
    return 1 if found is None else found


def is_moe_layer(config: Any, layer: int) -> bool:
    """Tell whether the layer of this index has experts."""
    if get_num_experts(config) <= 0 or layer in get_mlp_only_layers(config):
        return False
    first_dense = get_first_k_dense_replace(config)
    if first_dense is not None:
        return layer >= first_dense
    step = get_decoder_sparse_step(config)
    return step > 0 and (layer + 1) % step == 0
