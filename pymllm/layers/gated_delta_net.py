"""A gated delta net: attention's place in a layer, with a state of one size instead of keys and values.

q, k and v pass a short convolution along the tokens and SiLU; the gated delta rule (`kernels/recurrence.py`) runs over
them, its decay and its learning rate computed of each token; a norm of each head and a gate follow, then a projection.
"""

# T tokens, H hidden size, Hk key heads, Hv value heads, Dk key size, Dv value size, C channels, K kernel size

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm.config import Execution, ModelConfig, current_execution
from pymllm.errors import ConfigError
from pymllm.kernels.gated_activation import activation_of
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.recurrence import (
    CausalConvKernel,
    CausalConvProblem,
    GatedDeltaKernel,
    GatedDeltaProblem,
)
from pymllm.kernels.registry import Selection, select
from pymllm.layers.held import Binder, Description
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from pymllm.layers.stateful import StatefulLayer
from pymllm.layers.step import fetch_attn_metadata
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.kv_cache import UnquantizedKVCacheMethod
from pymllm.weights.spec import Span

# Beside the sums of squares by whose roots q and k are divided.
NORMALISE_EPS = 1e-6


class HeadsLinear(MergedColumnParallelLinear):
    """A linear layer whose parts are divided over ranks by heads.

    parts: of each, how many heads it has and how many features a head.
    """

    def __init__(
        self, hidden_size: int, parts: Sequence[tuple[int, int]], *, part_names: Sequence[str], **options: Any
    ) -> None:
        self.heads = tuple(parts)
        sizes = [heads * size for heads, size in parts]
        super().__init__(hidden_size, sizes, False, False, part_names=part_names, **options)
        _, shares = self.shard(self.tp_rank, self.tp_size)
        self.local_sizes = [share.size for share in shares]

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        shares = (Span.even(heads, rank, size, f"{self.prefix}, heads") for heads, _ in self.heads)
        spans = (
            Span(share.start * features, share.stop * features, share.total * features)
            for share, (_, features) in zip(shares, self.heads, strict=True)
        )
        return Span.full(self.in_features), tuple(spans)


