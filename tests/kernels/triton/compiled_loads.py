"""Loads of compiled kernels over sizes that 16 divides only in part.

`test_instructions.py` runs this file in a process of its own: there the kernels are compiled, not interpreted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from pymllm.kernels.attention import KVType
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton.ahead_of_time import Case, compile_task, tasks_of
from pymllm.kernels.triton.attention import TritonGroupedAttention, example_problem
from pymllm.kernels.triton.instructions import disassemble
from pymllm.kernels.triton.int_weights import TritonInt, meta_int_weight
from pymllm.kernels.triton.launch import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are compiled in a process of their own")
DEVICE = probe_device("cuda:sm90")


def loads(run, kernel):
    """Return the names of the loads in the main loop of the kernel that `run` launches."""
    (task,) = (task for task in tasks_of("", Case("", run), DEVICE) if task.launch.kernel.name == kernel)
    loop = disassemble(compile_task(task).asm["cubin"]).main_loop
    names = [instruction.partition(" ")[0] for instruction in loop]
    return [name for name in names if name.startswith("LDG") and name != "LDGDEPBAR"]


def test_weights_of_rows_that_are_no_multiple_of_16_words_are_loaded_16_bytes_at_a_time():
    weight = meta_int_weight(2880, 2880, 4, 32, False)  # 360 words a row
    problem = LinearProblem(weight.type, 2880, 2880, torch.bfloat16, DEVICE)
    packed, x = TritonInt().pack(weight, problem), torch.empty(1, 2880, dtype=torch.bfloat16, device="meta")
    found = loads(lambda: TritonInt().run(packed, problem, x, None), "multiply_tile")
    assert any(name.endswith(".128") for name in found), found


@pytest.mark.parametrize("size", (64, 80, 96))
def test_codes_of_keys_are_loaded_16_bytes_at_a_time_for_heads_of_any_multiple_of_16(size):
    problem = example_problem(DEVICE, KVType(torch.float8_e4m3fn, "static"))
    problem = replace(problem, head_dim=size, value_head_dim=size)
    found = loads(partial(TritonGroupedAttention()._on_meta, problem, 16, 1, 4096), "attend")
    narrow = [name for name in found if not name.endswith(".128")]
    assert len(narrow) <= 2 < len(found), found  # numbers of pages
