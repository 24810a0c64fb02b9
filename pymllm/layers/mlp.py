"""The gated MLP that most decoders have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from pymllm.kernels.gated_activation import activation_of
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.layers.activation import GeluAndMul, SiluAndMul
from pymllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from pymllm.quantization.base import QuantizationConfig

# By `GatedActivation.kind`.
GATED: dict[str, type[nn.Module]] = {"silu": SiluAndMul, "gelu_tanh": GeluAndMul}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with gate and up in one matmul.

    part_names: the names of the checkpoint's tensors; if there is one, gate and up lie side by side in that tensor.
    reads_input: the names of the layers that multiply x.
    factors: for a layer, the other layer and the part of it whose outputs are a factor of this layer's input.
    """

    reads_input: ClassVar[tuple[str, ...]] = ("gate_up_proj",)
    factors: ClassVar[dict[str, tuple[str, int]]] = {"down_proj": ("gate_up_proj", 1)}

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        *,
        bias: bool = False,
        part_names: Sequence[str] = ("gate_proj", "up_proj"),
        prefix: str = "",
        quant_config: QuantizationConfig | None = None,
    ) -> None:
        super().__init__()
        kind = activation_of(activation).kind
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size, intermediate_size],
            bias,
            gather_output=False,
            part_names=part_names,
            prefix=f"{prefix}.gate_up_proj",
            quant_config=quant_config,
        )
        self.act = GATED[kind]()
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias, prefix=f"{prefix}.down_proj", quant_config=quant_config
        )

    @property
    def input_codes(self) -> RowCodes | None:
        """The codes in which x may come; None: floats only."""
        return None if self._forward_pre_hooks or self._forward_hooks else self.gate_up_proj.input_codes

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP.  x: [T, hidden_size], or quantised in `input_codes`.  Returns [T, hidden_size]."""
        return self.down_proj(self.act(self.gate_up_proj(x), self.down_proj))
