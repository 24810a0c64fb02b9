"""What a model definition gives the engine, the loader and the plan, whoever wrote its modules."""

# T tokens, H hidden size, N rows, V vocabulary

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.models.further_tokens import FurtherTokens
from pymllm.models.strategy import BlockDiffusion, Strategy
from pymllm.quantization.base import StoredTensor
from pymllm.weights.report import Skip

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class LanguageModel(nn.Module):
    """A model of tokens: hidden states from ids and positions, logits from hidden states.

    config: the checkpoint's.  lm_head: the layer that makes logits; None: the model gives hidden states alone.
    embedding_scale: what embedded tokens are multiplied by.
    restart_length: a request that grows to it needs all its keys and values made anew.
    skipped_tensors: patterns of tensors that the model does not need, and why.
    unreached: weights that no rule can quantise, and why, by name.
    block_diffusion: how answers are decoded by blocks, where the family was trained for that; None: a token at a time.
    strategy: how they are decoded here.
    """

    config: ModelConfig
    lm_head: Any
    embedding_scale: float = 1.0
    restart_length: int | None = None
    skipped_tensors: ClassVar[dict[str, str]] = {}
    unreached: Mapping[str, str] = {}
    block_diffusion: ClassVar[BlockDiffusion | None] = None
    strategy: Strategy = Strategy()

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

    def find_not_run(self, stored: Mapping[str, StoredTensor]) -> Callable[[str], str | None]:
        """Find the parts of the checkpoint's model that are not run: layers for further tokens, towers for images.

        stored: all of the checkpoint's tensors, by name.  Returns what says why a tensor is of such a part, or None.
        """
        further, wrapper = FurtherTokens(stored, self.config), self.config.wrapper
        if wrapper is None:
            return further.why_not_run
        return lambda name: further.why_not_run(name) or wrapper.why_not_run(name)

    @property
    def max_length(self) -> int:
        """The most tokens that the model knows positions for."""
        return self.config.size("max_position_embeddings")

    @property
    def scales_with_length(self) -> bool:
        """Dynamic scaling of positions, by which a text may be longer than `max_length`."""
        given = self.config.get("rope_parameters") or self.config.get("rope_scaling")
        return isinstance(given, dict) and "dynamic" in (given.get("rope_type"), given.get("type"))

    @property
    def why_no_text(self) -> str | None:
        """The reason why the model cannot generate text; None: it can."""
        return None if self.lm_head is not None else "the checkpoint has no head, so there are no next tokens"

    def check_generates(self) -> None:
        """Raise ConfigError for a model that does not generate text."""
        if self.why_no_text is not None:
            raise self.no_text()

    def no_text(self) -> ConfigError:
        """Make the error for a wish that only a model with next tokens can fulfil."""
        return ConfigError(
            f"this model does not generate text: {self.why_no_text}",
            code="no-text",
            tensor=str(self.config.raw.get("model_type")),
            fix="Use it for embeddings: llm.embed(texts), or POST /v1/embeddings.",
        )

    @property
    def keys_depend_on_length(self) -> bool:
        """True if the keys of a token are others where more tokens follow in the same step."""
        return False

    @property
    def why_not_repeated(self) -> str | None:
        """The reason why decoding steps cannot be recorded and replayed; None: the model does not stand in the way."""
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
        raise self.no_text()
