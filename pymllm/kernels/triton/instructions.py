"""Counting the instructions of compiled kernels for NVIDIA GPUs, for what can be said of speed without a GPU.

A kernel spends its time in one loop. Its instructions, times the threads of a block, over the weights (or keys) of a
step, are a bound: a multiprocessor issues four of 32 threads at once, in each clock.
"""

# O out_features, I in_features, T tokens

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm.kernels.triton.ahead_of_time import Task, compile_task, usage_of

# Of a multiprocessor, on every architecture from 8.0 to 12.0 at least.
REGISTERS, THREADS, SHARED_RESERVED = 65536, 2048, 1024


@dataclass(frozen=True)
class Code:
    """The instructions of a compiled kernel, in order, as nvdisasm names them, and its loops.

    loops: (first, last) instruction of each loop, both inside.
    """

    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    @property
    def main_loop(self) -> tuple[str, ...]:
        """The longest of the innermost loops; all instructions where there is no loop."""
        innermost = [
            (first, last)
            for first, last in self.loops
            if not any(
                first <= one and end <= last and (one, end) != (first, last) for one, end in self.loops
            )
        ]
        if not innermost:
            return self.instructions
        first, last = max(innermost, key=lambda loop: loop[1] - loop[0])
        return self.instructions[first : last + 1]


@dataclass(frozen=True)
class Count:
    """Figures that were counted of one launch.

    registers, stack: of a thread, the latter in bytes.  shared: bytes of a block.  loop: instructions of a thread in a
    step of the main loop.  weights: that a block reads in a step, 0 where the kernel reads none.  blocks: of the grid.
    resident: blocks that a multiprocessor holds at once.
    """

    title: str
    function: str
    architecture: str
    registers: int
    stack: int
    shared: int
    warps: int
    loop: int
    weights: int
    blocks: int
    resident: int
    processors: int

    @property
    def per_weight(self) -> float:
        """Instructions of a thread for each weight, or 0."""
        return self.loop * 32 * self.warps / self.weights if self.weights else 0.0

    @property
    def waves(self) -> float:
        """The number of times that the grid fills the GPU."""
        return self.blocks / (self.resident * self.processors)


def count(title: str, task: Task, processors: int, bits: float = 0) -> Count:
    """Compile a launch and count.  bits: of a weight as the kernel loads it, 0 where it multiplies by none.

    Raises what Triton raises where it cannot compile the launch.
    """
    compiled = compile_task(task)
    registers, stack, shared = usage_of(task.architecture, compiled)
    warps = task.launch.constants.get("num_warps", 4)
    threads = 32 * warps
    loop = disassemble(compiled.asm["cubin"]).main_loop
    by_registers = REGISTERS // max(1, -(-registers // 8) * 8 * threads)
    by_shared = (task.architecture.shared_bytes + SHARED_RESERVED) // (shared + SHARED_RESERVED)
    resident = max(1, min(by_registers, by_shared, THREADS // threads, 32))
    weights = weights_of_step(task.launch.constants) if bits else 0
    streamed = sum(map(_streamed_bytes, loop)) * threads
    if weights and streamed:
        weights = round(streamed * 8 / bits)  # of all the steps that the compiler put into one
    function, architecture = task.launch.kernel.name, task.architecture.name
    return Count(
        *(title, function, architecture, registers, stack, shared, warps),
        *(len(loop), weights, math.prod(task.launch.grid), resident, processors),
    )


def weights_of_step(constants: dict[str, Any]) -> int:
    """Return the weights that a block reads in a step of its loop, by its tile; 0 for a kernel that reads none."""
    depth = constants["BLOCK_W"] * constants["N"] if "BLOCK_W" in constants else constants.get("BLOCK_I", 0)
    return constants.get("BLOCK_O", 0) * depth


def disassemble(cubin: bytes) -> Code:
    """Read the machine code of a kernel with the nvdisasm that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tool("nvdisasm")), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read_code(text.splitlines())


def read_code(lines: Sequence[str]) -> Code:
    """Read what nvdisasm prints: labels end in a colon, branches name them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in lines:
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.+?)\s*;", line)
        if found is None:
            continue
        words = re.sub(r"^@!?U?P\w+\s+", "", found[1])
        if words.startswith(("BRA", "@")) and (to := re.search(r"\.L_\w+", words)):
            branches.append((len(instructions), to[0]))
        instructions.append(words)
    while instructions and instructions[-1].startswith(("NOP", "BRA")):  # what fills the end of a kernel
        instructions.pop()
    loops = tuple((labels[to], at) for at, to in branches if labels.get(to, at) < at < len(instructions))
    return Code(tuple(instructions), loops)


def _streamed_bytes(instruction: str) -> int:
    """Return the bytes that a thread loads by this instruction, if they are to be evicted first, as weights are."""
    name = instruction.partition(" ")[0]
    if not name.startswith("LDG") or ".EF" not in name:
        return 0
    width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", name)
    return int(width[1]) // 8 if width else 4


@functools.cache
def _tool(name: str) -> Path:
    from triton import backends

    return Path(backends.__file__).parent / "nvidia" / "bin" / name
