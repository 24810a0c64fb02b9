"""From the hidden states of a text's tokens to its vector: pooling, projections, normalisation."""

# T tokens of one text, N texts, H hidden size, D size of a vector

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.embedding.settings import Dense, Pooling
from pymllm.errors import CheckpointError, first_few
from pymllm.weights.folder import SINGLE
from pymllm.weights.safetensors_file import SafetensorsFile
from pymllm.weights.spec import FLOATS


def pool(hidden: Tensor, pooling: Pooling, prompt: int) -> Tensor:
    """Make one vector of a text's hidden states, in float32.

    hidden: [T, H].  prompt: how many of the first tokens are a prompt's, at most T - 1.
    Returns [H times the number of modes].
    """
    start = 0 if pooling.include_prompt else prompt
    seen = hidden[start:].float()
    return torch.cat([POOLS[mode](seen, start) for mode in pooling.modes])


def _weighted_mean(seen: Tensor, start: int) -> Tensor:
    """Weigh each token by its place in the text, prompt included, which counts from 1."""
    weights = torch.arange(start + 1, start + 1 + len(seen), device=seen.device, dtype=seen.dtype)
    return weights @ seen / weights.sum()


POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cls": lambda seen, start: seen[0],
    "max": lambda seen, start: seen.max(0).values,
    "mean": lambda seen, start: seen.mean(0),
    "mean_sqrt_len_tokens": lambda seen, start: seen.sum(0) / len(seen) ** 0.5,
    "weightedmean": _weighted_mean,
    "lasttoken": lambda seen, start: seen[-1],
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


class Projection:
    """A Dense module with its tensors, in float32."""

    def __init__(self, dense: Dense, device: torch.device) -> None:
        self.dense, self.activation = dense, ACTIVATIONS[dense.activation]
        self.tensors = {name: tensor.to(device) for name, tensor in _read(dense).items()}

    def __call__(self, vectors: Tensor) -> Tensor:
        """Project vectors [N, inputs].  Returns [N, outputs]."""
        made = self.activation(
            F.linear(vectors, self.tensors["linear.weight"], self.tensors.get("linear.bias"))
        )
        if not self.dense.residual:
            return made
        own = self.tensors.get("residual.weight")
        return made + (vectors if own is None else F.linear(vectors, own))


def _read(dense: Dense) -> dict[str, Tensor]:
    """Read the tensors of a Dense module.  CheckpointError unless they are just those that its settings ask for."""
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (dense.outputs, dense.inputs)}
    if dense.bias:
        wanted["linear.bias"] = (dense.outputs,)
    if dense.residual and dense.inputs != dense.outputs:
        wanted["residual.weight"] = (dense.outputs, dense.inputs)
    path = dense.folder / SINGLE
    if not path.is_file():
        raise CheckpointError(
            "the projection of this model's vectors has no safetensors file",
            code="weights-missing",
            file=str(path),
            fix="Pickles are never opened: load the model with sentence-transformers and save it again.",
        )
    file = SafetensorsFile.open(path)
    found = {name: info for name, info in file.tensors.items() if info.dtype in FLOATS}
    shapes = {name: tuple(info.shape) for name, info in found.items()}
    wrong = [name for name in {**wanted, **file.tensors} if shapes.get(name) != wanted.get(name, ())]
    if wrong:
        raise CheckpointError(
            f"the projection's tensors are not those that its config.json asks for: {first_few(wrong)}",
            code="checkpoint-mismatch",
            file=str(path),
            tensor=wrong[0],
            expected=str(wanted),
            found=str({name: (info.dtype_name, *info.shape) for name, info in file.tensors.items()}),
        )
    try:
        tensors = {name: info.read().float() for name, info in found.items()}
    finally:
        file.close()
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise CheckpointError(
                "the projection holds numbers that are not finite",
                code="bad-content",
                file=str(path),
                tensor=name,
                expected="finite numbers",
                found=f"{bad} of {tensor.numel()} are not",
                fix="Download the file again, or ask for it to be written again.",
            )
    return tensors
