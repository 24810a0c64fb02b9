"""What encoders share: attention in both directions, no cache, no head; and their usual block, as BERT has it."""

# T tokens, H hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm.attention.attention import Attention
from pymllm.config import ModelConfig
from pymllm.errors import ConfigError, choices, nearest
from pymllm.layers.linear import QKVParallelLinear
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig

SEES_LATER = "it is an encoder, each of whose tokens sees those after it"
POOLER = "the pooler, which only classifiers read: embeddings pool the hidden states of all tokens"
MASKED_HEAD = "the head for masked tokens, which embeddings do not read"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _gelu_tanh),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "relu": F.relu,
}


def activation_of(config: ModelConfig, setting: str) -> Callable[[Tensor], Tensor]:
    """Find the activation that a setting of config.json names.  ConfigError for an unknown one."""
    name = getattr(config, setting)
    if name not in ACTIVATIONS:
        raise ConfigError(
            "config.json names an activation that encoders do not have here",
            code="config-value",
            file="config.json",
            tensor=setting,
            expected=choices(ACTIVATIONS, name),
            found=repr(name),
            fix=nearest(str(name), ACTIVATIONS),
        )
    return ACTIVATIONS[name]


def refuse_settings(config: ModelConfig, **allowed: Sequence[Any]) -> None:
    """Raise ConfigError for a setting that has another value than those that this model computes with."""
    for name, values in allowed.items():
        found = config.get(name, values[0])
        if not any(type(found) is type(value) and found == value for value in values):
            raise ConfigError(
                f"config.json has a {name} that this model does not compute with here",
                code="config-value",
                file="config.json",
                tensor=name,
                expected=" or ".join(map(repr, values)),
                found=repr(found),
            )


class EncoderAttention(nn.Module):
    """Attention in both directions, up to its output projection; q, k and v in one matmul.

    part_names: the names of the checkpoint's tensors; if there is one name, q, k and v lie side by side in that tensor.
    sliding_window: how many positions a token sees on either side, its own included; None: all.
    rotary: the module that turns q and k by their positions; None: positions are in the embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        prefix: str,
        quant_config: QuantizationConfig | None,
        part_names: Sequence[str],
        bias: bool,
        sliding_window: int | None = None,
        rotary: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        if hidden % heads:
            raise ConfigError(
                "the hidden size cannot be divided evenly over the heads",
                code="config-value",
                file="config.json",
                tensor="num_attention_heads",
                expected=f"a divisor of {hidden}",
                found=str(heads),
            )
        self.rotary = rotary
        self.qkv_proj = QKVParallelLinear(
            hidden,
            hidden // heads,
            heads,
            bias=bias,
            part_names=part_names,
            prefix=f"{prefix}.qkv_proj",
            quant_config=quant_config,
        )
        self.attn = Attention(
            self.qkv_proj.num_heads_local,
            hidden // heads,
            (hidden // heads) ** -0.5,
            self.qkv_proj.num_kv_heads_local,
            sliding_window=sliding_window,
            bidirectional=True,
            quant_config=quant_config,
            kv_heads=self.qkv_proj.kv_heads,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Attend.  positions: [T]; hidden: [T, H].  Returns this rank's heads, [T, share of H]."""
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.local_sizes, dim=-1)
        if self.rotary is not None:
            q, k = self.rotary(positions, q, k)
        return self.attn(q, k, v)


class Encoder(LanguageModel):
    """The base of encoders, which give hidden states alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.lm_head = config, None

    @property
    def why_no_text(self) -> str:
        """The reason why the model cannot generate text."""
        return SEES_LATER


def refuse_other_positions(stored: Tensor) -> str | None:
    """Return why a stored buffer is not the positions 0, 1, 2, ..., or None."""
    flat = stored.flatten().to(torch.int64).cpu()
    return None if torch.equal(flat, torch.arange(flat.numel())) else "positions that do not count from 0"


def refuse_other_types(stored: Tensor) -> str | None:
    """Return why a stored buffer is not the type 0 for every token, or None."""
    return None if not stored.any() else "types of tokens other than 0"
