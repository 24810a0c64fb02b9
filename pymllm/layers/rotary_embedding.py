"""Rotary position embeddings, with the scalings that checkpoints use.

Tables hold the cosines and sines of every position up to the largest that was asked for. Layers with equal settings
share one module. The scalings equal those of transformers (`modeling_rope_utils`), and the tests compare with them.
"""

# T tokens, D head size, R rotary size (the part of a head that is rotated)

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution, current_execution
from pymllm.errors import ConfigError, unknown_name
from pymllm.kernels.vllm.elementwise import VllmElementwise, VllmRotaryEmbeddingAdapter
from pymllm.layers.elementwise import elementwise_kernel
from pymllm.layers.step import current_attn_metadata


class RotaryEmbedding(nn.Module):
    """The rotation of heads, or of their first `rotary_dim` elements: i is paired with i + R/2 (the NeoX style).

    inverse_frequencies: [R/2].  attention_scaling: the factor on cosines and sines (yarn).
    by_length: True where angles depend on a request's length, besides the position.
    """

    by_length: ClassVar[bool] = False

    def __init__(
        self, head_size: int, rotary_dim: int, max_position: int, inverse_frequencies: Tensor, scale: float
    ):
        super().__init__()
        self.head_size, self.rotary_dim, self.max_position = head_size, rotary_dim, max_position
        self.inverse_frequencies, self.attention_scaling = inverse_frequencies, scale
        self.kernel = elementwise_kernel()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _frequencies(self, length: int) -> Tensor:
        """Return the frequencies for sequences of `length`, [R/2]; here the same for all."""
        return self.inverse_frequencies

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of `length` positions or more, [>= length, R/2] float32."""
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < length:
            rows = (
                self.max_position
                if device.type != "cpu"
                else min(self.max_position, 2 ** (length - 1).bit_length())
            )
            angles = torch.outer(torch.arange(max(rows, length)).float(), self._frequencies(length))
            table = tuple((f(angles) * self.attention_scaling).to(device) for f in (torch.cos, torch.sin))  # type: ignore[assignment]
            self._tables[device] = table  # type: ignore[assignment]
        return table  # type: ignore[return-value]

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the angles of positions [T].  Returns cosines and sines [T, R/2], float32."""
        # On a GPU the table covers max_position from the start, so that no step waits for a maximum.
        step, on_cpu = current_attn_metadata(), positions.device.type == "cpu"
        if on_cpu and step is not None and step.max_seqlen_k:
            length = step.max_seqlen_k
        else:
            length = int(positions.max()) + 1 if on_cpu and positions.numel() else 1
        cos, sin = self._table(length, positions.device)
        return cos[positions], sin[positions]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `cos_sin` does, which all layers of a step with the same positions share."""
        step = current_attn_metadata()
        if step is None:
            return self.cos_sin(positions)
        return step.once((self, id(positions)), lambda: self.cos_sin(positions), positions)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key by the angles of their positions.

        positions: [T]; query, key: [T, heads * D] or [T, heads, D].  Returns both, in their shapes.
        """
        cos, sin = self.angles(positions)
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.kernel.rotate(x.view(*positions_shape(x, self.head_size)), cos, sin).view(x.shape)


class PartialRotaryEmbedding(RotaryEmbedding):
    """The rotation of the first `rotary_dim` elements of each head; the rest pass bit for bit."""


class DynamicNTKRotaryEmbedding(RotaryEmbedding):
    """The rotation whose base grows with a request's length, once that is past the trained one (NTK)."""

    by_length = True

    def __init__(self, head_size: int, rotary_dim: int, max_position: int, base: float, factor: float):
        super().__init__(head_size, rotary_dim, max_position, default_frequencies(rotary_dim, base), 1.0)
        self.base, self.factor = base, factor

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        beyond = (request_lengths(positions).double() / self.max_position).clamp(min=1)  # [T]
        growth = (self.factor * beyond - (self.factor - 1)) ** (self.rotary_dim / (self.rotary_dim - 2))
        exponents = torch.arange(0, self.rotary_dim, 2, device=positions.device) / self.rotary_dim
        frequencies = 1 / (self.base * growth[:, None]) ** exponents.double()
        angles = positions.float()[:, None] * frequencies.float()
        return angles.cos(), angles.sin()


