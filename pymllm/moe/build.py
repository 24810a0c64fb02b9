"""The makers of a decoder layer's MLP or sparse block, as the model's config says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pymllm.errors import unknown_name
from pymllm.moe.config import (
    get_moe_intermediate_size,
    get_norm_topk_prob,
    get_num_experts,
    get_num_experts_per_tok,
    is_moe_layer,
)
from pymllm.moe.layer import EPFusedMoE, FusedMoE, NaiveFusedMoE, TPFusedMoE
from pymllm.parallel import current_parallel

IMPLEMENTATIONS: dict[str, type[FusedMoE]] = {
    "naive": NaiveFusedMoE,
    "tp": TPFusedMoE,
    "ep": EPFusedMoE,
}


def build_moe_block(impl: str, config: Any, **options: Any) -> FusedMoE:
    """Make the sparse block of a model with this config.

    impl: naive, tp, ep, or auto: ep where the current `Parallel` says so, else tp.  ConfigError for another one.
    options: those of `FusedMoE`; what they leave open is read from the config.
    """
    if impl == "auto":
        impl = "ep" if current_parallel().expert_parallel else "tp"
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("MoE block", impl, ("auto", *IMPLEMENTATIONS), code="moe-block")
    if "router" not in options and get_norm_topk_prob(config) and "scoring_func" not in options:
        # Softmax over all experts, made to sum to one, is softmax over the chosen ones; also for a single one.
        options["scoring_func"] = "topk_softmax"
    elif "router" not in options:
        options.setdefault("renormalize", get_norm_topk_prob(config))
    options.setdefault("activation", getattr(config, "hidden_act", None) or "silu")
    return IMPLEMENTATIONS[impl](
        config.hidden_size,
        get_moe_intermediate_size(config),
        get_num_experts(config),
        get_num_experts_per_tok(config),
        **options,
    )


B = TypeVar("B")


def build_mlp_or_moe(
    config: Any, layer: int, dense_factory: Callable[[], B], moe_factory: Callable[[], B] | None = None
) -> B:
    """Make the block of the layer with this index: experts where `is_moe_layer` says so, else by `dense_factory`.

    moe_factory: makes the experts; None: `build_moe_block` with the config's settings.
    """
    if not is_moe_layer(config, layer):
        return dense_factory()
    if moe_factory is not None:
        return moe_factory()
    return build_moe_block("auto", config)  # type: ignore[return-value]
