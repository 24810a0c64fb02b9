"""The contracts of kernels with a state a request: the gated delta rule, the scan of Mamba 2, and a causal convolution.

As in attention, a kernel gets the whole step at once: the tokens of all requests side by side, and an `AttentionStep`
that says which token is whose. What a request has seen before is a state of one size, however long it is: float32, in
the slot of the layer's `state` that `step.state_slots` names, which the kernel reads and then overwrites. A request
whose new tokens are all that it has (`step.context_lens`) begins with zeros, whatever its slot holds. A slot below 0,
or `state` None where `step.state_slots` is None: the request begins with zeros, and nothing is kept of it.

Arithmetic is float32 or better, whatever the dtype of the tokens, and the result is rounded to that once. A kernel that
is `reproducible` gives a request the same bits however its prompt is cut into steps, and whatever is beside it; another
one gives what differs by no more than the rounding of the state between steps.
"""

# R requests, T tokens of this step, S slots, Hk key heads, Hv value heads, Dk key size, Dv value size,
# H heads, P head size, G groups, N state size, C channels, K kernel size

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pymllm.errors import ConfigError, IndicesError
from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.hardware import Device

Activation = Literal["silu"] | None


@dataclass(frozen=True, kw_only=True)
class GatedDeltaProblem:
    """One layer's gated delta rule: each value head keeps a matrix that maps keys to values.

    For each token, with q multiplied by Dk**-0.5:  state = exp(g) * state;  state += outer(k, beta * (v - k @ state));
    output = q @ state.  Value heads share key heads, consecutive ones the same.
    normalise_eps: q and k are divided by the root of the sum of their squares and of this; None: they come as they are.
    channel_decay: each key element has a decay of its own (Kimi Linear), exp(g)[:, None] * state.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: Device
    normalise_eps: float | None = None
    channel_decay: bool = False

    def __post_init__(self) -> None:
        _check_shared("value heads", self.num_value_heads, "key heads", self.num_key_heads)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The shape of one request's state: (Hv, Dk, Dv)."""
        return self.num_value_heads, self.key_dim, self.value_dim


@dataclass(frozen=True, kw_only=True)
class Mamba2ScanProblem:
    """One layer's selective scan, as Mamba 2 has it.

    For each token, with dt = clamp(softplus(dt + dt_bias), *dt_limit):  state = exp(dt * A) * state + outer(dt * x, B);
    output = state @ C + D * x.  Heads share the B and C of groups, consecutive ones the same.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    dtype: torch.dtype
    device: Device
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    def __post_init__(self) -> None:
        _check_shared("heads", self.num_heads, "groups", self.num_groups)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The shape of one request's state: (H, P, N)."""
        return self.num_heads, self.head_dim, self.state_size


@dataclass(frozen=True, kw_only=True)
class CausalConvProblem:
    """One layer's convolution along the tokens of each request, each channel on its own.

    output[t] = activation(bias + sum of weight[:, j] * x[t - K + 1 + j] over j).  The state holds the last K - 1
    inputs, the oldest first.
    """

    channels: int
    kernel_size: int
    dtype: torch.dtype
    device: Device
    activation: Activation = None

    def __post_init__(self) -> None:
        if self.kernel_size < 1:
            raise ValueError(f"a convolution needs a kernel of 1 token or more, not {self.kernel_size}")
        if self.activation not in ("silu", None):
            raise ValueError(f"a convolution's activation must be 'silu' or None, not {self.activation!r}")

    @property
    def state_shape(self) -> tuple[int, int]:
        """The shape of one request's state: (C, K - 1)."""
        return self.channels, self.kernel_size - 1


