"""AutoRound's e4m3 linear weights.

    weight            float8_e4m3fn [O, I]
    weight_scale_inv  float [ceil(O/b0), ceil(I/b1)]           blocks of b0 x b1; despite its name, it multiplies
    weight_scale      float [1], [O] or [O·I/G]                the tensor, rows, or groups of G inputs, row after row
    input_scale       float [1]                                with static activations

w = weight * scale. The page with the layouts: quantization/gptq/README.md, "auto-round".
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pymllm.kernels.canonical import CHANNEL, TENSOR, CanonicalWeight
from pymllm.quantization.storage.fp8_linear import E4M3LinearMethod
from pymllm.quantization.storage.groups import check_groups, check_share
from pymllm.weights.spec import OUT, Dim, LinearShape


@dataclass(frozen=True)
class AutoRoundFp8LinearMethod(E4M3LinearMethod):
    """FP8 weights.  The fields are `E4M3LinearMethod`'s; a block of one output is a group of inputs."""

    name: ClassVar[str] = "auto-round"

    @property
    def scale_names(self) -> tuple[str, ...]:
        names = ("weight_scale_inv", "weight_scale")
        return names if self.block[0] > 1 else names[::-1]

    @property
    def group_size(self) -> int:
        """The inputs that share a scale of their row; 0: scales are not of groups."""
        return self.block[1] if self.block[0] == 1 else 0

    @property
    def scale_dims(self) -> tuple[Dim, ...]:
        if self.block == CHANNEL:
            return (OUT,)
        return (OUT.flattened(self.group_size),) if self.group_size else super().scale_dims

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape)
        check_share(self.group_size, shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        size, name = self.group_size, self.scale_names[0]
        if self.block in (TENSOR, CHANNEL) or not size:
            return super().to_canonical(tensors, shape)
        grid = tensors[name].unflatten(0, (-1, shape.in_features // size))  # [O, I/G], of all inputs
        mine = grid[:, shape.inputs.start // size : -(-shape.inputs.stop // size)]
        return super().to_canonical({**tensors, name: mine.contiguous()}, shape)
