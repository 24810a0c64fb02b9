"""One prompt through a model: what the tests of models, formats, loading and ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pymllm
from pymllm.engine.runner import Runner
from pymllm.models.causal_lm import CausalLM
from pymllm.parallel import simulate

from .checkpoints import TinyCheckpoint, relative_error

# Both sides compute in float32; two layers of other summation orders leave some 1e-6.
TOLERANCE = 1e-5


def logits_of(model: CausalLM, ids: Tensor) -> Tensor:
    """Compute logits: ids [T] -> [T, V] float32, on every rank; ranks simulated by threads may call it at once."""
    return Runner(model, torch.device("cpu")).logits(ids.tolist())


def llm_logits_of(checkpoint: TinyCheckpoint, **options: Any) -> Tensor:
    """Compute the logits [T, V] of the checkpoint's own ids, as `LLM` loads it: in float32, unless options differ."""
    options = {"device": "cpu", "dtype": "float32"} | options
    return pymllm.LLM(checkpoint.folder, **options).logits(checkpoint.ids.tolist())


def assert_equal_to_transformers(checkpoint: TinyCheckpoint, **options: Any) -> None:
    """Assert that `LLM` computes the logits that transformers does."""
    assert relative_error(llm_logits_of(checkpoint, **options), checkpoint.logits()) <= TOLERANCE


def assert_answers_as_meant(checkpoint: TinyCheckpoint, *, within: float = TOLERANCE, **options: Any) -> None:
    """Assert that the checkpoint verifies, and that one rank and two answer in float32 as the weights it means."""
    expected = checkpoint.logits()

    def run(parallel: Any = None) -> Tensor:
        model = pymllm.load_model(checkpoint.folder, device="cpu", dtype="float32", **options)
        return logits_of(model, checkpoint.ids)

    assert pymllm.verify(checkpoint.folder, device="cpu").ok
    for logits in (run(), *simulate(2, run)):
        assert (logits - expected).norm() / expected.norm() < within
