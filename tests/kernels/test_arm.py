"""The C++ kernels on an emulated ARM processor: the plain part of `make arm-check`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..processes import run

CHECK = Path(__file__).parent / "arm" / "check"
NEEDED = ["bash", os.environ.get("ARM_CXX", "aarch64-linux-gnu-g++"), "cmake", "make"]
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]
if not any(shutil.which(name) for name in ("qemu-aarch64-static", "qemu-aarch64")):
    MISSING.append("qemu-aarch64")


def run_check(**variables: str) -> subprocess.CompletedProcess:
    # Without what `make test` hands down to a make of its own.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return run(["bash", str(CHECK), "plain"], env=kept | variables)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see make arm-check")
@pytest.mark.slow
def test_every_arm_path_agrees_with_float64_under_emulation():
    result = run_check()
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for path in ("neon_dotprod", "portable"):
        assert any(line.startswith(f"integer kernels, {path}: ") for line in lines), result.stdout
    *kernels, pool = lines
    assert all(line.endswith(" compared, 0 wrong") for line in kernels), result.stdout
    assert pool == "pool: well"


@pytest.mark.skipif(shutil.which("bash") is None, reason="a shell script")
def test_a_missing_cross_compiler_is_one_line_with_what_to_install():
    result = run_check(ARM_CXX="no-such-compiler")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("arm-check: not found: no-such-compiler")
    assert "apt install g++-aarch64-linux-gnu qemu-user-static" in line
