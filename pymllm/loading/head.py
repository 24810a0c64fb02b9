"""A head that the config ties to the embedding, and that the files hold all the same: is it the embedding's table?

The plan has to know, as a head of its own takes memory. So this is asked before anything is built, and is the one place
where planning reads tensors: only those of a tied head that is stored, only where name, dtype and shape are those of
the embedding's, and only up to the first bytes that differ. An equal head, which few writers store, is read in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pymllm.config import ModelConfig
from pymllm.quantization.base import WEIGHT_NAMES
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.tensor_file import TensorInfo

PIECE_BYTES = 4 << 20  # what is compared at a time


@dataclass(frozen=True)
class StoredHead:
    """A tied head as the files hold it.

    own: whether it is another table than the embedding's, so that the model has it as a head of its own.
    equal: the reasons to skip the tensors that are the embedding's once more, by name.
    """

    own: bool = False
    equal: dict[str, str] = field(default_factory=dict)


def find_own_head(checkpoint: Checkpoint, config: ModelConfig) -> StoredHead:
    """Find out whether a head that the config ties is stored, and is another table than the embedding's.

    A stored name that no weight of a head has (`lm_head.weightx`) makes no head; matching refuses it.
    """
    if not config.tie_word_embeddings:
        return StoredHead()
    head, embedding = config.head_names
    stored = [name for name in checkpoint.tensors if name.startswith(f"{head}.")]
    equal = {}
    for name in stored:
        twin = checkpoint.tensors.get(embedding + name.removeprefix(head))
        if twin is not None and same_tensor(checkpoint.tensors[name], twin):
            equal[name] = f"equal to {twin.name}, to which the config ties it"
    weight = any(f"{head}.{name}" in checkpoint.tensors for name in WEIGHT_NAMES)
    if weight and len(equal) < len(stored):
        return StoredHead(own=True)
    return StoredHead(equal=equal)


def same_tensor(one: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors of files have the same dtype, shape and bytes, reading up to the first difference."""
    if (one.dtype_name, one.shape) != (other.dtype_name, other.shape):
        return False
    if not one.shape:
        return _same_bytes(one.read(), other.read())
    rows = one.shape[0]
    step = max(1, PIECE_BYTES * rows // max(one.nbytes, 1))
    pieces = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return all(_same_bytes(one.read((piece,)), other.read((piece,))) for piece in pieces)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
