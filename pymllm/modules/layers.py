"""The layers that `quantize_model` puts in place of a module's own: they have packed weights and the same forward."""

# O out_features, I in_features

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.registry import Operation, kernels_for
from pymllm.layers.weighted import WeightedLayer
from pymllm.parallel import Parallel
from pymllm.quantization.binding import BoundWeight, bind
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import FLOATS, LinearShape

PACKED = "packed_"  # of buffers: packed_codes, packed_scales, ...
FORMAT = "format"  # the buffer that says what the others are


class QuantizedLayer(WeightedLayer):
    """A layer whose packed weight takes the place of a module's own.

    Its buffers are the packed tensors, and one buffer more that describes them, so that a state dict has all of it.
    """

    bound: BoundWeight

    def __init__(
        self,
        prefix: str,
        shape: LinearShape,
        method: LinearMethodBase,
        execution: Execution,
        bound: BoundWeight,
    ) -> None:
        with execution, Parallel():
            super().__init__(prefix, shape.dtype)
        self.shape, self.quant_method = shape, method
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self._hold(bound, execution)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, decoded anew each time: for code that reads a module's weight besides calling it."""
        return self.bound.canonical().dequantize(self.bound.problem.dtype)

    def extra_repr(self) -> str:
        kernel = self.bound.selection.kernel.name
        return f"{self.out_features} x {self.in_features}, {self.quant_method.describe()} -> {kernel}"

    def _hold(self, bound: BoundWeight, execution: Execution) -> None:
        """Take this weight, and register its buffers in place of those from before."""
        self.bound, self.execution = bound, execution
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in self._held().items():
            self.register_buffer(PACKED + name, tensor)

    def _held(self) -> dict[str, Tensor]:
        """Return the tensors of the weight that belong into a state dict, by name."""
        bound = self.bound
        order = {} if bound.input_order is None else {"input_order": bound.input_order}
        device = next(iter(bound.packed.values())).device
        return {**bound.packed, **order, FORMAT: _as_bytes(_format_of(bound)).to(device)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Carry out `to`, `half`, `cuda`, ...: packed tensors are never cast or moved as they are, but packed again."""
        buffers = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        bound = self.bound
        first = next(iter(bound.packed.values()))
        like = fn(torch.empty(0, dtype=bound.problem.dtype, device=first.device))
        if (like.device, like.dtype) != (first.device, bound.problem.dtype):
            dtype = like.dtype if like.dtype in FLOATS else bound.problem.dtype
            assert self.execution is not None
            execution = replace(self.execution, device=like.device.type, dtype=dtype)
            weight = moved(bound.canonical(), like.device)
            self._hold(bind(weight, execution, self._operation()), execution)
        return self

    def _operation(self) -> Operation:
        return "embedding" if self.operation == "embedding" else "linear"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + PACKED
        saved = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        if saved:
            try:
                bound = self._read(saved)
            except ConfigError as error:
                error_msgs.append(str(error))
                return
            assert self.execution is not None
            self._hold(bound, self.execution)
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(start)}
            state_dict |= {start + name: tensor for name, tensor in self._held().items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _read(self, saved: dict[str, Tensor]) -> BoundWeight:
        """Read the weight that another layer saved, and pack it for this layer's kernel.

        saved: the tensors by name, without their prefix.  ConfigError if they are of another weight or shape.
        """
        bound, mine = self.bound, _format_of(self.bound)
        try:
            theirs = json.loads(bytes(saved.pop(FORMAT).cpu().tolist()))
        except (KeyError, ValueError):
            raise self._unlike(
                "the state dict does not say what its packed tensors are", mine, "nothing"
            ) from None
        for setting in ("weight", "shape"):
            if theirs.get(setting) != mine[setting]:
                raise self._unlike(
                    f"the saved {setting} is not this layer's", mine[setting], theirs.get(setting)
                )
        kernels = {kernel.name: kernel for kernel in kernels_for(self._operation())}
        kernel = kernels.get(theirs["kernel"])
        if kernel is None:
            raise self._unlike(
                "the saved weight was packed for a kernel that this version does not know",
                list(kernels),
                theirs["kernel"],
            )
        device = next(iter(bound.packed.values())).device
        saved = {name: tensor.detach().to(device, copy=True) for name, tensor in saved.items()}
        order = saved.pop("input_order", None)
        dtype = getattr(torch, theirs["dtype"])
        if kernel.name == bound.selection.kernel.name and dtype is bound.problem.dtype:
            expected = {name: (t.shape, t.dtype) for name, t in bound.packed.items()}
            found = {name: (t.shape, t.dtype) for name, t in saved.items()}
            if expected != found:
                raise self._unlike("the saved packed tensors have other shapes or dtypes", expected, found)
            return replace(bound, packed=saved, input_order=order)
        weight = kernel.unpack(saved, replace(bound.problem, dtype=dtype))
        if order is not None:
            weight = replace(weight, input_order=order)
        assert self.execution is not None
        return bind(weight, self.execution, self._operation())

    def _unlike(self, problem: str, expected: Any, found: Any) -> ConfigError:
        return ConfigError(
            problem, code="state-dict", tensor=self.prefix, expected=str(expected), found=str(found)
        )


class QuantizedLinear(QuantizedLayer):
    """A packed weight behind the forward of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.  x: [*, I], any float dtype.  Returns [*, O] in the same dtype."""
        inputs = x.to(self.bound.problem.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        y = self.quant_method.apply(self, inputs, bias)
        return (self.add_lora(inputs, y) if self.adapters else y).to(x.dtype)


class QuantizedEmbedding(QuantizedLayer):
    """A packed table behind the forward of nn.Embedding."""

    kind: ClassVar[str] = "embedding"
    operation: ClassVar[Operation] = "embedding"

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows.  ids: any shape.  Returns [*ids.shape, H]."""
        rows = self.quant_method.embed(self, ids)
        return self.add_lora_rows(ids, rows) if self.adapters else rows


def moved(weight: CanonicalWeight, device: torch.device) -> CanonicalWeight:
    """Move a weight to another device."""
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    order = getattr(weight, "input_order", None)
    if order is not None:
        tensors["input_order"] = order.to(device)
    return replace(weight, **tensors)  # type: ignore[arg-type]


def _format_of(bound: BoundWeight) -> dict[str, Any]:
    """Describe packed tensors, so that another kernel can read them from a state dict."""
    return {
        "weight": str(bound.problem.weight),
        "shape": [bound.problem.out_features, bound.problem.in_features],
        "kernel": bound.selection.kernel.name,
        "dtype": str(bound.problem.dtype).removeprefix("torch."),
    }


def _as_bytes(value: dict[str, Any]) -> Tensor:
    """Write a description as a tensor, since safetensors holds nothing else."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def quantized_layers(module: nn.Module) -> Iterator[QuantizedLayer]:
    """Yield the layers that `quantize_model` has put into `module`."""
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            yield child