class LongRotaryEmbedding(RotaryEmbedding):
    """The rotation of LongRoPE: one set of frequencies for requests up to the trained length, another for longer ones.

    A request that grows past that length needs its earlier keys made anew (`CausalLM.restart_length`).
    """

    by_length = True

    def __init__(
        self, head_size: int, rotary_dim: int, max_position: int, base: float, scaling: Mapping[str, Any]
    ):
        self.trained = min(int(scaling["original_max_position_embeddings"]), 2**31 - 1)
        default = default_frequencies(rotary_dim, base)
        short, long = (default / _factors(scaling[name], default) for name in ("short_factor", "long_factor"))
        scale = scaling.get("attention_factor")
        if scale is None:
            growth = scaling.get("factor") or max_position / self.trained
            scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(self.trained))
        super().__init__(head_size, rotary_dim, max_position, short, float(scale))
        self.long = RotaryEmbedding(head_size, rotary_dim, max_position, long, float(scale))

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        is_long = (request_lengths(positions) > self.trained).unsqueeze(-1)
        (cos, sin), (long_cos, long_sin) = super().cos_sin(positions), self.long.cos_sin(positions)
        return torch.where(is_long, long_cos, cos), torch.where(is_long, long_sin, sin)


def request_lengths(positions: Tensor) -> Tensor:
    """Return the length that the request of each token has after this step.

    positions: [T].  Returns [T].  Outside a runner's step all tokens belong to one request.
    """
    step = current_attn_metadata()
    if step is not None and step.token_lengths.shape == positions.shape:
        return step.token_lengths
    return (positions.max() + 1).expand(positions.shape) if positions.numel() else positions


def _factors(values: Any, frequencies: Tensor) -> Tensor:
    factors = torch.tensor(values, dtype=torch.float32)
    if factors.shape != frequencies.shape:
        raise TypeError("one factor for each frequency")
    return factors


