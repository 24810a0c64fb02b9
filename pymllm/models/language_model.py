"""What a model definition gives the engine, the loader and the plan, whoever wrote its modules."""

# T tokens, H hidden size, N rows, V vocabulary

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pymllm.config import ModelConfig
from pymllm.quantization.base import StoredTensor
from pymllm.weights.report import Skip

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class LanguageModel(nn.Module):
    """A model of tokens: hidden states from ids and positions, logits from hidden states.

    config: the checkpoint's.  lm_head: the layer that makes logits.
    embedding_scale: what embedded tokens are multiplied by.
    restart_length: a request that grows to it needs all its keys and values made anew.
    skipped_tensors: patterns of tensors that the model does not need, and why.
    unreached: weights that no rule can quantise, and why, by name.
    """

    config: ModelConfig
    lm_head: Any
    embedding_scale: float = 1.0
    restart_length: int | None = None
    skipped_tensors: ClassVar[dict[str, str]] = {}
    unreached: Mapping[str, str] = {}

    @property
    def definition(self) -> str:
        """The source of the model's modules, for the plan."""
        return type(self).__module__

    @property
    def notes(self) -> list[str]:
        """The remarks of a plan on how the model runs."""
        return []

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        """Return why the model does not need a tensor, and the proof; None: it may not be skipped.

        tensor: its name.  stored: all of the checkpoint's, by name.
        """
        return None

    @property
    def keys_depend_on_length(self) -> bool:
        """True if the keys of a token are others where more tokens follow in the same step."""
        return False

    @property
    def why_not_repeated(self) -> str | None:
        """The reason why decoding steps cannot be recorded and played back; None: nothing stands in the way."""
        return None

    # A step at a time, for calibration

    runs_outside: ClassVar[bool] = False  # whether a step also runs modules outside of the blocks

    def block_of(self, name: str) -> str | None:
        """Return the block that a module lies in, by name; None: it lies in none."""
        found = BLOCK.search(name)
        return None if found is None else name[: found.end(1)]

    def run_step(self, name: str, ids: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        """Run a block, or what stands before or behind the blocks.

        name: of the block or module.  ids, positions: [T].  hidden: [T, H], what the step before gave; None: this is
        the first one.  Returns [T, H].  ConfigError for a model that cannot be run so.
        """
        raise NotImplementedError

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run all but the head.  ids, positions: [T], requests side by side.  Returns hidden states [T, H]."""
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """Apply the head.  hidden: [N, H].  Returns float32 logits [N, V]; None on ranks that do not get them."""
        raise NotImplementedError
