"""How a checkpoint spells quantised layers: the tensors of a weight, and what `quantization_config` says of them.

A spelling is asked for each weight's storage method (`store`), and once, with all of them, for its config. What it
cannot express is a ConfigError that names the layer and a way out; nothing is rounded a second time to fit.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape


@dataclass(frozen=True)
class SpelledLayer:
    """A layer as it was written.  kind: linear, embedding or lm_head."""

    kind: str
    method: LinearMethodBase


class Spelling(Protocol):
    """One way to write a checkpoint."""

    name: str

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """The method whose tensors hold exactly this weight.  ConfigError if there is none."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """What the scales of newly made integer weights must be exact in."""

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with these layers, by their checkpoint names."""


def cannot_express(
    spelling: str, shape: LinearShape, what: str, *, expected: str | None = None, fix: str | None = None
) -> ConfigError:
    """The error for a weight that a spelling has no tensors for."""
    return ConfigError(
        f"the {spelling} spelling cannot hold {what}",
        code="spelling",
        tensor=shape.name,
        expected=expected,
        fix=fix,
    )
