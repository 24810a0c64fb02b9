"""Granite-MoE: Granite with routed experts in place of every MLP, which checkpoints hold all in one tensor."""

from __future__ import annotations

from torch import nn

from pymllm.models import granite
from pymllm.moe import build_moe_block
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import (
    ATTENTION_MODULES,
    EXPERT_CONSTANTS,
    EXPERT_SETTINGS,
    GGUFArchitecture,
    expert_modules,
)

DEFAULTS = {**granite.DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
# What checkpoints call tensors -> their names here, which are those that transformers has for them in memory.
RENAMED = {
    r"(.+\.block_sparse_moe)\.input_linear\.weight": r"\1.experts.gate_up_proj",
    r"(.+\.block_sparse_moe)\.output_linear\.weight": r"\1.experts.down_proj",
    r"(.+\.block_sparse_moe)\.router\.layer\.weight": r"\1.router.weight",
}
GGUF = {
    "granitemoe": GGUFArchitecture(
        "granitemoe",
        ATTENTION_MODULES | expert_modules("block_sparse_moe", router="router"),
        interleaved=True,
        settings=granite.GGUF_FACTORS
        | EXPERT_SETTINGS
        | {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"},
        constants=granite.GGUF_CONSTANTS | EXPERT_CONSTANTS | {"expert_weights_norm": (True,)},
        required=("logit_scale",),
        finish=granite.fill_in_factors,
    )
}


class Model(granite.Model):
    """GraniteMoeForCausalLM."""

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_moe_block(
            "auto",
            self.config,
            router_name="router",
            prefix=prefix.removesuffix("mlp") + "block_sparse_moe",
            quant_config=quant_config,
        )
