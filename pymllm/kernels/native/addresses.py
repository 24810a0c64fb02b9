"""Addresses of tensors for native code, which reads and writes what lies there and asks nobody.

A tensor's shape promises elements that its memory need not have: somebody may have resized its storage, and meta,
sparse, fake and batched tensors have none. So an address is given out only where the memory behind it is as large as
what the native code will touch. What the numbers in a tensor name, rows, pages or slots, that code looks at itself, at
every call (kernels/checks.h).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, IndicesError, counted

CODE = "native-tensor"
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
LEAST, MOST = -(2**31), 2**31 - 1  # of int32


def address(name: str, tensor: Tensor, size: int) -> int:
    """Return where a tensor lies.  size: how many bytes, from its first element, native code will touch.

    The caller has checked dtype, device, shape and strides.
    Raises ConfigError where the tensor's memory is smaller than that, or where it has none.
    """
    # A call costs 0.2 us: benchmarks/cpu_dispatch.py.
    try:
        offset = int(tensor.storage_offset())
        if offset:
            offset *= tensor.element_size()
        found: int = tensor.data_ptr()
        # Of a view into no memory at all, torch gives the offset alone.
        if tensor.untyped_storage().nbytes() >= offset + size and (found > offset or not size):
            return found
    except RuntimeError:  # torch's answer for a tensor without memory of its own
        pass
    raise unfit(name, tensor)


def checked_address(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return where a contiguous tensor of this shape and dtype lies on the CPU.  Raises ConfigError for any other."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous():
        return address(name, tensor, tensor.nbytes)
    raise unfit(name, tensor, shape, dtype)


def floats_address(name: str, tensor: Tensor, count: int) -> int:
    """Return where so many contiguous float32 numbers of a weight lie on the CPU.  Raises ConfigError for any other."""
    if tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() == count:
        return address(name, tensor, count * 4)
    raise unfit(name, tensor, (count,), torch.float32)


Places = list[tuple[Tensor, torch.UntypedStorage, int, int, torch.Size, torch.dtype]]


def places_of(tensors: Iterable[Tensor | None]) -> Places:
    """Note down where contiguous tensors lie, their storages and sizes, shapes and dtypes, for `lie_as`."""
    return [
        (t, t.untyped_storage(), t.data_ptr(), t.untyped_storage().nbytes(), t.shape, t.dtype)
        for t in tensors
        if t is not None
    ]


def lie_as(places: Places) -> bool:
    """Tell whether tensors still lie as `places_of` found them.

    Each storage is kept, so that no other one lies at its address while it has its bytes: a tensor at that address is
    still in that storage, and to ask the tensor for it would cost 0.1 us. `t_`, `as_strided_` and `tensor.data = ...`
    may leave the address, but not the form.
    """
    # A generator would cost as much as the looks.
    for tensor, storage, at, size, shape, dtype in places:
        if (
            tensor.data_ptr() != at
            or storage.nbytes() != size
            or tensor.shape != shape
            or tensor.dtype is not dtype
            or not tensor.is_contiguous()
        ):
            return False
    return True


def fits(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Tell whether a tensor is contiguous on the CPU, of this shape and dtype."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor with any strides.  Raises ConfigError where it has too little memory.

    torch itself reads what strides promise without a look at the storage.
    """
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    check_memory(name, tensor)
    with _room(name, tensor):
        return tensor.resolve_neg().contiguous()


