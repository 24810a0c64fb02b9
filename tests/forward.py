"""One prompt through a loaded model: what the tests of models, loading and ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.engine.runner import Runner
from pymllm.models.causal_lm import CausalLM


def logits_of(model: CausalLM, ids: Tensor) -> Tensor:
    """ids: [T].  Returns [T, V] float32, on every rank; ranks simulated by threads may call it at the same time."""
    return Runner(model, torch.device("cpu")).logits(ids.tolist())