class Gemma4ProportionalRotaryEmbedding(RotaryEmbedding):
    """The rotation of part of a head as if the frequencies were spread over all of it.

    The exponent's denominator is the head size. Pairs past `rotary_dim` have frequency zero, so they pass unchanged.
    """

    def __init__(self, head_size: int, rotary_dim: int, max_position: int, base: float):
        exponents = torch.arange(0, rotary_dim, 2).float() / head_size
        rotated = 1.0 / base**exponents
        padded = torch.cat((rotated, torch.zeros((head_size - rotary_dim) // 2)))
        super().__init__(head_size, head_size, max_position, padded, 1.0)


def positions_shape(x: Tensor, head_size: int) -> tuple[int, int, int]:
    """Return the shape [T, heads, D] of a tensor that may have its heads flattened."""
    return x.shape[0], math.prod(x.shape[1:]) // head_size, head_size


def default_frequencies(rotary_dim: int, base: float) -> Tensor:
    """Compute base^(-2i/R), [R/2]."""
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)


def llama3_frequencies(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> Tensor:
    """Scale frequencies [R/2]: long wavelengths are stretched by `factor`, short ones kept, others interpolated."""
    frequencies = default_frequencies(rotary_dim, base)
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (trained / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelengths > trained / low, frequencies / factor, frequencies)
    is_between = (wavelengths <= trained / low) & (wavelengths >= trained / high)
    return torch.where(is_between, between, stretched)


def yarn_frequencies(
    rotary_dim: int, base: float, max_position: int, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Compute yarn's blend of interpolated and kept frequencies, [R/2], and its factor on cosines and sines."""
    trained = scaling.get("original_max_position_embeddings") or max_position
    factor = scaling.get("factor") or max_position / trained

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            magnitude(factor, mscale) / magnitude(factor, all_dims)
            if mscale and all_dims
            else magnitude(factor)
        )

    def dimension_of(rotations: float) -> float:
        return rotary_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # Below 0 where all wavelengths are longer than the trained length: all frequencies are kept.
    width = high - low or 0.001
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / width).clamp(0, 1)
    kept = default_frequencies(rotary_dim, base)
    return kept / factor * ramp + kept * (1 - ramp), float(attention)


def divided_frequencies(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> Tensor:
    """Divide each frequency by a factor of its own.  GGUF files store any scaling of a model as such factors."""
    frequencies = default_frequencies(rotary_dim, base)
    return frequencies / _factors(scaling["factors"], frequencies)


ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "factors")


def get_rope(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_type: str = "default",
) -> RotaryEmbedding | VllmRotaryEmbeddingAdapter:
    """Make the rotary module for these settings, or return the one that equal settings have.

    rope_type: one of `ROPE_TYPES`.  rope_scaling: the settings of that type, named as in config.json; if rope_type is
    "default", the type is read from there, too.
    ConfigError for an unknown type, a missing setting, or a rotary_dim that is odd or too large.
    """
    if rope_type == "default" and rope_scaling:
        rope_type = rope_scaling.get("rope_type") or rope_scaling.get("type") or rope_type
    settings = json.dumps(dict(rope_scaling or {}), sort_keys=True, default=str)
    # Models are built on the meta device; these few numbers are real from the start.
    with torch.device("cpu"):
        return _get_rope(
            head_size,
            rotary_dim,
            max_position,
            float(base),
            settings,
            rope_type,
            current_execution(),
            elementwise_kernel(),
        )


@functools.lru_cache(maxsize=64)
def _get_rope(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    settings: str,
    rope_type: str,
    execution: Execution | None,
    kernel: Any,
) -> RotaryEmbedding | VllmRotaryEmbeddingAdapter:
    """Make the module of `get_rope`.  settings: rope_scaling as JSON.  kernel: the one that rotates.

    Every argument is part of the cache's key.
    """
    _check_rotary_dim(head_size, rotary_dim)
    if rope_type not in ROPE_TYPES:
        raise unknown_name("rotary scaling", rope_type, ROPE_TYPES, code="rope-type")
    scaling = json.loads(settings)
    scale = 1.0
    try:
        if rope_type == "dynamic":
            # As transformers has it: past max_position_embeddings, whatever the original length was.
            return DynamicNTKRotaryEmbedding(head_size, rotary_dim, max_position, base, scaling["factor"])
        if rope_type == "longrope":
            embedding = LongRotaryEmbedding(head_size, rotary_dim, max_position, base, scaling)
            if bool((embedding.inverse_frequencies * embedding.long.inverse_frequencies).isfinite().all()):
                return embedding
            raise ArithmeticError
        if rope_type == "llama3":
            frequencies = llama3_frequencies(rotary_dim, base, scaling)
        elif rope_type == "factors":
            frequencies = divided_frequencies(rotary_dim, base, scaling)
        elif rope_type == "yarn":
            frequencies, scale = yarn_frequencies(rotary_dim, base, max_position, scaling)
        else:
            frequencies = default_frequencies(rotary_dim, base)
            if rope_type == "linear":
                frequencies = frequencies / scaling["factor"]
        usable = bool(frequencies.isfinite().all())
    except KeyError as missing:
        raise ConfigError(
            f"rotary scaling {rope_type!r} needs the setting {missing}",
            code="config-missing-setting",
            file="config.json",
            tensor="rope_parameters",
            found=", ".join(scaling),
        ) from None
    except (ArithmeticError, TypeError):
        usable = False
    if not usable:
        raise ConfigError(
            f"rotary scaling {rope_type!r} gives no usable frequencies",
            code="config-value",
            file="config.json",
            tensor="rope_parameters",
            found=f"base {base}, {settings}",
        )
    if isinstance(kernel, VllmElementwise):
        dtype = None if execution is None else execution.dtype
        theirs = kernel.make_rotary(head_size, rotary_dim, max_position, base, scaling, rope_type, dtype)
        if theirs is not None:
            return theirs
    cls = RotaryEmbedding if rotary_dim == head_size else PartialRotaryEmbedding
    return cls(head_size, rotary_dim, max_position, frequencies, scale)


def _check_rotary_dim(head_size: int, rotary_dim: int) -> None:
    if rotary_dim % 2 or not 0 < rotary_dim <= head_size:
        raise ConfigError(
            "the rotated part of a head must be even and no larger than the head",
            code="rope-dim",
            expected=f"an even number up to {head_size}",
            found=str(rotary_dim),
        )


def get_gemma4_proportional_rope(
    head_size: int, rotary_dim: int, max_position: int, base: float
) -> Gemma4ProportionalRotaryEmbedding:
    """Make Gemma's proportional rotary embedding, or return the one that equal settings have."""
    _check_rotary_dim(head_size, rotary_dim)
    with torch.device("cpu"):
        return _get_proportional_rope(head_size, rotary_dim, max_position, float(base), current_execution())


@functools.lru_cache(maxsize=16)
def _get_proportional_rope(
    head_size: int, rotary_dim: int, max_position: int, base: float, execution: Execution | None
) -> Gemma4ProportionalRotaryEmbedding:
    return Gemma4ProportionalRotaryEmbedding(head_size, rotary_dim, max_position, base)
