"""Mixture of experts: readers of configs, routers, dispatchers and blocks.  Models call the `build_` functions."""

from pymllm.moe.backends import build_token_dispatcher
from pymllm.moe.build import build_mlp_or_moe, build_moe_block
from pymllm.moe.config import (
    get_decoder_sparse_step,
    get_first_k_dense_replace,
    get_mlp_only_layers,
    get_moe_intermediate_size,
    get_norm_topk_prob,
    get_num_experts,
    get_num_experts_per_tok,
    is_moe_layer,
)
from pymllm.moe.dispatcher import (
    DispatcherOutput,
    NaiveA2ADispatcher,
    TokenDispatcher,
)
from pymllm.moe.layer import (
    EPFusedMoE,
    FusedMoE,
    NaiveFusedMoE,
    SharedExpertMLP,
    SparseMoEBlock,
    TPFusedMoE,
)
from pymllm.moe.metadata import DispatcherStage, DispatchMetadata, ExpertExecutionMetadata, RouterMetadata
from pymllm.moe.topk import (
    GroupLimitedTopKRouter,
    NaiveTopKRouter,
    TopKOutput,
    TopKRouter,
    build_topk_router,
)

__all__ = [
    "DispatchMetadata",
    "DispatcherOutput",
    "DispatcherStage",
    "EPFusedMoE",
    "ExpertExecutionMetadata",
    "FusedMoE",
    "GroupLimitedTopKRouter",
    "NaiveA2ADispatcher",
    "NaiveFusedMoE",
    "NaiveTopKRouter",
    "RouterMetadata",
    "SharedExpertMLP",
    "SparseMoEBlock",
    "TPFusedMoE",
    "TokenDispatcher",
    "TopKOutput",
    "TopKRouter",
    "build_mlp_or_moe",
    "build_moe_block",
    "build_token_dispatcher",
    "build_topk_router",
    "get_decoder_sparse_step",
    "get_first_k_dense_replace",
    "get_mlp_only_layers",
    "get_moe_intermediate_size",
    "get_norm_topk_prob",
    "get_num_experts",
    "get_num_experts_per_tok",
    "is_moe_layer",
]
