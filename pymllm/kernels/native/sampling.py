"""Sampling on the CPU, each row in one visit, in C++ (`kernels/sampling.h`)."""

# R rows, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.native.addresses import (
    CODE,
    address,
    check_memory,
    checked_address,
    contiguous,
    integers,
    unfit,
)
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.sampling import SETTINGS, SamplingBatch, SamplingProblem

# Tokens are int32 inside, and a row's maxima are kept for pieces of it.
LARGEST_VOCABULARY = 2**30


class NativeSampling:
    """The native sampler.  isa: a kernel path, for tests; None: the one in use here."""

    name = "native"
    device_type = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: SamplingProblem) -> str | None:
        return "runs on the CPU only" if problem.device.type != "cpu" else native_missing_reason()

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return self._sample(logits, batch, None)

    def propose(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        chances = torch.empty(logits.shape[0], dtype=torch.float64)
        return self._sample(logits, batch, chances), chances

    def _sample(self, logits: Tensor, batch: SamplingBatch, chances: Tensor | None) -> Tensor:
        logits, where = _rows(logits)
        rows, vocabulary = logits.shape
        biases, seen = batch.bias_tokens.numel(), batch.seen_tokens.numel()
        tokens = torch.empty(rows, dtype=torch.int64)
        native().sample_tokens(
            where,
            rows,
            vocabulary,
            logits.stride(0),
            checked_address("settings", batch.settings, (rows, len(SETTINGS)), torch.float64),
            biases,
            checked_address("bias_starts", batch.bias_starts, (rows + 1,), torch.int64),
            checked_address("bias_tokens", batch.bias_tokens, (biases,), torch.int64),
            checked_address("bias_values", batch.bias_values, (biases,), torch.float32),
            seen,
            checked_address("seen_starts", batch.seen_starts, (rows + 1,), torch.int64),
            checked_address("seen_tokens", batch.seen_tokens, (seen,), torch.int64),
            checked_address("seen_counts", batch.seen_counts, (seen,), torch.float32),
            tokens.data_ptr(),
            0 if chances is None else chances.data_ptr(),
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return tokens

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        (logits, where), tokens = _rows(logits), integers("tokens", tokens)
        rows, vocabulary = logits.shape
        if count < 0:
            raise ConfigError(f"so many of the likeliest tokens cannot be had: {count}", code=CODE)
        count = min(count, vocabulary)
        chosen = torch.empty(rows)
        best, values = torch.empty((rows, count), dtype=torch.int64), torch.empty((rows, count))
        native().log_probabilities(
            where,
            rows,
            vocabulary,
            logits.stride(0),
            checked_address("tokens", tokens, (rows,), torch.int64),
            count,
            chosen.data_ptr(),
            best.data_ptr(),
            values.data_ptr(),
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return chosen, best, values


def _rows(logits: Tensor) -> tuple[Tensor, int]:
    """Return the logits as float32 rows on the CPU, each contiguous, and where they lie.

    Raises ConfigError unless they are [R, V].
    """
    if (
        not logits.is_floating_point()
        or logits.layout is not torch.strided
        or logits.ndim != 2
        or logits.is_meta
        or not 0 < logits.shape[1] <= LARGEST_VOCABULARY
    ):
        raise unfit("logits", logits, ("R", f"1 to {LARGEST_VOCABULARY} tokens"), "floats")
    check_memory("logits", logits)
    logits = logits.detach().to("cpu", torch.float32)
    if logits.stride(1) != 1 or logits.is_neg():
        logits = contiguous("logits", logits)
    rows, vocabulary = logits.shape
    size = (rows - 1) * logits.stride(0) + vocabulary if rows else 0
    return logits, address("logits", logits, size * 4)
