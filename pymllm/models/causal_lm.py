"""The skeleton of a pre-norm decoder: embedding, blocks of attention and MLP, final norm, head.

A family says what its attention and its MLP differ in. Module names are the checkpoint's, but for what is fused.
"""

# T tokens, H hidden size, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.mlp import GatedMLP
from pymllm.layers.rotary_embedding import RotaryEmbedding, default_frequencies
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig, StoredTensor
from pymllm.weights.report import Skip

# The tensors of a GGUF file that are settings of its rotary positions, each with the type that uses it.
ROPE_FACTORS = {
    "rope_freqs.weight": "factors",
    "rope_factors_long.weight": "longrope",
    "rope_factors_short.weight": "longrope",
}


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the sums travel along as `residual`.

    read_by: for each block, the norm whose output it alone reads: calibration folds scales there.
    """

    read_by: ClassVar[dict[str, str]] = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    self_attn: nn.Module

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, norm: type[RMSNorm] = RMSNorm
    ) -> None:
        super().__init__()
        setattr(self, self.mixer_name_of(self_attn), self_attn)
        self.mlp = mlp
        self.input_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)

    @staticmethod
    def mixer_name_of(module: nn.Module) -> str:
        """Return the name of the block that mixes tokens, in the checkpoint."""
        return "self_attn"

    @property
    def mixer(self) -> Any:
        """The block that mixes tokens."""
        return self.self_attn

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer.  positions: [T]; hidden, residual: [T, H].  Returns its output and the sum before it."""
        mixer = self.mixer
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden, taker=mixer)
        else:
            hidden, residual = self.input_layernorm(hidden, residual, mixer)
        hidden = mixer(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual, self.mlp)
        output = self.mlp(hidden)
        # Experts also give their router's logits.
        return output[0] if isinstance(output, tuple) else output, residual


class Decoder(nn.Module):
    """The model without its head.  embedding_scale: what embedded tokens are multiplied by."""

    def __init__(
        self,
        config: ModelConfig,
        layers: list[nn.Module],
        norm: type[RMSNorm],
        embedding_scale: float,
        quant_config: QuantizationConfig | None,
    ) -> None:
        super().__init__()
        self.embedding_scale = embedding_scale
        self.embed_tokens = VocabParallelEmbedding(
            config.size("vocab_size"),
            config.size("hidden_size"),
            prefix=config.head_names[1],
            quant_config=quant_config,
        )
        self.layers = nn.ModuleList(layers)
        self.norm = norm(config.size("hidden_size"), config.rms_norm_eps)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run every layer.  ids, positions: [T].  Returns normed hidden states [T, H]."""
        hidden, residual = self.embed_tokens(ids), None
        if self.embedding_scale != 1:
            hidden = hidden * self.embedding_scale
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        normed, _ = self.norm(hidden, residual)
        return normed


class CausalLM(LanguageModel):
    """A decoder with its head.

    A family says in `attention_options` and `mlp_options` what differs from the usual blocks, or makes blocks of its
    own in `make_attention` and `make_mlp`.

    layer, attention, norm: the classes of layers, of their attention and of every norm.
    """

    layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    attention: ClassVar[type[SelfAttention]] = SelfAttention
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    lm_head: ParallelLMHead | None

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for index in range(config.size("num_hidden_layers")):
            prefix = f"model.layers.{index}"
            attention = self.make_attention(index, f"{prefix}.self_attn", quant_config)
            mlp = self.make_mlp(index, f"{prefix}.mlp", quant_config)
            layers.append(self.layer(config, attention, mlp, self.norm))
        self.model = Decoder(config, layers, self.norm, self.embedding_scale, quant_config)
        self.lm_head = None
        if not config.headless:
            self.lm_head = ParallelLMHead(
                config.size("vocab_size"),
                config.size("hidden_size"),
                tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
                prefix="lm_head",
                quant_config=quant_config,
            )

    def attention_options(self) -> dict[str, Any]:
        """Return the keywords of `SelfAttention` that this family sets."""
        bias = self.config.attention_bias
        return {"qkv_bias": bias, "output_bias": bias}

    def mlp_options(self) -> dict[str, Any]:
        """Return the keywords of `GatedMLP` that this family sets."""
        return {"activation": self.config.hidden_act}

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        """Make the attention of the layer `index`, whose modules are called `prefix`.*."""
        options = self.attention_options()
        return self.attention(self.config, index, prefix=prefix, quant_config=quant_config, **options)

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        """Make the MLP of the layer `index`, whose modules are called `prefix`.*."""
        hidden, intermediate = self.config.size("hidden_size"), self.config.size("intermediate_size")
        return GatedMLP(hidden, intermediate, prefix=prefix, quant_config=quant_config, **self.mlp_options())

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        module, _, suffix = tensor.rpartition(".")
        if suffix == "inv_freq" and module.rpartition(".")[2].startswith("rotary_emb"):
            owner = dict(self.named_modules()).get(module.rpartition(".")[0], nn.Module())
            rotary = [m for m in owner.modules() if hasattr(m, "rotary_dim")]
            if rotary:
                refuse = functools.partial(_refuse_frequencies, rotary, self.config.rope_parameters.theta)
                return Skip("rotary frequencies, which follow from the config", refuse)
        if self.config.rope_parameters.rope_type == ROPE_FACTORS.get(tensor):
            return "factors of the rotary frequencies, which have become part of the config"
        return None

    @property
    def keys_depend_on_length(self) -> bool:
        """True if the keys of a token are others where more tokens follow in the same step."""
        return any(module.by_length for module in self.modules() if isinstance(module, RotaryEmbedding))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the decoder.  ids, positions: [T], requests side by side.  Returns hidden states [T, H]."""
        return self.model(ids, positions)

    def run_step(self, name: str, ids: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        module = self.get_submodule(name)
        if hidden is None:
            return module(ids) * self.embedding_scale
        if self.block_of(name) is None:
            return module(hidden)
        hidden, residual = module(positions, hidden, None)
        return hidden + residual

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """Apply the head.  hidden: [N, H].  Returns float32 logits [N, V]; None on ranks that do not get them."""
        if self.lm_head is None:
            raise self.no_text()
        return self.lm_head(hidden, gather_all=gather_all)


def _refuse_frequencies(rotary: Sequence[Any], base: float, stored: Tensor) -> str | None:
    """Return why stored rotary frequencies are not those that any of these modules turns by, or None.

    base: the config's.  Writers also store them as they were before scaling, and rounded to the weights' dtype, of
    which bfloat16 has 8 bits.
    """
    found = stored.float().flatten().cpu()
    known = [default_frequencies(module.rotary_dim, base) for module in rotary]
    known += [m.inverse_frequencies.cpu() for m in rotary if isinstance(m, RotaryEmbedding)]
    for expected in known:
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=2**-7, atol=1e-6):
            return None
    expected = known[-1]
    return f"{found.numel()} frequencies {_show(found)}, where the config gives {expected.numel()}: {_show(expected)}"


def _show(values: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:4].tolist()) + (" ..." if values.numel() > 4 else "")
