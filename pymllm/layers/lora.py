"""Low-rank adapters on a layer: y + scaling · (x Aᵀ) Bᵀ, whatever format the layer's own weights have.

A layer holds any number of adapters by name. The current `AdapterBatch`, which an engine sets, names the adapter of
each row of a step; for rows without one, and without a batch, the layer's `active_adapter` applies.

Sharding follows the layer: B is divided as the outputs are, A as the inputs are. A row-parallel layer adds its share of
x Aᵀ Bᵀ to its share of the product, so that both are summed over ranks at once.
"""

# T rows, I in_features, O out_features, r rank of an adapter, V vocabulary

from __future__ import annotations

import contextlib
import logging
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm.errors import ConfigError, choices, counted, nearest
from pymllm.kernels.canonical import DenseWeight
from pymllm.kernels.copies import upload
from pymllm.quantization.binding import BoundWeight, bind_for, bound_weight
from pymllm.weights.loader import place, track
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, WeightSpec, whole

if TYPE_CHECKING:
    from pymllm.layers.held import HeldWeight

logger = logging.getLogger("pymllm")

DEFAULT_ADAPTER = "default"


@dataclass(frozen=True)
class AdapterBatch:
    """The adapter of each row of a step.

    groups: an adapter's name (None: the layers' active one) and its rows: their indices, [n] int64, a mask of all rows,
    [T] bool, or None: all rows.  rows: the number of rows.
    """

    groups: tuple[tuple[str | None, Tensor | None], ...]
    rows: int

    @classmethod
    def of(cls, names: Sequence[str | None], device: torch.device) -> AdapterBatch:
        """Group rows by adapter.  names: one for each row; None: the layers' active adapter, if they have one."""
        distinct = dict.fromkeys(names)
        if len(distinct) == 1:
            return cls(((next(iter(distinct)), None),), len(names))
        rows = [
            torch.tensor([row for row, other in enumerate(names) if other == name], dtype=torch.int64)
            for name in distinct
        ]
        return cls(tuple(zip(distinct, upload(rows, device), strict=True)), len(names))

    @classmethod
    def masked(cls, names: Sequence[str | None], places: Tensor) -> AdapterBatch:
        """Mark the rows of every adapter, for a step that is captured: other rows may have it when that is replayed.

        names: of all adapters that a row may have.  places: [T], where each row's stands among them; below 0: it has
        none.
        """
        return cls(tuple((name, places == place) for place, name in enumerate(names)), len(places))


_batch: ContextVar[AdapterBatch | None] = ContextVar("adapter_batch", default=None)


@contextlib.contextmanager
def use_adapters(batch: AdapterBatch | None) -> Iterator[None]:
    """Have every layer that runs in this block, in this thread, apply `batch`.  None: their active adapters."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def lora_specs(kind: str, rank: int, dtype: torch.dtype) -> tuple[WeightSpec, WeightSpec]:
    """Return the specs of A and B as PEFT stores them, for a layer of this kind."""
    if kind == "embedding":  # [r, V] and [embedding size, r]
        return (
            WeightSpec("lora_embedding_A", dtype, (whole(rank), OUT), accepts=FLOATS),
            WeightSpec("lora_embedding_B", dtype, (IN, whole(rank)), accepts=FLOATS),
        )
    return (
        WeightSpec("lora_A.weight", dtype, (whole(rank), IN), accepts=FLOATS),
        WeightSpec("lora_B.weight", dtype, (OUT, whole(rank)), accepts=FLOATS),
    )


class LoRAPart(nn.Module):
    """The matrices of one part of a layer, or of all its parts together: A [r, I_local], B [O_local, r].

    An embedding has A [r, V_local] and B [H, r].  rows: the place of the part's outputs among the layer's.
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self, kind: str, shape: LinearShape, rows: slice, rank: int, scaling: float, device: torch.device
    ) -> None:
        super().__init__()
        if not abs(scaling) <= torch.finfo(torch.float32).max:
            raise ConfigError(
                "the scaling of an adapter is out of range",
                code="lora-scaling",
                expected="alpha / r, or alpha / √r, within float32",
                found=str(scaling),
            )
        self.rows, self.rank, self.scaling = rows, rank, scaling
        for attribute, spec in zip("AB", lora_specs(kind, rank, shape.dtype), strict=True):
            local, slots = place(spec, shape)
            try:
                zeros = torch.zeros(local, dtype=spec.dtype, device=device)
            except (RuntimeError, MemoryError):
                raise ConfigError(
                    f"there is no memory for an adapter of rank {rank}",
                    code="lora-memory",
                    found=f"{attribute} of shape {list(local)}",
                    fix="Choose a smaller rank.",
                ) from None
            param = nn.Parameter(zeros, requires_grad=False)
            track(param, slots)
            setattr(self, attribute, param)

    def start(self, shape: LinearShape, seed: str) -> None:
        """Draw a Kaiming-uniform A.  Equal seeds give equal numbers, however many ranks divide them."""
        draw = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        full = torch.empty((self.rank, shape.in_features), device="cpu")
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=draw)
        self.A.data.copy_(full[:, shape.inputs.start : shape.inputs.stop])

    def delta(self) -> Tensor:
        """Compute scaling · B @ A, [O_local, I_local] float32."""
        return self.scaling * (self.B.float() @ self.A.float())