class DepthwiseConv(nn.Module):
    """The weight of a convolution of each channel: [C, 1, K], whole on every rank."""

    def __init__(self, channels: int, kernel_size: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        weight = torch.empty((channels, 1, kernel_size), dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)


class GatedDeltaNet(StatefulLayer):
    """The block of Qwen3.5, whose projections q, k and v lie in one tensor, and those of z, b and a in one each.

    reads_input: the names of the layers that multiply the hidden states as they come.
    """

    A_log: Tensor
    dt_bias: Tensor
    reads_input: ClassVar[tuple[str, ...]] = ("in_proj_qkv", "in_proj_z", "in_proj_ba")

    def __init__(self, config: ModelConfig, *, prefix: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.prefix, self.hidden_size = prefix, config.size("hidden_size")
        self.key_heads, self.value_heads = (
            config.size("linear_num_key_heads"),
            config.size("linear_num_value_heads"),
        )
        self.key_dim, self.value_dim = (
            config.size("linear_key_head_dim"),
            config.size("linear_value_head_dim"),
        )
        _check(config, self.key_heads, self.value_heads)
        execution = current_execution() or Execution(dtype=torch.get_default_dtype())
        self.parallel = current_parallel()
        self.make_projections(prefix, quant_config)
        rank, size = self.parallel.rank, self.parallel.size
        keys, values = (
            Span.even(heads, rank, size, f"{prefix}, {what} heads")
            for heads, what in ((self.key_heads, "key"), (self.value_heads, "value"))
        )
        self.own_keys, self.own_values = keys, values
        kernel_size = config.size("linear_conv_kernel_dim")
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        self.conv1d = DepthwiseConv(channels, kernel_size, execution.dtype)
        # The decay is computed in float32: a decay near 1 has few digits in 16 bits.
        for name in ("A_log", "dt_bias"):
            value = torch.empty(self.value_heads, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            self.value_heads * self.value_dim,
            self.hidden_size,
            False,
            prefix=f"{prefix}.out_proj",
            quant_config=quant_config,
        )
        device, silu = probe_device(execution.device), activation_of(config.hidden_act).kind == "silu"
        self.sizes = [keys.size * self.key_dim] * 2 + [values.size * self.value_dim]
        self.conv_problem = CausalConvProblem(
            channels=sum(self.sizes),
            kernel_size=kernel_size,
            dtype=execution.dtype,
            device=device,
            activation="silu" if silu else None,
        )
        # Of the convolution's output, where the kernel does not compute it.
        self.activation = None if silu else functools.partial(F.gelu, approximate="tanh")
        self.problem = GatedDeltaProblem(
            num_key_heads=keys.size,
            num_value_heads=values.size,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dtype=execution.dtype,
            device=device,
            normalise_eps=NORMALISE_EPS,
        )
        self.conv: Selection[CausalConvKernel] = select(
            "causal_conv", self.conv_problem, execution.forced_kernel("causal_conv")
        )
        self.rule: Selection[GatedDeltaKernel] = select(
            "gated_delta", self.problem, execution.forced_kernel("gated_delta")
        )

    def make_projections(self, prefix: str, quant_config: QuantizationConfig | None) -> None:
        """Make the layers that multiply the hidden states."""
        keys, values = (self.key_heads, self.key_dim), (self.value_heads, self.value_dim)

        def make(name: str, parts: Sequence[tuple[int, int]], part_names: Sequence[str]) -> HeadsLinear:
            return HeadsLinear(
                self.hidden_size,
                parts,
                part_names=part_names,
                prefix=f"{prefix}.{name}",
                quant_config=quant_config,
            )

        self.in_proj_qkv = make("in_proj_qkv", (keys, keys, values), ("in_proj_qkv",))
        self.in_proj_z = make("in_proj_z", (values,), ("in_proj_z",))
        gates = (self.value_heads, 1)
        self.in_proj_ba = make("in_proj_ba", (gates, gates), ("in_proj_b", "in_proj_a"))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multiply the hidden states.

        hidden: [T, H].  Returns q, k and v side by side, [T, C], z, [T, Hv · Dv], and b and a, [T, Hv] each.
        """
        b, a = self.in_proj_ba(hidden).chunk(2, dim=-1)
        return self.in_proj_qkv(hidden), self.in_proj_z(hidden), b, a

    # What a holder of weights answers: see `pymllm.layers.held`

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a request's last inputs of the convolution, and of its state of the rule."""
        return self.conv_problem.state_shape, self.problem.state_shape

    def describe(self, binder: Binder) -> Iterator[Description]:
        """Describe the two recurrences for a plan."""
        conv, rule = self.shape_bytes()
        method, state = UnquantizedKVCacheMethod(), "state in float32"
        taps = self.conv_problem.kernel_size
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        for name, kind, selection, shape, local, nbytes in (
            (
                f"{self.prefix}.conv1d",
                "convolution",
                self.conv,
                (channels, taps),
                (self.conv_problem.channels, taps),
                conv,
            ),
            (
                self.prefix,
                "gated delta rule",
                self.rule,
                (self.value_heads, self.key_dim, self.value_dim),
                self.problem.state_shape,
                rule,
            ),
        ):
            yield Description(
                name,
                "recurrence",
                method,
                f"{kind}, {state}",
                selection,
                getattr(selection.kernel, "numerics", "float32 or better"),
                False,
                shape,
                local,
                state_bytes=nbytes,
            )

    def selections(self, binder: Binder | None = None) -> tuple[Selection[Any], ...]:
        """Return two kernels: the convolution's, and the rule's."""
        return self.conv, self.rule

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run the block.  positions: not used; hidden: [T, H].  Returns [T, H]."""
        step = fetch_attn_metadata()
        before, matrices = self.states_in(step)
        mixed, z, b, a = self.project(hidden)
        mixed = self.conv.kernel.run(self.conv_problem, mixed, self._taps(), None, before, step)
        if self.activation is not None:
            mixed = self.activation(mixed)
        q, k, v = (
            part.unflatten(-1, (-1, size))
            for part, size in zip(
                mixed.split(self.sizes, dim=-1),
                (self.key_dim, self.key_dim, self.value_dim),
                strict=True,
            )
        )
        own = slice(self.own_values.start, self.own_values.stop)
        decay = -self.A_log[own].exp() * F.softplus(a.float() + self.dt_bias[own])
        y = self.rule.kernel.run(self.problem, q, k, v, decay, b.float().sigmoid(), matrices, step)
        gate = F.silu(z.float()).view(y.shape)
        normed = self.norm(y.contiguous())
        return self.out_proj((normed * gate).to(hidden.dtype).flatten(1))

    def _taps(self) -> Tensor:
        """Return the weight of this rank's channels, [C, K]."""
        weight = self.conv1d.weight.squeeze(1)
        if self.parallel.size == 1:
            return weight
        keys, values, total = self.own_keys, self.own_values, self.key_heads * self.key_dim
        spans = (
            (keys.start * self.key_dim, keys.size * self.key_dim),
            (total + keys.start * self.key_dim, keys.size * self.key_dim),
            (2 * total + values.start * self.value_dim, values.size * self.value_dim),
        )
        return torch.cat([weight[first : first + size] for first, size in spans])


class GroupedGatedDeltaNet(GatedDeltaNet):
    """The block of Qwen3-Next: its two tensors have the outputs of a key head beside those of its value heads."""

    reads_input: ClassVar[tuple[str, ...]] = ("in_proj_qkvz", "in_proj_ba")

    def make_projections(self, prefix: str, quant_config: QuantizationConfig | None) -> None:
        """Make the layers that multiply the hidden states."""
        self.shared = self.value_heads // self.key_heads

        def make(name: str, features: int) -> HeadsLinear:
            return HeadsLinear(
                self.hidden_size,
                ((self.key_heads, features),),
                part_names=(name,),
                prefix=f"{prefix}.{name}",
                quant_config=quant_config,
            )

        self.in_proj_qkvz = make("in_proj_qkvz", 2 * self.key_dim + 2 * self.shared * self.value_dim)
        self.in_proj_ba = make("in_proj_ba", 2 * self.shared)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multiply the hidden states, and sort the outputs; see `GatedDeltaNet.project`."""
        of_values = self.shared * self.value_dim
        qkvz = self.in_proj_qkvz(hidden).unflatten(-1, (self.own_keys.size, -1))
        q, k, v, z = qkvz.split([self.key_dim, self.key_dim, of_values, of_values], dim=-1)
        b, a = self.in_proj_ba(hidden).unflatten(-1, (self.own_keys.size, -1)).chunk(2, dim=-1)
        mixed = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
        return mixed, z.flatten(1), b.flatten(1), a.flatten(1)


def _check(config: ModelConfig, key_heads: int, value_heads: int) -> None:
    """Raise ConfigError for settings that the block cannot have."""
    if value_heads % key_heads:
        raise ConfigError(
            "the value heads of the linear attention cannot be shared evenly by its key heads",
            code="config-value",
            file="config.json",
            tensor="linear_num_value_heads",
            expected=f"a multiple of linear_num_key_heads, {key_heads}",
            found=str(value_heads),
        )
