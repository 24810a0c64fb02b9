"""Sampling on the CPU, each row in one visit, in C++ (`kernels/sampling.h`)."""

# R rows, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

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
        logits = _rows(logits)
        rows, vocabulary = logits.shape
        _check_batch(batch, rows)
        tokens = torch.empty(rows, dtype=torch.int64)
        native().sample_tokens(
            logits.data_ptr(),
            rows,
            vocabulary,
            logits.stride(0),
            batch.settings.data_ptr(),
            batch.bias_tokens.numel(),
            batch.bias_starts.data_ptr(),
            batch.bias_tokens.data_ptr(),
            batch.bias_values.data_ptr(),
            batch.seen_tokens.numel(),
            batch.seen_starts.data_ptr(),
            batch.seen_tokens.data_ptr(),
            batch.seen_counts.data_ptr(),
            tokens.data_ptr(),
            0 if chances is None else chances.data_ptr(),
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return tokens

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        logits, tokens = _rows(logits), tokens.to("cpu", torch.int64).contiguous()
        rows, vocabulary = logits.shape
        if tokens.shape != (rows,):
            raise ValueError(f"tokens must be [{rows}], not {list(tokens.shape)}")
        count = min(count, vocabulary)
        chosen = torch.empty(rows)
        best, values = torch.empty((rows, count), dtype=torch.int64), torch.empty((rows, count))
        native().log_probabilities(
            logits.data_ptr(),
            rows,
            vocabulary,
            logits.stride(0),
            tokens.data_ptr(),
            count,
            chosen.data_ptr(),
            best.data_ptr(),
            values.data_ptr(),
            isa_code(self.isa),
            torch.get_num_threads(),
        )
        return chosen, best, values


def _rows(logits: Tensor) -> Tensor:
    """Return the logits as float32 rows on the CPU, each contiguous; ValueError unless they are [R, V]."""
    if logits.ndim != 2 or not 0 < logits.shape[1] <= LARGEST_VOCABULARY:
        raise ValueError(
            f"logits must be [R, V] with 1 to {LARGEST_VOCABULARY} tokens, not {list(logits.shape)}"
        )
    logits = logits.detach().to("cpu", torch.float32)
    return logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()


def _check_batch(batch: SamplingBatch, rows: int) -> None:
    """Raise ValueError unless the native code may read the tensors; it gets addresses, and checks what is there."""
    biases, seen = batch.bias_tokens.numel(), batch.seen_tokens.numel()
    for tensor, dtype, shape in (
        (batch.settings, torch.float64, (rows, len(SETTINGS))),
        (batch.bias_starts, torch.int64, (rows + 1,)),
        (batch.bias_tokens, torch.int64, (biases,)),
        (batch.bias_values, torch.float32, (biases,)),
        (batch.seen_starts, torch.int64, (rows + 1,)),
        (batch.seen_tokens, torch.int64, (seen,)),
        (batch.seen_counts, torch.float32, (seen,)),
    ):
        if (
            tensor.dtype is not dtype
            or tensor.shape != shape
            or not tensor.is_cpu
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"a batch's tensor must be {dtype} {list(shape)}, contiguous on the CPU, not {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
