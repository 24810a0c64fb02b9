"""DeepSeek-V3's latent attention as mlx-lm divides it: `embed_q` and `unembed_out` in place of `kv_b_proj`.

    embed_q      [H, L, K]  of every head the rows of kv_b_proj that make keys, transposed
    unembed_out  [H, V, L]  of every head the rows that make values

Each may be quantised, along its last dimension. Groups of embed_q lie across the rows of kv_b_proj, so that no format
holds these as they are: both are decoded, and `kv_b_proj.weight` is float32.
"""

# H heads, L latent, K the part of a key without position, V value

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import CheckpointError
from pymllm.loading.stored import check_content
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.spec import LinearShape, Span
from pymllm.weights.tensor_file import TensorInfo

KEYS, VALUES, JOINED = "embed_q", "unembed_out", "kv_b_proj"


@dataclass(frozen=True)
class HeadStack:
    """One of the two stacks.  tensors: as stored, by suffix.  method: what reads a head of it; None: floats."""

    name: str
    tensors: Mapping[str, TensorInfo]
    method: LinearMethodBase | None
    outputs: int
    inputs: int

    def decode(self, first: int, last: int) -> Tensor:
        """Decode the heads first..last to [heads, outputs, inputs] float32."""
        stored = {key: info.read((slice(first, last),)) for key, info in self.tensors.items()}
        if self.method is None:
            return stored["weight"].float()
        rows = (last - first) * self.outputs
        shape = LinearShape(Span.full(self.inputs), (Span.full(rows),), (self.name,), torch.float32)
        flat: dict[str, Tensor] = {}
        for spec in self.method.weight_specs(shape):
            flat[spec.name] = stored[spec.name].flatten(0, 1)
            if spec.refuse is not None:
                check_content(self.tensors[spec.name], spec.refuse(flat[spec.name], shape))
        weight = self.method.to_canonical(flat, shape).dequantize(torch.float32)
        return weight.unflatten(0, (last - first, self.outputs))


@dataclass(frozen=True)
class JoinedHeads(TensorInfo):
    """The weight of kv_b_proj, [H·(K + V), L] float32, made of the two stacks as it is read."""

    keys: HeadStack = field(repr=False)
    values: HeadStack = field(repr=False)

    def read(self, index: tuple[slice, ...] | None = None, out: Tensor | None = None) -> Tensor:
        (start, stop), columns = self._bounds(index)
        per_head = self.keys.inputs + self.values.outputs
        first, last = start // per_head, -(-stop // per_head)
        rows = torch.cat(
            (self.keys.decode(first, last).transpose(1, 2), self.values.decode(first, last)), dim=1
        )
        wanted = rows.flatten(0, 1)[start - first * per_head : stop - first * per_head, slice(*columns)]
        return wanted.contiguous() if out is None else out.copy_(wanted)


def join_absorbed_heads(checkpoint: Checkpoint, stored: QuantizationConfig, config: Any) -> bool:
    """Put kv_b_proj in the place of every pair of stacks.  Returns whether there was any.

    stored: the checkpoint's format, which has seen its tensors.  config: the model's, for the sizes of heads.
    CheckpointError for stacks of other sizes than the config's.
    """
    found = [
        name.removesuffix(f".{KEYS}.weight")
        for name in checkpoint.tensors
        if name.endswith(f".{KEYS}.weight")
    ]
    found = [p for p in found if f"{p}.{VALUES}.weight" in checkpoint.tensors]
    found = [p for p in found if f"{p}.{JOINED}.weight" not in checkpoint.tensors]
    for prefix in found:
        heads, latent = config.size("num_attention_heads"), config.size("kv_lora_rank")
        key, value = config.size("qk_nope_head_dim"), config.size("v_head_dim")
        stacks = {
            name: _stack(checkpoint, stored, f"{prefix}.{name}", (heads, *sizes))
            for name, sizes in ((KEYS, (latent, key)), (VALUES, (value, latent)))
        }
        first = stacks[VALUES].tensors["weight"]
        rows = heads * (key + value)
        checkpoint.tensors[f"{prefix}.{JOINED}.weight"] = JoinedHeads(
            f"{prefix}.{JOINED}.weight",
            *("F32", torch.float32, (rows, latent), first.file, 0, 4 * rows * latent),
            keys=stacks[KEYS],
            values=stacks[VALUES],
        )
        for name, stack in stacks.items():
            for suffix in stack.tensors:
                del checkpoint.tensors[f"{prefix}.{name}.{suffix}"]
    return bool(found)


def _stack(
    checkpoint: Checkpoint, stored: QuantizationConfig, name: str, sizes: tuple[int, int, int]
) -> HeadStack:
    """Describe a stack, and check its tensors.  sizes: heads, outputs and inputs."""
    heads, outputs, inputs = sizes
    layer: Any = SimpleNamespace(kind="linear", in_features=inputs)
    method = stored.get_quant_method(layer, name)
    shape = LinearShape(Span.full(inputs), (Span.full(outputs),), (name,), torch.float32)
    if method is None:
        expected: dict[str, tuple[int, ...]] = {"weight": sizes}
    else:
        method.check(shape)
        specs = method.weight_specs(shape)
        expected = {spec.name: (heads, *spec.source_shape(inputs, outputs)) for spec in specs}
    tensors = {}
    for suffix, wanted in expected.items():
        info = checkpoint.tensors.get(f"{name}.{suffix}")
        if info is None or tuple(info.shape) != wanted:
            raise CheckpointError(
                "the heads of latent attention have not the sizes of the config",
                code="shape",
                file=str(checkpoint.path),
                tensor=f"{name}.{suffix}",
                expected=str(list(wanted)),
                found="no tensor" if info is None else str(list(info.shape)),
            )
        tensors[suffix] = info
    return HeadStack(name, tensors, method, outputs, inputs)
