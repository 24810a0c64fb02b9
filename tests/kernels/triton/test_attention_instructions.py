"""What decoding attention compiles to: instructions of a thread in a step of 64 keys, counted without a GPU."""

import pytest

from ...processes import python

pytest.importorskip("triton")
REQUESTS = "cache, 16 x 1 tokens of 4096"
# Half of what it took when each byte was read and converted by itself; bfloat16 keys take 450.
MOST = {"sm90": 700, "sm80": 1000}


@pytest.mark.parametrize("architecture", MOST)
def test_a_step_over_fp8_keys_takes_few_instructions_and_no_stack(architecture):
    """In a process of its own: this one may run Triton's interpreter."""
    command = ["benchmarks/gpu_instructions.py", "--arch", architecture, "--dry-run"]
    command += ["--only", f"float8_e4m3fn with a scale a head {REQUESTS}"]
    lines = python(*command, check=True, TRITON_INTERPRET=None).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (attend,) = (row for row in rows if row[1] == "attend")
    instructions, registers, stack = int(attend[3]), int(attend[6]), int(attend[7])
    assert 0 < instructions <= MOST[architecture]
    assert registers <= 168 and stack == 0  # of 65536 registers, three blocks of 128 threads
