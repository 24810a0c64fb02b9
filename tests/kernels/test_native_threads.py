"""The threads of the native kernels (kernels/threads.h): right for every caller, after forks, and at the end."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

from pymllm.kernels.native.int4 import NativeInt4

from ..processes import ROOT, python, run
from ..tensors import floats
from .integer_cases import needs_native
from .test_native_int4 import make_problem, make_weight

COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
# Enough bytes for many threads.
SETUP = """
import os
import torch
from pymllm import _native
from pymllm.kernels.native.float_linear import FLOAT_TYPES
BF16 = FLOAT_TYPES[torch.bfloat16]
a = torch.arange(1 << 20, dtype=torch.float32).bfloat16()
b = torch.empty(1 << 20)
def widen():
    b.zero_()
    _native.widen(a.data_ptr(), b.data_ptr(), BF16, b.numel(), _native.isa_code(""), {threads})
    return torch.equal(b, a.float())
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_pool_runs_every_piece_once_for_all_callers_after_exceptions_and_forks(tmp_path):
    """`make thread-check` runs the same program under sanitizers."""
    sources = [
        str(ROOT / "kernels" / "threads.cpp"),
        str(ROOT / "tests" / "kernels" / "threads" / "pool.cpp"),
    ]
    options = ["-std=c++17", "-O2", f"-I{ROOT / 'kernels'}", "-pthread", "-o", str(tmp_path / "pool")]
    built = run([*COMPILER.split(), *options, *sources])
    assert built.returncode == 0, built.stderr
    done = run([str(tmp_path / "pool")])
    assert (done.returncode, done.stdout) == (0, "pool: well\n"), done.stderr


@needs_native
@pytest.mark.parametrize("tokens", (1, 3, 40))
def test_a_product_has_the_same_bits_on_any_number_of_threads(tokens, torch_threads):
    kernel, weight = NativeInt4(), make_weight(1032, 1024, 128)
    problem = make_problem(weight, torch.float32)
    packed, x = kernel.pack(weight, problem), floats(tokens, 1024)
    results = []
    for threads in (1, 2, 3, 8, 2):
        torch_threads(threads)
        results.append(kernel.run(packed, problem, x, None))
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    code = SETUP.format(threads=4) + (
        "assert widen()\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        here = all(widen() for _ in range(5))\n"
        "        os._exit(0 if here and len(os.listdir('/proc/self/task')) > 3 else 1)\n"
        "    assert widen() and os.waitpid(child, 0)[1] == 0\n"
    )
    if sys.platform != "linux":
        code = code.replace("len(os.listdir('/proc/self/task')) > 3", "True")
    python("-W", "ignore::DeprecationWarning", "-c", code, check=True)


@needs_native
def test_python_ends_though_the_pool_has_threads():
    code = (
        SETUP.format(threads=3) + "import atexit\natexit.register(lambda: print(widen()))\nassert widen()\n"
    )
    assert python("-c", code, check=True).stdout == "True\n"


@needs_native
def test_python_ends_while_daemon_threads_are_in_kernels():
    code = SETUP.format(threads=2) + (
        "import threading\n"
        "begun = threading.Barrier(4)\n"
        "arguments = (a.data_ptr(), b.data_ptr(), BF16, b.numel(), _native.isa_code(''), 2)\n"
        "def work():\n"
        "    held = _native.Tape()\n"
        "    begun.wait()\n"
        "    while True:\n"
        "        _native.widen(*arguments)\n"
        "for _ in range(3):\n"
        "    threading.Thread(target=work, daemon=True).start()\n"
        "begun.wait()\n"
    )
    assert "leaked" not in python("-c", code, check=True).stderr


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc")
def test_the_kernels_need_no_openmp():
    code = "from pymllm import _native\nprint([line for line in open('/proc/self/maps') if 'omp.' in line])"
    assert python("-c", code, check=True).stdout.strip() == "[]"
