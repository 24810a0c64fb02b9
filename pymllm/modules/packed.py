"""Packed weights as a module's buffers: they move, are saved and are loaded as what they are, and never cast."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.weights.spec import FLOATS

PACKED = "packed_"  # of buffers: packed_codes, packed_scales, ...
FORMAT = "format"  # the buffer that says what the others are


class PackedBuffers(nn.Module):
    """A module whose buffers are the packed tensors of `bound`, and one buffer more that describes them.

    A state dict thereby has all of a weight. prefix: the module's path, for messages.
    """

    bound: Any  # BoundWeight or BoundExperts
    prefix: str
    execution: Execution | None

    def _tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors that belong into a state dict, by name."""
        raise NotImplementedError

    def _described(self) -> dict[str, Any]:
        """Describe the packed tensors, so that another kernel can read them from a state dict."""
        raise NotImplementedError

    def _bind_again(self, execution: Execution, device: torch.device) -> Any:
        """Pack the weight for another execution, on another device."""
        raise NotImplementedError

    def _read(self, saved: dict[str, Tensor], said: dict[str, Any]) -> Any:
        """Read the weight that another module saved.  said: what `_described` said there.  ConfigError if it cannot."""
        raise NotImplementedError

    def _hold(self, bound: Any, execution: Execution) -> None:
        """Take this weight, and register its buffers in place of those from before."""
        self.bound, self.execution = bound, execution
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in self._held().items():
            self.register_buffer(PACKED + name, tensor)

    def _held(self) -> dict[str, Tensor]:
        """Return the tensors of the weight, and their description."""
        tensors = self._tensors()
        return {**tensors, FORMAT: _as_bytes(self._described()).to(next(iter(tensors.values())).device)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBuffers:
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
            execution = replace(self.execution, device=str(like.device), dtype=dtype)
            self._hold(self._bind_again(execution, like.device), execution)
        return self

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
                bound = self._checked(saved)
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

    def _checked(self, saved: dict[str, Tensor]) -> Any:
        """Read the weight that another module saved, and pack it for this one's kernel.

        saved: the tensors by name, without their prefix.  ConfigError if they are of another weight or shape.
        """
        mine = self._described()
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
        device = next(iter(self.bound.packed.values())).device
        saved = {name: tensor.detach().to(device, copy=True) for name, tensor in saved.items()}
        return self._read(saved, theirs)

    def _same_tensors(self, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Check that tensors of this module's own kernel have the shapes and dtypes of those that it holds."""
        expected, found = (
            {name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (own, saved)
        )
        if expected != found:
            raise self._unlike("the saved packed tensors have other shapes or dtypes", expected, found)

    def _known(self, name: str, kernels: Mapping[str, Any]) -> Any:
        """Return the kernel of this name.  ConfigError if there is none."""
        if name not in kernels:
            problem = "the saved weight was packed for a kernel that this version does not know"
            raise self._unlike(problem, list(kernels), name)
        return kernels[name]

    def _unlike(self, problem: str, expected: Any, found: Any) -> ConfigError:
        return ConfigError(
            problem, code="state-dict", tensor=self.prefix, expected=str(expected), found=str(found)
        )


def moved(weight: CanonicalWeight, device: torch.device) -> CanonicalWeight:
    """Move a weight to another device."""
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    order = getattr(weight, "input_order", None)
    if order is not None:
        tensors["input_order"] = order.to(device)
    return replace(weight, **tensors)  # type: ignore[arg-type]


def _as_bytes(value: dict[str, Any]) -> Tensor:
    """Write a description as a tensor, since safetensors holds nothing else."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
