"""Recurrences of transformers' modules, run by our kernels over the states of all requests of a step.

A module's forward calls its recurrence as a function of its file: the causal convolution, the gated delta rule, the
scan of Mamba 2. The forward of one module gets globals of its own, in which these names are layers of ours; the class,
its file and every other model stay as they are.
"""

# T tokens, C channels, K kernel size, H heads, Hk, Hv key and value heads, Dk, Dv, P sizes of a head,
# G groups, N state size

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution, current_execution
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.recurrence import CausalConvProblem, GatedDeltaProblem, Mamba2ScanProblem
from pymllm.kernels.registry import Operation, Selection, select
from pymllm.layers.held import Binder, Description
from pymllm.layers.stateful import StatefulLayer
from pymllm.layers.step import fetch_attn_metadata
from pymllm.models.generic.probe import probing
from pymllm.quantization.kv_cache import UnquantizedKVCacheMethod

NORMALISE_EPS = 1e-6  # transformers' own, beside the sums of squares of queries and keys


@dataclass(frozen=True)
class Function:
    """A function of transformers' that a recurrence is.

    operation: ours.  kind: for a plan.  problem: makes the problem of a call's arguments.
    run: computes the call's result by (kernel, problem, state, step) and its arguments.
    """

    operation: Operation
    kind: str
    problem: Callable[..., Any]
    run: Callable[..., Any]


class Recurrence(StatefulLayer):
    """One recurrence of one module: its problem is that of its first call, which the probe makes."""

    loads: ClassVar[bool] = False  # type: ignore[assignment]

    def __init__(self, function: Function, prefix: str) -> None:
        super().__init__()
        self.function, self.prefix = function, prefix
        self.execution = current_execution() or Execution(dtype=torch.get_default_dtype())
        self.problem: Any = None
        self.selection: Selection[Any] | None = None

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return () if self.problem is None else (self.problem.state_shape,)

    def describe(self, binder: Binder) -> Iterator[Description]:
        """Describe the recurrence for a plan."""
        if self.selection is None:
            return
        shape = self.problem.state_shape
        yield Description(
            self.prefix,
            "recurrence",
            UnquantizedKVCacheMethod(),
            f"{self.function.kind}, state in float32",
            self.selection,
            "float32 or better",
            False,
            shape,
            shape,
            state_bytes=self.state_bytes(),
        )

    def selections(self, binder: Binder | None = None) -> tuple[Selection[Any], ...]:
        return () if self.selection is None else (self.selection,)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute what the function of transformers' does, for all requests of the step."""
        if probing() is not None:
            operation = self.function.operation
            self.problem = self.function.problem(self.execution, *args, **options)
            self.selection = select(operation, self.problem, self.execution.forced_kernel(operation))
            return self.function.run(None, self.problem, None, None, *args, **options)
        assert self.selection is not None
        step = fetch_attn_metadata()
        (state,) = self.states_in(step)
        return self.function.run(self.selection.kernel, self.problem, state, step, *args, **options)


class Recurrences(nn.ModuleList):
    """The recurrences of one module that one function is called for, in the order of the calls."""

    calls = 0

    def __init__(self, function: Function, prefix: str) -> None:
        super().__init__()
        self.function, self.prefix = function, prefix

    def restart(self) -> None:
        """Begin with the first call."""
        self.__dict__["calls"] = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute the next call of the step."""
        if probing() is not None:
            name = self.prefix if not len(self) else f"{self.prefix}_{len(self)}"
            self.append(Recurrence(self.function, name))
            return self[-1](*args, **options)
        layer = self[self.calls % len(self)]
        self.__dict__["calls"] = (self.calls + 1) % len(self)
        return layer(*args, **options)


def put_recurrences(model: nn.Module) -> None:
    """Have every module whose forward calls a function of `FUNCTIONS` call our layers instead, added to the module."""
    for path, module in list(model.named_modules()):
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        known = () if code is None else (name for name in FUNCTIONS if name in code.co_names)
        found = [name for name in known if name in forward.__globals__]
        if code is None or not found:
            continue
        layers = {name: Recurrences(FUNCTIONS[name], f"{path}.{FUNCTIONS[name].operation}") for name in found}
        for layer in layers.values():
            setattr(module, layer.function.operation, layer)
        own = {**forward.__globals__, **layers}
        copied = types.FunctionType(code, own, forward.__name__, forward.__defaults__, forward.__closure__)
        copied.__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(copied, module)  # type: ignore[method-assign]


def take_recurrences(model: nn.Module) -> None:
    """Undo `put_recurrences`."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Recurrences):
                delattr(module, name)
                vars(module).pop("forward", None)


