"""Reading a unit's tensors into its parameters: on several threads, and while the unit before it is packed.

Large tensors whose bytes go into their parameter as they are stored are read in pieces by threads, which know nothing
but that. All else happens on the thread that loads, in the order of placements: memory is taken, dtypes are changed,
and the first error in that order is the one that comes out, whoever has met it first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor, nn

from pymllm.loading.match import Placement, Unit
from pymllm.loading.scratch import Scratch, empty_parameter, scratch_parameters
from pymllm.loading.stored import read_slot
from pymllm.weights.loader import Slot, Written, write
from pymllm.weights.tensor_file import TensorInfo

PIECE_BYTES = 8 << 20  # of one read by one thread
WORTH_A_THREAD = 1 << 20  # bytes: smaller tensors are read by the thread that loads
MOST_READERS = 8  # threads: more are not faster than the memory
CHUNK_BYTES = 16 << 20  # what is read at a time where a dtype changes


class Reading:
    """One unit whose tensors are being read.  Make it, then `finish` its placements in their order."""

    def __init__(
        self, unit: Unit, device: torch.device, scratch: Scratch, pool: ThreadPoolExecutor | None
    ) -> None:
        self.unit = unit
        params = {(id(p.module), p.param): p.module for p in unit.placements}
        resolved = {(id(p.module), p.param) for p in unit.placements if p.resolved is not None}
        packed = scratch_parameters(unit.holder) - resolved if device.type == "cpu" else set()
        packed &= params.keys()
        if packed:
            sizes = [getattr(params[key], key[1]).nbytes for key in packed]
            scratch.begin(sum(sizes), len(sizes))
        for key, module in params.items():
            _materialise(module, key[1], device, key in resolved, scratch if key in packed else None)
        self._begun: dict[int, deque[Future[None]]] = {}
        for placement in unit.placements:
            if pool is not None and placement.resolved is None and _reads_straight(placement, device):
                target = placement.slot.view(getattr(placement.module, placement.param).data)
                self._begun[id(placement)] = deque(
                    pool.submit(_read_piece, placement.tensor, index, out)
                    for index, out in _pieces(placement, target)
                )

    def finish(self, placement: Placement) -> None:
        """Have a placement's tensor in its parameter, and counted there; raise the first error of reading it."""
        slot, tensor = placement.slot, placement.tensor
        param = getattr(placement.module, placement.param)
        target = slot.view(param.data)
        if not _fits(placement, target):
            # A scalar, or one part's row: it has dimensions of one element more or fewer.
            write(param.data, slot, read_slot(tensor, slot).to(param.device), param.written)
            return
        param.written.add(slot.target, tensor.name)
        begun = self._begun.pop(id(placement), None)
        if begun is not None:
            while begun:
                begun.popleft().result()
        elif tensor.dtype is param.dtype:
            tensor.read(slot.source, out=target)
        else:
            _read_converted(tensor, slot, target)


class Reader:
    """The threads that read, and the memory that is read into, of one load.

    device: where the model is loaded to.  All threads have ended when the `with` block has.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._scratches = deque((Scratch(), Scratch()))
        self._ahead: Reading | None = None

    def __enter__(self) -> Reader:
        threads = min(torch.get_num_threads(), MOST_READERS)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pymllm-reads")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._ahead = None
        self._scratches.clear()

    def begin(self, unit: Unit) -> None:
        """Begin to read a unit ahead of its turn.  If that fails, it is begun again in its turn, and fails there."""
        if any(placement.resolved is not None for placement in unit.placements):
            return  # by a resolver of the module's own, which may look at what is loaded before
        try:
            self._ahead = self._start(unit)
        except Exception:
            self._ahead = None

    def reading(self, unit: Unit) -> Reading:
        """Return the reading of a unit whose turn it is, begun now or before."""
        ahead, self._ahead = self._ahead, None
        return ahead if ahead is not None and ahead.unit is unit else self._start(unit)

    def _start(self, unit: Unit) -> Reading:
        self._scratches.rotate()
        return Reading(unit, self._device, self._scratches[0], self._pool)


def _fits(placement: Placement, target: Tensor) -> bool:
    """Tell whether a tensor's slice has its target's shape."""
    slot = placement.slot
    return len(placement.tensor.shape) == len(slot.source) and tuple(target.shape) == slot.local_shape


def _reads_straight(placement: Placement, device: torch.device) -> bool:
    """Tell whether a tensor is worth a thread, which can do no more than to read it."""
    slot, tensor = placement.slot, placement.tensor
    param = getattr(placement.module, placement.param)
    return (
        device.type == "cpu"
        and type(tensor) is TensorInfo
        and tensor.torch_dtype is param.dtype
        and slot.elements * param.element_size() >= WORTH_A_THREAD
        and _fits(placement, slot.view(param.data))
    )


def _pieces(placement: Placement, target: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Divide a slice along its first dimension: what to read, and where to."""
    rows, *rest = placement.slot.source
    step = max(1, PIECE_BYTES * target.shape[0] // target.nbytes)
    for first in range(0, target.shape[0], step):
        last = min(first + step, target.shape[0])
        yield (slice(rows.start + first, rows.start + last), *rest), target[first:last]


def _read_piece(tensor: TensorInfo, index: tuple[slice, ...], out: Tensor) -> None:
    tensor.read(index, out=out)


def _materialise(
    module: nn.Module, name: str, device: torch.device, keep: bool, scratch: Scratch | None
) -> None:
    """Give a meta parameter its memory: zeros where a share is padded, else unset until it is written.

    keep: stay the same object, as a resolver has it.  scratch: where it lies until it is packed; None: for good.
    """
    meta = getattr(module, name)
    if name in module._buffers:
        buffer = torch.empty_like(meta, device=device)
        buffer.slots, buffer.written = None, Written()  # type: ignore[attr-defined]
        torch.utils.swap_tensors(meta, buffer)
        return
    data = empty_parameter(meta, device) if scratch is None else scratch.take(meta.shape, meta.dtype)
    param = nn.Parameter(data, requires_grad=False)
    slots = getattr(meta, "slots", None)
    if slots is not None and sum(slot.elements for slot in slots) != meta.numel():
        param.data.zero_()
    param.slots, param.written = slots, Written()  # type: ignore[attr-defined]
    if hasattr(meta, "weight_loader"):
        param.weight_loader = meta.weight_loader  # type: ignore[attr-defined]
    if keep:
        torch.utils.swap_tensors(meta, param)
    else:
        setattr(module, name, param)


def _read_converted(tensor: TensorInfo, slot: Slot, target: Tensor) -> None:
    """Read a slice into another dtype, a few rows at a time."""
    if not slot.source or not slot.elements:
        target.copy_(tensor.read(slot.source))
        return
    rows, *rest = slot.source
    row_bytes = slot.elements // (rows.stop - rows.start) * tensor.dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, step):
        chunk = slice(start, min(start + step, rows.stop))
        target[chunk.start - rows.start : chunk.stop - rows.start] = tensor.read((chunk, *rest))
