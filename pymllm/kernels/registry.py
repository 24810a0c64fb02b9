"""Which kernel runs a problem, and why not the others.

A kernel is a class with a `name`, `why_not(problem) -> str | None`, and what its operation needs (below; for attention,
`kernels/attention.py`; for routing, `kernels/routing.py`). Adding one is a file and one line in `KERNELS`, whose order
is the order of preference; the reference is always last and runs everything. `select` walks it once, when a layer is
packed (or planned), and keeps every refusal with its reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm.errors import KernelError, unknown_name
from pymllm.kernels.canonical import CanonicalWeight, ExpertsWeight, WeightType
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import Device

Operation = Literal["linear", "embedding", "experts", "routing", "attention", "kv_store", "elementwise"]
Compute = Literal["auto", "exact", "checkpoint"]

KERNELS: dict[Operation, tuple[str, ...]] = {
    "linear": (
        "pymllm.kernels.triton.eight_bit:TritonFp8Activations",
        "pymllm.kernels.triton.eight_bit:TritonInt8Activations",
        "pymllm.kernels.triton.int_weights:TritonInt",
        "pymllm.kernels.triton.int2_weights:TritonInt2",
        "pymllm.kernels.triton.fp8_weights:TritonFp8",
        "pymllm.kernels.triton.fp4_weights:TritonFp4",
        "pymllm.kernels.native_float:NativeFloatLinear",
        "pymllm.kernels.torch_linear:TorchLinear",
        "pymllm.kernels.torch_scaled_mm:TorchScaledMM",
        "pymllm.kernels.native_int4:NativeInt4",
        "pymllm.kernels.native_int8:NativeInt8",
        "pymllm.kernels.native_fp4:NativeFp4",
        "pymllm.kernels.torch_int4pack:TorchInt4Pack",
        "pymllm.kernels.native_fp8:NativeFp8Linear",
        "pymllm.kernels.native_codebook:NativeCodebook",
        "pymllm.kernels.reference:ReferenceLinear",
    ),
    "embedding": (
        "pymllm.kernels.triton.embedding:TritonIntEmbedding",
        "pymllm.kernels.triton.embedding:TritonFp8Embedding",
        "pymllm.kernels.torch_linear:TorchEmbedding",
        "pymllm.kernels.native_embedding:NativeInt4Embedding",
        "pymllm.kernels.native_embedding:NativeInt8Embedding",
        "pymllm.kernels.native_embedding:NativeFp4Embedding",
        "pymllm.kernels.native_fp8:NativeFp8Embedding",
        "pymllm.kernels.reference:ReferenceEmbedding",
    ),
    "experts": (
        "pymllm.kernels.triton.experts:TritonExperts",
        "pymllm.kernels.native_experts:NativeIntegerExperts",
        "pymllm.kernels.linear_experts:LinearExperts",
        "pymllm.kernels.reference_experts:ReferenceExperts",
    ),
    "routing": (
        "pymllm.kernels.triton.routing:TritonRouting",
        "pymllm.kernels.torch_routing:TorchRouting",
    ),
    "attention": (
        "pymllm.kernels.flashinfer_attention:FlashInferAttention",
        "pymllm.kernels.triton.attention:TritonGroupedAttention",
        "pymllm.kernels.triton.attention:TritonAttention",
        "pymllm.kernels.native_attention:NativeAttention",
        "pymllm.kernels.torch_attention:TorchAttention",
        "pymllm.kernels.reference_attention:ReferenceAttention",
    ),
    "kv_store": (
        "pymllm.kernels.triton.attention:TritonKVStore",
        "pymllm.kernels.native_attention:NativeKVStore",
        "pymllm.kernels.torch_kv_store:TorchKVStore",
    ),
    "elementwise": (
        "pymllm.kernels.vllm_layers:VllmElementwise",
        "pymllm.kernels.triton.elementwise:TritonElementwise",
        "pymllm.kernels.native_elementwise:NativeElementwise",
        "pymllm.kernels.torch_elementwise:TorchElementwise",
    ),
}

# Relative error (Frobenius) that an exact kernel may have: the weight and the result are rounded to the activation
# dtype (2^-9 or 2^-12 each), and sums to float32 (about sqrt(I) units of 2^-24).
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class LinearProblem:
    """One rank's linear layer (or embedding table), as a kernel sees it.

    compute: "auto" lets a kernel round activations to fewer bits where that is faster; "exact" forbids it;
    "checkpoint" demands just what the checkpoint asks for.
    """

    weight: WeightType
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: Device
    compute: Compute = "auto"


@dataclass(frozen=True)
class ExpertsProblem:
    """One rank's experts of one layer, each `down(activation(gate_up(x)))`, as a kernel sees them.

    gate_up: the product of one expert, [2·I, H]; or two, gate's and up's, where they are not one weight.
    down: [H, I].  num_experts: how many this rank holds.
    reordered: weights may have an `input_order`, another one for each expert, which `pack` must keep.
    """

    gate_up: tuple[LinearProblem, ...]
    down: LinearProblem
    num_experts: int
    activation: GatedActivation
    reordered: bool = False

    def products(self) -> dict[str, LinearProblem]:
        """The products by name, as `ExpertsWeight.products`."""
        names = ("gate_up",) if len(self.gate_up) == 1 else ("gate", "up")
        return {**dict(zip(names, self.gate_up, strict=True)), "down": self.down}

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    @property
    def device(self) -> Device:
        return self.down.device

    @property
    def compute(self) -> Compute:
        return self.down.compute


@dataclass(frozen=True)
class ElementwiseProblem:
    """Norms, gated activations and rotary positions, which one kernel set runs for a whole model."""

    dtype: torch.dtype
    device: Device


Packed = Mapping[str, Tensor]


class Kernel(Protocol):
    """What every kernel has; one for a kind of device alone also has `device_type`, "cpu" or "cuda"."""

    name: str

    def why_not(self, problem: Any) -> str | None:
        """None if it can run `problem`, else the reason in a few words."""


class LinearKernel(Kernel, Protocol):
    """`x @ weight.T + bias` over packed weights.  `layout` names what `pack` makes: equal names, equal bytes."""

    layout: str

    def numerics(self, problem: LinearProblem) -> str:
        """How results differ from exact arithmetic over the stored weights, for a plan to show.

        A kernel whose error exceeds what the activations' dtype explains also has `tolerance(problem) -> float`, the
        relative error that it owns up to.
        """

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed:
        """Weights in this kernel's own order.  Also runs on meta tensors: a plan counts its bytes."""

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight:
        """What `pack` was given, bit for bit."""

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [*, I] in the problem's dtype.  Returns [*, O]."""


