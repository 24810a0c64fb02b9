"""The choice of the kernel that runs a problem, with the reasons against the others.

A kernel is a class with a `name`, `why_not(problem) -> str | None`, and the methods that its operation needs
(`kernels/<operation>.py`). A new kernel is a file and one line in `KERNELS`, whose order is the order of preference;
the reference is always last and runs everything. `select` walks the list once, when a layer is packed (or planned),
and keeps every refusal with its reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from pymllm.errors import KernelError, unknown_name

Operation = Literal[
    "linear",
    "embedding",
    "experts",
    "routing",
    "attention",
    "kv_store",
    "gated_delta",
    "mamba2_scan",
    "causal_conv",
    "elementwise",
    "sampling",
]
Compute = Literal["auto", "exact", "checkpoint"]

KERNELS: dict[Operation, tuple[str, ...]] = {
    "linear": (
        "pymllm.kernels.triton.eight_bit:TritonFp8Activations",
        "pymllm.kernels.triton.eight_bit:TritonInt8Activations",
        "pymllm.kernels.triton.int_weights:TritonInt",
        "pymllm.kernels.triton.int2_weights:TritonInt2",
        "pymllm.kernels.triton.fp8_weights:TritonFp8",
        "pymllm.kernels.triton.fp4_weights:TritonFp4",
        "pymllm.kernels.triton.codebook_weights:TritonIntegerCodebook",
        "pymllm.kernels.native.float_linear:NativeFloatLinear",
        "pymllm.kernels.aten.linear:TorchLinear",
        "pymllm.kernels.aten.scaled_mm:TorchScaledMM",
        "pymllm.kernels.native.int4:NativeInt4",
        "pymllm.kernels.native.int8:NativeInt8",
        "pymllm.kernels.native.fp4:NativeFp4",
        "pymllm.kernels.native.integer_codebook:NativeIntegerCodebook",
        "pymllm.kernels.aten.int4pack:TorchInt4Pack",
        "pymllm.kernels.native.fp8:NativeFp8Linear",
        "pymllm.kernels.native.codebook:NativeCodebook",
        "pymllm.kernels.reference.linear:ReferenceLinear",
    ),
    "embedding": (
        "pymllm.kernels.triton.embedding:TritonIntEmbedding",
        "pymllm.kernels.triton.embedding:TritonFp8Embedding",
        "pymllm.kernels.triton.embedding:TritonIntegerCodebookEmbedding",
        "pymllm.kernels.aten.linear:TorchEmbedding",
        "pymllm.kernels.native.embedding:NativeInt4Embedding",
        "pymllm.kernels.native.embedding:NativeInt8Embedding",
        "pymllm.kernels.native.embedding:NativeFp4Embedding",
        "pymllm.kernels.native.embedding:NativeIntegerCodebookEmbedding",
        "pymllm.kernels.native.fp8:NativeFp8Embedding",
        "pymllm.kernels.reference.linear:ReferenceEmbedding",
    ),
    "experts": (
        "pymllm.kernels.triton.experts:TritonExperts",
        "pymllm.kernels.native.experts:NativeIntegerExperts",
        "pymllm.kernels.linear_experts:LinearExperts",
        "pymllm.kernels.reference.experts:ReferenceExperts",
    ),
    "routing": (
        "pymllm.kernels.triton.routing:TritonRouting",
        "pymllm.kernels.aten.routing:TorchRouting",
    ),
    "attention": (
        "pymllm.kernels.flashinfer.attention:FlashInferAttention",
        "pymllm.kernels.triton.attention:TritonGroupedAttention",
        "pymllm.kernels.triton.attention:TritonAttention",
        "pymllm.kernels.native.attention:NativeAttention",
        "pymllm.kernels.aten.attention:TorchAttention",
        "pymllm.kernels.reference.attention:ReferenceAttention",
    ),
    "kv_store": (
        "pymllm.kernels.triton.kv_store:TritonKVStore",
        "pymllm.kernels.native.attention:NativeKVStore",
        "pymllm.kernels.aten.kv_store:TorchKVStore",
    ),
    "gated_delta": (
        "pymllm.kernels.triton.recurrence:TritonGatedDelta",
        "pymllm.kernels.native.recurrence:NativeGatedDelta",
        "pymllm.kernels.reference.gated_delta:ReferenceGatedDelta",
    ),
    "mamba2_scan": (
        "pymllm.kernels.triton.recurrence:TritonMamba2Scan",
        "pymllm.kernels.native.recurrence:NativeMamba2Scan",
        "pymllm.kernels.reference.mamba2_scan:ReferenceMamba2Scan",
    ),
    "causal_conv": (
        "pymllm.kernels.triton.recurrence:TritonCausalConv",
        "pymllm.kernels.native.recurrence:NativeCausalConv",
        "pymllm.kernels.reference.causal_conv:ReferenceCausalConv",
    ),
    "elementwise": (
        "pymllm.kernels.vllm.elementwise:VllmElementwise",
        "pymllm.kernels.triton.elementwise:TritonElementwise",
        "pymllm.kernels.native.elementwise:NativeElementwise",
        "pymllm.kernels.aten.elementwise:TorchElementwise",
    ),
    "sampling": (
        "pymllm.kernels.native.sampling:NativeSampling",
        "pymllm.kernels.aten.sampling:TorchSampling",
    ),
}


Packed = Mapping[str, Tensor]


class Kernel(Protocol):
    """The interface of every kernel.

    name: its name, unique within the operation.  A kernel for one kind of device alone also has `device_type`, "cpu" or
    "cuda".
    """

    name: str

    def why_not(self, problem: Any) -> str | None:
        """Return why the kernel cannot run `problem`, in a few words; None: it can."""


K = TypeVar("K")


@dataclass(frozen=True)
class Refusal:
    """A kernel that was asked before the chosen one, and why it could not."""

    kernel: str
    why: str


@dataclass(frozen=True)
class Selection(Generic[K]):
    """The kernel that was chosen for a problem, and the refusals before it.  forced: the user named the kernel."""

    kernel: K
    operation: Operation
    problem: Any
    refused: tuple[Refusal, ...] = ()
    forced: bool = False


@functools.cache
def kernels_for(operation: Operation) -> tuple[Any, ...]:
    """List the kernels of an operation, in order of preference."""
    found = []
    for path in KERNELS[operation]:
        module, _, name = path.partition(":")
        found.append(getattr(importlib.import_module(module), name)())
    return tuple(found)


@functools.cache
def select(operation: Operation, problem: Any, forced: str | None = None) -> Selection[Any]:
    """Choose the first kernel of `operation` that can run `problem`; or the one named `forced`.

    Raises KernelError: "kernel-refused", with all reasons, if none can, or if the forced one cannot; "kernel-unknown"
    if there is no kernel `forced`.
    """
    kernels = kernels_for(operation)
    if forced is not None:
        kernels = tuple(kernel for kernel in kernels if kernel.name == forced)
        if not kernels:
            names = [kernel.name for kernel in kernels_for(operation)]
            raise unknown_name(f"{operation} kernel", forced, names, code="kernel-unknown", error=KernelError)
    refused: list[Refusal] = []
    for kernel in kernels:
        why = kernel.why_not(problem)
        if why is None:
            return Selection(kernel, operation, problem, tuple(refused), forced is not None)
        refused.append(Refusal(kernel.name, why))
    raise KernelError(
        f"no {operation} kernel can run this layer: " + "; ".join(f"{r.kernel}: {r.why}" for r in refused),
        code="kernel-refused",
        expected=f"a {operation} kernel for {problem}",
        fix="Force another kernel or choose another method for this layer.",
    )