def strided_rows(name: str, tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor [T, heads, size] whose tokens may be apart, where it lies, and how many elements apart they are.

    The heads of a token come to lie side by side.  The caller has checked dtype and device.
    """
    tokens, heads, size = tensor.shape
    try:
        stride, between, one = tensor.stride()
    except RuntimeError:  # a layout without strides
        raise unfit(name, tensor) from None
    if one != 1 or between != size or tensor.is_neg():
        tensor = contiguous(name, tensor)
        if not tensor.is_contiguous():
            raise unfit(name, tensor)
        stride = heads * size
    rows = (tokens - 1) * stride + heads * size if tokens else 0
    return tensor, address(name, tensor, rows * tensor.itemsize), stride


def integers(name: str, tensor: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Bring integers of any dtype to the CPU, contiguous, in this one.  Raises IndicesError where one does not fit."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    if tensor.dtype not in INTEGERS or tensor.is_meta or tensor.layout is not torch.strided:
        raise unfit(name, tensor, ("*",), "integers")
    check_memory(name, tensor)
    with _room(name, tensor):
        found = tensor.to("cpu").resolve_neg().contiguous()
    if dtype is torch.int32 and found.dtype is torch.int64 and found.numel():
        least, most = int(found.min()), int(found.max())
        if least < LEAST or most > MOST:
            raise IndicesError(
                f"{name} must fit 32 bits",
                code=CODE,
                expected=f"{LEAST} to {MOST}",
                found=f"{least} to {most}",
            )
    return found.to(dtype)


def floats(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring floats of any dtype to the CPU, contiguous, in this one."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    if tensor.is_meta:
        raise unfit(name, tensor, ("*",), "floats")
    with _room(name, tensor):
        return floats_in(name, tensor, dtype).to("cpu").resolve_neg().contiguous()


def floats_in(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert floats to another dtype.  Raises ConfigError for other numbers, and where there is too little memory."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise unfit(name, tensor, ("*",), "floats")
    if tensor.is_cpu:
        check_memory(name, tensor)
    return tensor.to(dtype)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise ConfigError where a tensor's memory is smaller than its shape and strides promise."""
    if not has_memory(tensor):
        raise unfit(name, tensor)


@contextlib.contextmanager
def _room(name: str, tensor: Tensor) -> Iterator[None]:
    """Raise ConfigError where torch finds no memory for a contiguous copy: an expanded tensor has any size."""
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"there is no memory for a contiguous copy of {name}, {describe_tensor(tensor)}", code=CODE
        ) from error


def has_memory(tensor: Tensor) -> bool:
    """Tell whether every element of a tensor lies inside its storage."""
    try:
        return tensor.untyped_storage().nbytes() >= _end(tensor) * tensor.element_size()
    except RuntimeError:
        return False


def _end(tensor: Tensor) -> int:
    """Count the elements of the storage up to the last one of the tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((side - 1) * stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + last + 1


def unfit(
    name: str,
    tensor: Any,
    shape: Sequence[int | str] | None = None,
    dtype: torch.dtype | str | None = None,
    error: type[ConfigError] = ConfigError,
) -> ConfigError:
    """Make the error for a tensor that native code may not touch.

    shape, dtype: what is wanted; None: as it is, only with memory for it.
    """
    wanted = ["a tensor" if shape is None else f"[{', '.join(map(str, shape))}]"]
    if dtype is not None:
        wanted.append(str(dtype))
    wanted.append("on the CPU" if shape is not None else "with memory for all its elements on the CPU")
    return error(
        f"{name} must be {' '.join(wanted)}, not {describe_tensor(tensor)}",
        code=CODE,
        fix="Give a whole tensor of that shape and dtype, whose storage nobody has resized.",
    )


def describe_tensor(tensor: Any) -> str:
    """Name a tensor's shape, dtype and device, and what is unusual about its memory."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    kind = "" if type(tensor) in (Tensor, nn.Parameter) else f"{type(tensor).__name__} "
    try:
        shape = str(list(tensor.shape))
    except RuntimeError:  # a nested tensor
        shape = "of many shapes"
    told = [f"{kind}{shape} {tensor.dtype} on {tensor.device}"]
    if tensor.layout is not torch.strided:
        return f"{told[0]}, laid out as {tensor.layout}"
    try:
        if not tensor.is_contiguous():
            told.append(f"strides {tensor.stride()}")
        if tensor.is_neg():
            told.append("negated when it is read")
        needed, there = _end(tensor) * tensor.element_size(), tensor.untyped_storage().nbytes()
        if there < needed:
            told.append(f"with {there} of its {counted(needed, 'byte')} of memory")
    except RuntimeError:
        told.append("without memory of its own")
    return ", ".join(told)
