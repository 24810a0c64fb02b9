"""Compiling kernels for GPUs that are not here, and the registers, stack and shared memory that each of them takes.

A kernel's own `run` says what to compile: it runs on meta tensors, and its launches are recorded with the arguments,
constants and options of real ones. Each is then specialised and compiled by the very functions of Triton that a real
launch goes through. A stack means spilled registers: nothing here has local arrays.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import MissingExtraError
from pymllm.kernels.hardware import ARCHITECTURES, Architecture, Device, probe_device
from pymllm.kernels.registry import KERNELS, kernels_for
from pymllm.kernels.triton.launch import Launch, recording
from pymllm.kernels.triton.requirements import triton_installed


@dataclass(frozen=True)
class Case:
    """A use of a kernel.  run: makes that use of it, on meta tensors.  hot: decoding waits for it, so no spills."""

    name: str
    run: Callable[[], object]
    hot: bool = True


@dataclass(frozen=True)
class Built:
    """The result of compiling one launch.

    registers: of a thread.  stack: bytes of a thread.  shared: bytes of a block, and shared_limit: how many a block may
    have.  seconds: to compile.  error: why it was not built, or "".
    """

    kernel: str
    function: str
    case: str
    architecture: str
    registers: int
    stack: int
    shared: int
    shared_limit: int
    warps: int
    hot: bool
    seconds: float
    error: str = ""

    @property
    def verdict(self) -> str:
        """The word "ok", or what is wrong."""
        if self.error:
            return f"not built: {self.error}"
        if self.shared > self.shared_limit:
            return f"{self.shared} bytes of shared memory, of {self.shared_limit}"
        return f"spills {self.stack} bytes" if self.stack and self.hot else "ok"


@dataclass(frozen=True)
class Pointer:
    """A tensor, as far as compiling depends on it.  aligned: to 16 bytes."""

    dtype: torch.dtype
    aligned: bool


@dataclass(frozen=True)
class Task:
    """One launch to compile for one architecture.  case: the name of the kernel's case, for people to read."""

    kernel: str
    case: str
    hot: bool
    launch: Launch
    architecture: Architecture

    @property
    def key(self) -> str:
        """A key that is equal for launches that one binary serves.

        Of a size it says only whether it is 1, a multiple of 16 or neither, and whether it needs 64 bits; of a size
        that varies from step to step the last alone.
        """
        arguments = zip(self.launch.arguments, self.launch.kernel.varies, strict=False)
        shapes = [_specialisation(argument, varies) for argument, varies in arguments]
        constants = {name: getattr(value, "name", value) for name, value in self.launch.constants.items()}
        return f"{self.architecture.name} {self.launch.kernel.name} {shapes} {constants}"


def _specialisation(argument: Any, varies: bool) -> str:
    if type(argument) is int:
        long = "" if -(2**31) <= argument < 2**31 else "long"
        if varies:
            return f"int{long}"
        return "1" if argument == 1 else f"int{16 if argument % 16 == 0 else ''}{long}"
    if isinstance(argument, Pointer):
        return str(argument.dtype if varies else argument)
    return "None" if argument is None else type(argument).__name__


def gather_tasks(architectures: list[str], *, only: str = "") -> list[Task]:
    """Collect every launch of every case of every kernel that runs on these architectures, each binary once.

    only: part of a name; other kernels are left out.
    """
    tasks: dict[str, Task] = {}
    for name in architectures:
        device = probe_device(ARCHITECTURES[name].spec)
        for kernel, case in _cases(device):
            if only in kernel:
                for task in tasks_of(kernel, case, device):
                    tasks.setdefault(task.key, task)
    return list(tasks.values())


def tasks_of(kernel: str, case: Case, device: Device) -> Iterator[Task]:
    """Record the launches of one case, and yield a task for each."""
    assert device.architecture is not None
    with recording() as launches:
        case.run()
    for launch in launches:
        arguments = tuple(_described(argument) for argument in launch.arguments)
        yield Task(kernel, case.name, case.hot, replace(launch, arguments=arguments), device.architecture)


def _cases(device: Device) -> Iterator[tuple[str, Case]]:
    for operation in KERNELS:
        for kernel in kernels_for(operation):
            for case in kernel.cases(device) if hasattr(kernel, "cases") else ():
                yield kernel.name, case