class LayerAdapter(nn.Module):
    """One adapter on one layer.  stacked: the A of all parts in one tensor, of which they are views; None: not so."""

    parts: Any  # a ModuleList of LoRAPart

    def __init__(self, parts: Sequence[LoRAPart]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.stacked: Tensor | None = None

    def stack(self) -> None:
        """Lay the A of all parts side by side in memory, so that one product serves them all."""
        if len(self.parts) > 1 and self.stacked is None:
            self.stacked = torch.cat([part.A.data for part in self.parts])
            for part, A in zip(self.parts, self.stacked.split([p.rank for p in self.parts]), strict=True):
                part.A.data = A

    def add_to(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add this adapter's product with x [T, I_local] to y [T, O_local], in place.

        mask: [T] bool, to which rows; None: to all.
        """
        ranks = [part.rank for part in self.parts]
        if self.stacked is None:
            lows: Sequence[Tensor] = [F.linear(x, part.A) for part in self.parts]
        else:
            lows = F.linear(x, self.stacked).split(ranks, dim=-1)
        for part, low in zip(self.parts, lows, strict=True):
            y[:, part.rows].addmm_(_where(mask, low), part.B.t(), alpha=part.scaling)

    def add_rows_to(self, ids: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add an embedding's adapter to y [T, H], in place.  ids: [T], within this rank's share.  mask: as above."""
        for part in self.parts:
            y.addmm_(_where(mask, part.A[:, ids].t()), part.B.t(), alpha=part.scaling)


def _where(mask: Tensor | None, rows: Tensor) -> Tensor:
    """Return the rows, [T, r], with zeros for those that a mask leaves out: what they hold may be infinite."""
    return rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0)


@dataclass(frozen=True)
class Merged:
    """An adapter that has been added to the weights.

    before: the modules of the weights, each with its weight from before; None: those were not kept.
    """

    name: str
    before: tuple[tuple[Any, BoundWeight | Tensor], ...] | None


class LoRAMixin:
    """The adapters of a layer with weights: they are attached, applied, merged and unmerged."""

    kind: ClassVar[str]
    shape: LinearShape
    prefix: str
    quant_method: Any
    shares_table: bool
    adapters: dict[str, LayerAdapter]
    active_adapter: str | None
    merged: Merged | None

    if TYPE_CHECKING:

        def held(self) -> tuple[HeldWeight, ...]: ...

    def _setup_lora(self) -> None:
        self.adapters, self.active_adapter, self.merged = {}, None, None

    def init_lora(
        self, r: int, alpha: float, *, name: str = DEFAULT_ADAPTER, rank_stabilised: bool = False
    ) -> None:
        """Give the layer a fresh adapter over all its parts, and make it the active one.

        A [r, I_local] is Kaiming-uniform, the same whatever the ranks; B [O_local, r] is zero, so that nothing changes
        until it is trained or loaded.  scaling = alpha / r, or alpha / √r if rank_stabilised.  r = 0 adds nothing.
        """
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ConfigError(
                "a LoRA rank must be an integer, and cannot be negative", code="lora-rank", found=repr(r)
            )
        if r == 0:
            return
        shape, rows = self.shape, slice(0, self.shape.out_features_local)
        scaling = alpha / (math.sqrt(r) if rank_stabilised else r)
        part = LoRAPart(self.kind, shape, rows, r, scaling, self.weight_device)
        # PEFT starts an embedding from A = 0 and a random B; with B = 0 neither adds anything.
        if self.kind != "embedding":
            part.start(shape, f"{name} {self.prefix}")
        self.attach_adapter(name, LayerAdapter([part]))
        self.active_adapter = name

    @property
    def weight_device(self) -> torch.device:
        """The device of the layer's weights."""
        holder = self._holders()[0][0]
        bound = bound_weight(holder)
        held = holder.parameters() if bound is None else bound.packed.values()
        return next(iter(held)).device

    @property
    def lora_A(self) -> nn.Parameter | None:
        """A of the active adapter, where it is one matrix for the whole layer."""
        return self._active_matrix("A")

    @property
    def lora_B(self) -> nn.Parameter | None:
        return self._active_matrix("B")

    @property
    def scaling(self) -> float | None:
        return self._active_matrix("scaling")

    def _active_matrix(self, attribute: str) -> Any:
        adapter = self.adapters.get(self.active_adapter or "")
        return getattr(adapter.parts[0], attribute) if adapter and len(adapter.parts) == 1 else None

    def attach_adapter(self, name: str, adapter: LayerAdapter) -> None:
        """Hold an adapter under a name, in place of the adapter that had the name."""
        if self.merged is not None and self.merged.name == name:
            raise ConfigError(
                f"the adapter {name!r} is merged into {self.prefix or 'the layer'}",
                code="lora-merged",
                fix="Unmerge it first.",
            )
        adapter.stack()
        # Set anew, not changed in place, so that what was recorded of the layer is stale (`RevisedModule`).
        self.adapters = {**self.adapters, name: adapter}
        self.add_module(_module_name(name), adapter)  # type: ignore[attr-defined]

    def detach_adapter(self, name: str) -> None:
        """Drop an adapter.  ConfigError if it is merged into the weights."""
        if self.merged is not None and self.merged.name == name:
            raise ConfigError(
                f"the adapter {name!r} is merged into {self.prefix or 'the layer'}",
                code="lora-merged",
                fix="Unmerge it first.",
            )
        if name in self.adapters:
            self.adapters = {other: kept for other, kept in self.adapters.items() if other != name}
            delattr(self, _module_name(name))
        if self.active_adapter == name:
            self.active_adapter = None

    def _groups(self, rows: int) -> Iterator[tuple[LayerAdapter, Tensor | None]]:
        """Yield the adapters to apply to a step of so many rows, each with its rows as `AdapterBatch` has them."""
        batch = _batch.get()
        groups = ((None, None),) if batch is None else batch.groups
        assert batch is None or batch.rows == rows, (
            f"{self.prefix}: {counted(rows, 'row')} in a step of {batch.rows}"
        )
        for name, indices in groups:
            chosen = self.active_adapter if name is None else name
            adapter = self.adapters.get(chosen or "")
            if adapter is not None and (self.merged is None or self.merged.name != chosen):
                yield adapter, indices

    def add_lora(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the products of the step's adapters to y, in place, and return y.  x: [*, I_local]; y: [*, O_local]."""
        inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for adapter, rows in self._groups(len(inputs)):
            if rows is None or rows.dtype is torch.bool:
                adapter.add_to(inputs, outputs, rows)
            else:
                part = outputs[rows]
                adapter.add_to(inputs[rows], part)
                outputs[rows] = part
        return y

    def add_lora_rows(self, ids: Tensor, y: Tensor) -> Tensor:
        """Add an embedding's adapters to y, in place, and return y.

        ids: any shape, within this rank's share; y: [*ids.shape, H].
        """
        flat, outputs = ids.reshape(-1), y.view(-1, y.shape[-1])
        for adapter, rows in self._groups(len(flat)):
            if rows is None or rows.dtype is torch.bool:
                adapter.add_rows_to(flat, outputs, rows)
            else:
                part = outputs[rows]
                adapter.add_rows_to(flat[rows], part)
                outputs[rows] = part
        return y

    def merge_lora(self, name: str | None = None, *, keep_base: bool = True) -> str | None:
        """Add an adapter's scaling · B @ A to the weights, where these are plain floats.  Returns None.

        name: None: the active adapter.  keep_base: keep the weights as they are now, for `unmerge_lora`.
        Beside other weights the adapter stays as it is, still active; the reason is logged and returned.
        An adapter that is merged already is not merged again.
        """
        name = name or self.active_adapter or ""
        if self.merged is not None and self.merged.name == name:
            return None
        if name not in self.adapters:
            raise ConfigError(
                f"{self.prefix or 'the layer'} has no adapter {name!r} to merge",
                code="lora-unknown",
                expected=choices(self.adapters, name) or "a layer with adapters",
                fix=nearest(name, self.adapters),
            )
        if self.merged is not None:
            raise ConfigError(
                f"the adapter {self.merged.name!r} is merged into {self.prefix or 'the layer'} already",
                code="lora-merged",
                fix="Unmerge it first.",
            )
        self.active_adapter = name
        reason = self._why_not_merge()
        if reason is not None:
            logger.warning("%s: the adapter %r stays unmerged: %s", self.prefix, name, reason)
            return reason
        parts = self._holders()
        before = tuple((holder, _weight_of(holder)) for holder, _ in parts)
        with torch.no_grad():
            deltas = self._deltas(self.adapters[name])
            # All before the first is put in place: memory may run out.
            merged = [(holder, _with_delta(holder, deltas[rows])) for holder, rows in parts]
        for holder, weight in merged:
            _replace(holder, weight)
        self.merged = Merged(name, before if keep_base else None)
        return None

    def unmerge_lora(self) -> None:
        """Put the very weights back that were there before `merge_lora`.  Do nothing if no adapter is merged."""
        if self.merged is None:
            return
        if self.merged.before is None:
            raise ConfigError(
                f"{self.prefix or 'the layer'}: the weights from before the merge were not kept",
                code="lora-not-kept",
                fix="Load the checkpoint again, or merge with keep_base=True.",
            )
        for holder, weight in self.merged.before:
            _replace(holder, weight)
        self.merged = None

    def _holders(self) -> list[tuple[Any, slice]]:
        """Return the modules of the layer's weights, each with the rows of the layer's outputs that it has."""
        holders, start = [], 0
        for weight in self.held():
            assert isinstance(weight.shape, LinearShape)
            rows = weight.shape.out_features_local
            holders.append((weight.packed_in, slice(start, start + rows)))
            start += rows
        return holders

    def _why_not_merge(self) -> str | None:
        if self.kind == "embedding":
            return "an embedding looks up rows of its table, and computes no product to merge into"
        if self.shares_table:
            return "the weights are shared with the embedding"
        for holder, _ in self._holders():
            bound = bound_weight(holder)
            if bound is None:
                if not hasattr(holder, "weight") or holder.quant_method.name != "none":
                    return "the weights are quantised"
            elif bound.problem.weight.family != "dense":
                return f"the weights are quantised ({holder.quant_method.describe()})"
        return None

    def _deltas(self, adapter: LayerAdapter) -> Tensor:
        """Sum what the adapter's parts add to the weight, [O_local, I_local] float32."""
        total = torch.zeros(
            (self.shape.out_features_local, self.shape.in_features_local), device=adapter.parts[0].A.device
        )
        for part in adapter.parts:
            total[part.rows] += part.delta()
        return total


def _weight_of(holder: Any) -> BoundWeight | Tensor:
    bound = bound_weight(holder)
    return holder.weight.data if bound is None else bound


def _with_delta(holder: Any, delta: Tensor) -> BoundWeight | Tensor:
    """Return the holder's weight plus `delta`, rounded once to its own dtype."""
    bound = bound_weight(holder)
    if bound is None:
        return (holder.weight.data.float() + delta).to(holder.weight.dtype)
    weight = bound.canonical()
    assert isinstance(weight, DenseWeight)
    return bind_for(holder, DenseWeight((weight.weight.float() + delta).to(weight.weight.dtype)))


def _replace(holder: Any, weight: BoundWeight | Tensor) -> None:
    if isinstance(weight, BoundWeight):
        holder.bound = weight
    else:
        holder.weight.data = weight


def _module_name(name: str) -> str:
    """Return the name of the child module that is the adapter of this name: one of its own for each name."""
    return "lora_adapter_" + re.sub(r"[\W_]", lambda found: f"_{ord(found.group()):x}_", name)
