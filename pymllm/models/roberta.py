"""RoBERTa: BERT whose positions count from behind the padding token's id, and pass over padding tokens."""

# T tokens

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.models import bert
from pymllm.models.encoder import MASKED_HEAD, POOLER
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {**bert.DEFAULTS, "pad_token_id": 1}
RENAMED = {pattern.replace("bert", "roberta"): to for pattern, to in bert.RENAMED.items()}


class Model(bert.Model):
    """RobertaModel, without its pooler.  The first row of the position table that a text uses is pad_token_id + 1."""

    skipped_tensors: ClassVar[dict[str, str]] = {
        r"pooler\.dense\.(weight|bias)": POOLER,
        r"lm_head\.(dense|layer_norm|decoder)\.(weight|bias)": MASKED_HEAD,
        r"lm_head\.bias": MASKED_HEAD,
    }

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__(config, quant_config)
        padding, rows = config.pad_token_id, config.size("max_position_embeddings")
        if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < rows - 1:
            raise ConfigError(
                "config.json has a pad_token_id behind which no position is left",
                code="config-value",
                file="config.json",
                tensor="pad_token_id",
                expected=f"0 to {rows - 2}",
                found=repr(padding),
            )
        self.padding = padding

    @property
    def max_length(self) -> int:
        """The most tokens that the model knows positions for."""
        return super().max_length - self.padding - 1

    def table_rows(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the row of the position table for each token: padding tokens within a text have no position.

        ids, positions, result: [T].
        """
        real = (ids != self.padding).to(torch.int64)
        counted = real.cumsum(0)
        first = torch.arange(ids.numel(), device=ids.device) - positions  # of each token's request
        before = (counted - real)[first]
        return (counted - before) * real + self.padding
