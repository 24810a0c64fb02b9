"""What steps take of a GPU's memory beside the weights and the KV cache.

The largest step is run once, before the cache is there, and the allocator says how much it took. What a captured graph
keeps, and what the choice of tokens takes, follow from that by the rules below, of which none has been held against a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymllm.engine.graphs import graph_sizes
from pymllm.engine.runner import Runner
from pymllm.engine.scheduler import MAX_REQUESTS, STEP_TOKENS
from pymllm.kernels.hardware import current
from pymllm.models.language_model import LanguageModel
from pymllm.weights.memory import is_out_of_memory, out_of_memory

# Of a logit while tokens are chosen from it: with top_p `TorchSampling` has it as float32 and float64, sorted and not.
CHOOSING_BYTES = 64

# Of a logit that a captured graph keeps, in 16 bits and in float32.
KEPT_LOGIT_BYTES = 8

# Of a captured graph beside its tensors: its own nodes, and the rest of the segments that its allocator takes.
GRAPH_BYTES = 32 << 20

# How many times the outputs and inputs of its widest layer a token takes in a step, before that has been measured.
ASSUMED_LIVE = 4


def largest_step(model: LanguageModel, max_model_len: int | None) -> int:
    """Return how many tokens the largest step has.

    max_model_len: the most that a request shall have; None: nobody has said so. Where keys depend on a request's
    length, its prompt is one step, which is provided for up to what was asked for.
    """
    if model.keys_depend_on_length and max_model_len is not None:
        return max_model_len
    return min(STEP_TOKENS, model.max_length if max_model_len is None else max_model_len)


def estimate_step_bytes(tokens: int, widest: int, itemsize: int) -> int:
    """Estimate what a step takes of a model that is not loaded.  widest: the outputs and inputs of its widest layer."""
    return tokens * widest * itemsize * ASSUMED_LIVE


def working_bytes(
    step_bytes: int,
    tokens: int,
    vocabulary: int,
    *,
    captured: bool,
    exact: bool = False,
    widths: Sequence[int] = (1,),
) -> int:
    """Return what has to stay free beside weights and cache.

    step_bytes: what the largest step takes, of so many tokens.  captured: whether decoding steps become graphs.
    exact: whether these have no spare rows, so that there is one for each number of requests.
    widths: how many tokens of each request a decoding step may have: `Strategy.widths`.
    """
    needed = step_bytes + MAX_REQUESTS * max(widths) * vocabulary * CHOOSING_BYTES
    if captured:
        sizes, row_bytes = graph_sizes(exact), step_bytes // tokens + vocabulary * KEPT_LOGIT_BYTES
        needed += sum(widths) * sum(sizes) * row_bytes + len(widths) * len(sizes) * GRAPH_BYTES
    return needed


@torch.no_grad()
def measure_step_bytes(model: LanguageModel, device: torch.device, tokens: int) -> int:
    """Run the largest step once, on all ranks at a time, and return the bytes that it took at most.

    It has so many tokens, and the logits of as many of them as there may be requests.  ConfigError "out-of-memory"
    where there is no room for it.
    """
    runner, vocabulary = Runner(model, device), model.config.size("vocab_size")
    text = [place % vocabulary for place in range(tokens)]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        hidden = runner.hidden_states([text])
        with current(device):
            model.compute_logits(hidden[:MAX_REQUESTS], gather_all=True)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(
            f"a first step of {tokens} tokens",
            error,
            fix="Choose smaller formats (--quant '**.layers.**=int4'), divide the model over ranks "
            "(--tensor-parallel-size), or free memory of the GPU.",
        ) from error
    return int(torch.cuda.max_memory_allocated(device)) - before