class GatedDeltaKernel(Protocol):
    """A kernel for the gated delta rule over one step."""

    name: str
    reproducible: bool

    def why_not(self, problem: GatedDeltaProblem) -> str | None: ...

    def run(
        self,
        problem: GatedDeltaProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        """Run the rule: q, k [T, Hk, Dk], v [T, Hv, Dv], g and beta [T, Hv] -> [T, Hv, Dv].

        g: [T, Hv, Dk] where the problem has a decay of each channel.

        q, k, v are in the problem's dtype; tokens may be strided.  g (the logarithm of the decay) and beta are of any
        float dtype.  state: [S, Hv, Dk, Dv] float32, contiguous.
        """


class Mamba2ScanKernel(Protocol):
    """A kernel for the scan of Mamba 2 over one step."""

    name: str
    reproducible: bool

    def why_not(self, problem: Mamba2ScanProblem) -> str | None: ...

    def run(
        self,
        problem: Mamba2ScanProblem,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        """Scan: x [T, H, P], dt [T, H], B, C [T, G, N] -> [T, H, P].

        x, B, C are in the problem's dtype; tokens may be strided.  dt (as projected), and A (below 0), D and dt_bias,
        [H] each, are of any float dtype.  state: [S, H, P, N] float32, contiguous.
        """


class CausalConvKernel(Protocol):
    """A kernel for the causal convolution over one step."""

    name: str
    reproducible: bool

    def why_not(self, problem: CausalConvProblem) -> str | None: ...

    def run(
        self,
        problem: CausalConvProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        step: AttentionStep,
    ) -> Tensor:
        """Run the convolution: x [T, C] -> [T, C].

        x is in the problem's dtype; tokens may be strided.  weight: [C, K], bias: [C], of any float dtype.
        state: [S, C, K - 1] float32, contiguous.
        """


def check_gated_delta(
    problem: GatedDeltaProblem, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> int:
    """Return the number of tokens.  Raises ConfigError where a tensor does not fit the problem."""
    tokens = _tokens("q", q)
    for name, tensor in (("q", q), ("k", k)):
        _check_tensor(name, tensor, (tokens, problem.num_key_heads, problem.key_dim), problem.dtype)
    _check_tensor("v", v, (tokens, problem.num_value_heads, problem.value_dim), problem.dtype)
    channels = (problem.key_dim,) if problem.channel_decay else ()
    _check_tensor("g", g, (tokens, problem.num_value_heads, *channels))
    _check_tensor("beta", beta, (tokens, problem.num_value_heads))
    return tokens


def check_mamba2_scan(
    problem: Mamba2ScanProblem,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> int:
    """Return the number of tokens.  Raises ConfigError where a tensor does not fit the problem."""
    tokens, heads = _tokens("x", x), problem.num_heads
    _check_tensor("x", x, (tokens, heads, problem.head_dim), problem.dtype)
    _check_tensor("dt", dt, (tokens, heads))
    for name, tensor in (("B", B), ("C", C)):
        _check_tensor(name, tensor, (tokens, problem.num_groups, problem.state_size), problem.dtype)
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        _check_tensor(name, tensor, (heads,))
    return tokens


def check_causal_conv(problem: CausalConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Return the number of tokens.  Raises ConfigError where a tensor does not fit the problem."""
    tokens = _tokens("x", x)
    _check_tensor("x", x, (tokens, problem.channels), problem.dtype)
    _check_tensor("weight", weight, (problem.channels, problem.kernel_size))
    if bias is not None:
        _check_tensor("bias", bias, (problem.channels,))
    return tokens


def _tokens(name: str, tensor: Tensor) -> int:
    if not tensor.ndim:
        raise _wrong(f"{name} must have a dimension of tokens, not {list(tensor.shape)}")
    return tensor.shape[0]


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """Raise ConfigError unless the tensor has this shape, and this dtype; None: any float."""
    if tensor.shape != shape or (tensor.dtype is not dtype if dtype else not tensor.is_floating_point()):
        raise _wrong(
            f"{name} must be {list(shape)} {dtype or 'of a float dtype'}, not {list(tensor.shape)} {tensor.dtype}"
        )


def check_state(state: Tensor | None, shape: tuple[int, ...], step: AttentionStep, tokens: int) -> None:
    """Raise ConfigError unless the state fits the problem, and the step names a slot of its own for each request.

    shape: of one request's state.
    """
    check_state_form(state, shape, step)
    if state is not None and state.is_meta:
        return  # a step without data holds no numbers to look at
    step.check_tokens(tokens)
    if state is not None:
        count = state.shape[0]
        step.checked(("state slots", count), lambda: _check_slots(step, count), step.state_slots)


def check_state_form(state: Tensor | None, shape: tuple[int, ...], step: AttentionStep) -> None:
    """Raise ConfigError unless the state fits the problem.  What the step's tensors hold is for others to look at."""
    if state is None:
        if step.state_slots is not None:
            raise _wrong("the step has state_slots, but the layer has no state: attach states first")
        return
    fits = state.dtype is torch.float32 and state.shape[1:] == shape and state.is_contiguous()
    fits = fits and not state.is_neg()
    if not fits:
        raise _wrong(
            f"the state must be [slots, {', '.join(map(str, shape))}] float32, contiguous, "
            f"not {list(state.shape)} {state.dtype} on {state.device}"
        )
    if step.state_slots is None:
        raise _wrong("the layer has a state, but the step has no state_slots: pass None as the state")


def _check_slots(step: AttentionStep, count: int) -> None:
    slots = step.state_slots
    assert slots is not None
    if slots.dtype is not torch.int64 or slots.shape != (step.num_reqs,):
        raise _wrong(
            f"state_slots must be [{step.num_reqs}] int64, a slot for each request, "
            f"not {list(slots.shape)} {slots.dtype}"
        )
    # Elsewhere a look would wait for the device.
    kept = [slot for slot in slots.tolist() if slot >= 0] if slots.is_cpu else []
    if kept and max(kept) >= count:
        raise _wrong(
            f"state_slots must be below the {count} slots of the state, not {max(kept)}", IndicesError
        )
    if len(set(kept)) < len(kept):
        raise _wrong(f"state_slots must name a slot for one request only, not {kept}", IndicesError)


def _wrong(message: str, error: type[ConfigError] = ConfigError) -> ConfigError:
    return error(message, code="recurrence")


def _check_shared(many: str, count: int, few: str, shared: int) -> None:
    if shared < 1 or count % shared:
        raise ValueError(f"the {many} ({count}) must be a multiple of the {few} ({shared}), which they share")
