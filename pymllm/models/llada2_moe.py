"""LLaDA2: routed experts in groups, partial rotary positions, and training to fill in blocks of masked tokens."""

# T tokens

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.layers.layernorm import RMSNorm
from pymllm.models.causal_lm import CausalLM, DecoderLayer
from pymllm.models.encoder import refuse_settings
from pymllm.models.strategy import BlockDiffusion
from pymllm.moe import SharedExpertMLP, build_mlp_or_moe, build_moe_block, build_topk_router
from pymllm.moe.config import get_num_experts, get_num_experts_per_tok
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    "embedding_name": "model.word_embeddings",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "partial_rotary_factor": 0.5,
    "use_qkv_bias": False,
    "use_bias": True,
    "use_qk_norm": True,  # never read: the norms are always there
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "first_k_dense_replace": 0,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
}
ARCHITECTURE = "LLaDA2MoeModelLM"


def rotary_dim_of(config: ModelConfig) -> int:
    """Return how many elements of a head turn, which configs say as a share, as a number, or both."""
    head_dim, number = config.head_dim, config.get("rotary_dim")
    share = int(head_dim * config.rope_parameters.partial_rotary_factor)
    if number is None:
        return share
    number = config.size("rotary_dim")
    says_share = "partial_rotary_factor" in {**config.raw, **config.rope_parameters.scaling}
    if says_share and number != share:
        raise ConfigError(
            "config.json says twice how much of a head turns by its position, and the two differ",
            code="config-value",
            file="config.json",
            tensor="rotary_dim",
            expected=f"{share}, which partial_rotary_factor makes of heads of {head_dim}",
            found=str(number),
            fix="Take out the one that is not meant.",
        )
    return number


class NormedAttention(SelfAttention):
    """Self-attention with a norm on each head of q and k, and the checkpoints' names for all of it."""

    def __init__(self, config: ModelConfig, layer: int, **options: Any) -> None:
        super().__init__(
            config,
            layer,
            part_names=("query_key_value",),
            output_name="dense",
            rotary_dim=rotary_dim_of(config),
            **options,
        )
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def before_rotary(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise each head of q and k.

        q, k, v: [T, this rank's features of all heads].  Returns the same shapes.
        """
        q = self.query_layernorm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.key_layernorm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return q, k, v


class Layer(DecoderLayer):
    """A layer whose attention is called `attention`."""

    read_by: ClassVar[dict[str, str]] = {
        "attention": "input_layernorm",
        "mlp": "post_attention_layernorm",
    }

    @staticmethod
    def mixer_name_of(module: nn.Module) -> str:
        return "attention"

    @property
    def mixer(self) -> Any:
        return self.attention


class Model(CausalLM):
    """LLaDA2MoeModelLM."""

    layer = Layer
    attention = NormedAttention
    # 156895 is <|mask|>; of the threshold all sources say the same.
    block_diffusion = BlockDiffusion(block_length=32, mask_token_id=156895, confidence_threshold=0.95)

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        # What the authors' code has no branch for, though configs may say otherwise.
        refuse_settings(
            config,
            score_function=["sigmoid"],
            norm_topk_prob=[True],
            norm_head=[False],
            norm_softmax=[False],
            use_rmsnorm=[True],
            using_split_qkv_in_self_attention=[False],
        )
        super().__init__(config, quant_config)

    def attention_options(self) -> dict[str, Any]:
        return {"qkv_bias": self.config.use_qkv_bias, "output_bias": self.config.use_bias}

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        place = prefix.rpartition(".")[0]
        return super().make_attention(index, f"{place}.attention", quant_config)

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_mlp_or_moe(
            self.config,
            index,
            lambda: super(Model, self).make_mlp(index, prefix, quant_config),
            lambda: self.make_moe(prefix, quant_config),
        )

    def make_moe(self, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        """Make the block of routed experts and shared ones, whose modules are called `prefix`.*."""
        config, shared = self.config, None
        if config.get("num_shared_experts"):
            shared = SharedExpertMLP(
                config.size("hidden_size"),
                config.size("moe_intermediate_size") * config.size("num_shared_experts"),
                config.hidden_act,
                prefix=f"{prefix}.shared_experts",
                quant_config=quant_config,
            )
        router = build_topk_router(
            "group_limited",
            top_k=get_num_experts_per_tok(config),
            num_experts=get_num_experts(config),
            n_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        return build_moe_block(
            "auto",
            config,
            router=router,
            shared=shared,
            router_dtype=torch.float32,
            expert_bias=self.has_expert_bias(f"{prefix}.gate", quant_config),
            prefix=prefix,
            quant_config=quant_config,
        )

    def has_expert_bias(self, gate: str, quant_config: QuantizationConfig | None) -> bool:
        """Tell whether a bias ranks the experts of the router `gate`.

        The authors' code has one whatever the config says; one without is as if it were zero.
        """
        stored = () if quant_config is None else quant_config.stored
        names = (f"{gate}.expert_bias", f"{gate}.e_score_correction_bias")
        return self.config.moe_router_enable_expert_bias or any(name in stored for name in names)