def _described(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return Pointer(argument.dtype, argument.storage_offset() * argument.element_size() % 16 == 0)


def build(tasks: list[Task], *, workers: int | None = None) -> list[Built]:
    """Compile the tasks, several at a time, in processes without Triton's interpreter.

    workers: how many processes; None: one for each CPU.  Raises MissingExtraError without Triton.
    """
    if not triton_installed():
        raise MissingExtraError("triton", "triton", "compiling GPU kernels")
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        built: list[Built] = []
        count = workers or os.cpu_count() or 1
        while len(built) < len(tasks):
            # A compiler that crashes takes its process along: the next tasks are built one by one, to find the culprit.
            built += _build_in_processes(tasks[len(built) :], count)
            for task in tasks[len(built) : len(built) + count]:
                built += _build_in_processes([task], 1) or [_row(task, error="the compiler crashed")]
        return built
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _build_in_processes(tasks: list[Task], count: int) -> list[Built]:
    """Compile in `count` processes, and return the results up to the first that a crash left out."""
    built: list[Built] = []
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool, suppress(BrokenProcessPool):
        built.extend(pool.map(build_one, tasks))
    return built


def build_one(task: Task) -> Built:
    """Compile one launch, in this process.  A launch that cannot be compiled is a result with an `error`."""
    started = time.perf_counter()
    registers = stack = shared = 0
    error = ""
    try:
        compiled = _compile(task)
        shared = compiled.metadata.shared
        registers, stack = (_cuda_usage if task.architecture.is_nvidia else _hip_usage)(compiled)
    except Exception as problem:  # Triton and its tools fail in many ways; each is a row of the table
        said = [line for line in str(problem).splitlines() if line.strip(" ^")] or [""]
        error = f"{type(problem).__name__}: {getattr(problem, 'error_message', None) or said[-1]}"
    seconds = round(time.perf_counter() - started, 2)
    return _row(task, registers, stack, shared, seconds, error)


def _row(
    task: Task, registers: int = 0, stack: int = 0, shared: int = 0, seconds: float = 0.0, error: str = ""
) -> Built:
    return Built(
        task.kernel,
        task.launch.kernel.name,
        task.case,
        task.architecture.name,
        registers,
        stack,
        shared,
        task.architecture.shared_bytes,
        task.launch.constants.get("num_warps", 4),
        task.hot,
        seconds,
        error,
    )


def _compile(task: Task) -> Any:
    """Compile as `JITFunction.run` does, but for a target that is not the current one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    architecture = task.architecture
    if architecture.is_nvidia:
        target = GPUTarget("cuda", int(architecture.name[2:]), 32)
    else:
        target = GPUTarget("hip", architecture.name, 64)
    backend = make_backend(target)
    function = task.launch.kernel.compiled
    constants = {name: getattr(value, "compiled", value) for name, value in task.launch.constants.items()}
    constants |= {"debug": False, "instrumentation_mode": ""}
    arguments = [_stand_in(argument) for argument in task.launch.arguments]
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*arguments, **constants)
    options, signature, constexprs, attributes = function._pack_args(
        backend, constants, bound, specialization, options
    )
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


class _Unaligned:
    """A tensor that is not aligned to 16 bytes, with all that Triton asks of it: its dtype and its address."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


def _stand_in(argument: Any) -> Any:
    if not isinstance(argument, Pointer):
        return argument
    return (
        torch.empty(0, dtype=argument.dtype, device="meta")
        if argument.aligned
        else _Unaligned(argument.dtype)
    )


def _cuda_usage(compiled: Any) -> tuple[int, int]:
    """Read the registers and stack bytes of a thread from the cuobjdump that comes with Triton."""
    from triton import backends

    tool = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no line with REG and STACK; it ends with {text[-200:]!r}")
    return int(found[1]), int(found[2])


def _hip_usage(compiled: Any) -> tuple[int, int]:
    """Read a lane's vector registers, and the bytes of those that are spilled, from the assembly's own notes."""
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
    )
    if registers is None or spilled is None:
        raise ValueError("the assembly does not state both .vgpr_count and .vgpr_spill_count")
    return int(registers[1]), 4 * int(spilled[1])
