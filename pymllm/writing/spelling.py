"""The spelling of quantised layers in a checkpoint: the tensors of a weight, and their `quantization_config`.

A spelling is asked for each weight's storage method (`store`), and once, with all of them, for its config. What it
cannot express is a ConfigError that names the layer and a way out; nothing is rounded a second time to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
    """One way to write a checkpoint.  name: its quant_method."""

    name: str

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose the method whose tensors hold exactly this weight.  ConfigError if there is none.

        kind: linear, embedding or lm_head.
        """

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype | None:
        """Return the dtype in which scales of newly made weights must be exact.  model_dtype: of float tensors.

        None: weights are stored as they are made, float zero points included.
        """

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config` of a checkpoint with these layers, by their checkpoint names."""


@runtime_checkable
class WithSideConfigs(Protocol):
    """A spelling whose settings other programs also look for in files of their own."""

    def side_configs(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Make the JSON of these files, by name, from the `quantization_config`."""


def cannot_express(
    spelling: str, shape: LinearShape, what: str, *, expected: str | None = None, fix: str | None = None
) -> ConfigError:
    """Make the error for a weight that a spelling has no tensors for.

    what: of the weight cannot be held, as in "cannot hold WHAT".  expected, fix: as of every error.
    """
    return ConfigError(
        f"the {spelling} spelling cannot hold {what}",
        code="spelling",
        tensor=shape.name,
        expected=expected,
        fix=fix,
    )