class EmbeddingKernel(Kernel, Protocol):
    """Rows of a packed table; `pack` and `layout` as for a linear layer, so that a tied head can share them."""

    layout: str

    def numerics(self, problem: LinearProblem) -> str: ...

    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed: ...

    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight: ...

    def run(self, packed: Packed, problem: LinearProblem, ids: Tensor) -> Tensor:
        """ids: any shape, within the table.  Returns [*ids.shape, I] in the problem's dtype."""


class ExpertsBias(NamedTuple):
    """gate_up: [E, 2·I], the gate's first; down: [E, H].  None: there is none."""

    gate_up: Tensor | None = None
    down: Tensor | None = None


class ExpertsKernel(Kernel, Protocol):
    """The experts of a layer over packed weights: routed tokens in, their weighted sum out.

    `pack` is given one canonical weight an expert and product, and may use the packing of a linear kernel for each;
    `kernels/linear_experts.py` does, for every linear kernel there is.
    """

    layout: str

    def numerics(self, problem: ExpertsProblem) -> str:
        """As a linear kernel's; `tolerance(problem)` too."""

    def pack(self, weight: ExpertsWeight, problem: ExpertsProblem) -> Packed:
        """The weights of all experts in this kernel's own order.  Also runs on meta tensors."""

    def unpack(self, packed: Packed, problem: ExpertsProblem) -> ExpertsWeight:
        """What `pack` was given, bit for bit."""

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        """x: [T, H] in the problem's dtype.  topk_ids: [T, K] int64, which of the packed experts; below 0: none.
        topk_weights: [T, K] float32.  Returns [T, H] in the problem's dtype: for each token, the sum over its K
        experts of weight times answer, accumulated in float32.  T and K may be 0, and an expert may come up twice."""


K = TypeVar("K")


@dataclass(frozen=True)
class Refusal:
    """A kernel that was asked before the chosen one, and why it could not."""

    kernel: str
    why: str


@dataclass(frozen=True)
class Selection(Generic[K]):
    """The kernel that was chosen for a problem, and the refusals before it.  forced: the user named it."""

    kernel: K
    operation: Operation
    problem: Any
    refused: tuple[Refusal, ...] = ()
    forced: bool = False


@functools.cache
def kernels_for(operation: Operation) -> tuple[Any, ...]:
    """The kernels of an operation, in order of preference."""
    found = []
    for path in KERNELS[operation]:
        module, _, name = path.partition(":")
        found.append(getattr(importlib.import_module(module), name)())
    return tuple(found)


@functools.cache
def select(operation: Operation, problem: Any, forced: str | None = None) -> Selection[Any]:
    """The first kernel of `operation` that can run `problem`; or the one named `forced`.

    KernelError with all reasons if none can, or if the forced one cannot.
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
