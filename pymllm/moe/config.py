"""The readers of what a model's config says of experts, whichever names it uses."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from pymllm.config import MissingSetting
from pymllm.errors import ConfigError

MANY = 1 << 31  # layers


def _first(config: Any, *names: str) -> Any:
    """Return the first of these settings that is there and not null; None: there is none."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _integer(config: Any, least: int, *names: str) -> int | None:
    """Return the first of these settings that is there and not null.  ConfigError unless it is an integer >= least."""
    found = _first(config, *names)
    if found is not None and (type(found) is not int or found < least):
        raise _bad_value(names, found, f"an integer of at least {least}")
    return found


def _bad_value(names: Sequence[str], found: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"the setting {' or '.join(names)} has a value that it cannot have",
        code="config-value",
        file="config.json",
        tensor=names[0],
        expected=expected,
        found=reprlib.repr(found),
    )


def get_num_experts(config: Any) -> int:
    """Return the number of routed experts of a sparse layer; 0: the model has none."""
    return _integer(config, 0, "num_experts", "n_routed_experts", "num_local_experts") or 0


def get_num_experts_per_tok(config: Any) -> int:
    """Return the number of experts that each token is routed to; 2 where the config does not say."""
    found = _integer(config, 1, "num_experts_per_tok", "moe_top_k", "top_k")
    most = get_num_experts(config)
    if found is not None and most and found > most:
        raise _bad_value(("num_experts_per_tok",), found, f"at most {most}, the number of experts")
    return 2 if found is None else found


def get_moe_intermediate_size(config: Any) -> int:
    """Return the intermediate size of one expert.  MissingSetting if the config has none."""
    found = _integer(config, 1, "moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
    if found is None:
        raise MissingSetting("moe_intermediate_size", getattr(config, "raw", None) or vars(config))
    return found


def get_norm_topk_prob(config: Any) -> bool:
    """Tell whether the weights of a token's experts are made to sum to one; True where the config does not say.

    null is no, as transformers reads it.
    """
    found = getattr(config, "norm_topk_prob", True)
    if found is not None and not isinstance(found, bool):
        raise _bad_value(("norm_topk_prob",), found, "true or false")
    return bool(found)


def get_mlp_only_layers(config: Any) -> Sequence[int]:
    """Return the indices of layers that are dense whatever else the config says."""
    found = _first(config, "mlp_only_layers") or ()
    if not isinstance(found, (list, tuple)) or not all(type(layer) is int for layer in found):
        raise _bad_value(("mlp_only_layers",), found, "a list of the layers' indices")
    return found


def get_first_k_dense_replace(config: Any) -> int | None:
    """Return the number of layers that are dense, from the first on; None: the config does not count so."""
    return _integer(config, 0, "first_k_dense_replace")


def get_decoder_sparse_step(config: Any) -> int:
    """Return the step from one sparse layer to the next; 1: all are sparse, 0 or less: none is."""
    found = _integer(config, -MANY, "decoder_sparse_step")
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