def _conv_problem(
    execution: Execution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    **_: Any,
) -> CausalConvProblem:
    return CausalConvProblem(
        channels=x.shape[1],
        kernel_size=weight.shape[-1],
        dtype=execution.dtype,
        device=probe_device(execution.device),
        activation="silu" if activation in ("silu", "swish") else None,
    )


def _run_conv(
    kernel: Any,
    problem: CausalConvProblem,
    state: Tensor | None,
    step: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    **_: Any,
) -> Tensor:
    """Run the convolution.  x: [1, C, T], weight: [C, K].  Returns [1, C, T]."""
    if kernel is None:
        return torch.empty_like(x)
    y = kernel.run(problem, x[0].t().to(problem.dtype), weight, bias, state, step)
    if activation is not None and problem.activation is None:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.t()[None].to(x.dtype)


def _delta_problem(
    execution: Execution,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> GatedDeltaProblem:
    return GatedDeltaProblem(
        num_key_heads=key.shape[2],
        num_value_heads=value.shape[2],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        dtype=execution.dtype,
        device=probe_device(execution.device),
        normalise_eps=NORMALISE_EPS if use_qk_l2norm_in_kernel else None,
    )


def _run_delta(
    kernel: Any,
    problem: GatedDeltaProblem,
    state: Tensor | None,
    step: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, None]:
    """Run the gated delta rule.  query, key: [1, T, Hk, Dk], value: [1, T, Hv, Dv], g, beta: [1, T, Hv].

    Returns [1, T, Hv, Dv], and None in the place of the state.
    """
    if kernel is None:
        return torch.empty_like(value), None
    q, k, v = (x[0].to(problem.dtype) for x in (query, key, value))
    return kernel.run(problem, q, k, v, g[0], beta[0], state, step)[None].to(value.dtype), None


def _scan_problem(
    execution: Execution,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    *_: Any,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **__: Any,
) -> Mamba2ScanProblem:
    return Mamba2ScanProblem(
        num_heads=hidden_states.shape[2],
        head_dim=hidden_states.shape[3],
        num_groups=B.shape[2],
        state_size=B.shape[3],
        dtype=execution.dtype,
        device=probe_device(execution.device),
        dt_limit=(float(dt_limit[0]), float(dt_limit[1])),
    )


def _run_scan(
    kernel: Any,
    problem: Mamba2ScanProblem,
    state: Tensor | None,
    step: Any,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *_: Any,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **__: Any,
) -> Tensor:
    """Run the scan.  hidden_states: [1, T, H, P], dt: [1, T, H], B, C: [1, T, G, N].  Returns [1, T, H, P] float32."""
    if kernel is None:
        return torch.empty_like(hidden_states, dtype=torch.float32)
    x, b, c = (one[0].to(problem.dtype) for one in (hidden_states, B, C))
    skip = A.new_zeros(problem.num_heads) if D is None else D
    shift = A.new_zeros(problem.num_heads) if dt_bias is None else dt_bias
    return kernel.run(problem, x, dt[0], A, b, c, skip, shift, state, step)[None].float()


# What a module's file calls a recurrence, by name.
FUNCTIONS: dict[str, Function] = {
    "causal_conv1d_fn": Function("causal_conv", "convolution", _conv_problem, _run_conv),
    "torch_chunk_gated_delta_rule": Function("gated_delta", "gated delta rule", _delta_problem, _run_delta),
    "mamba2_chunk_scan": Function("mamba2_scan", "Mamba 2 scan", _scan_problem, _run_scan),
}
