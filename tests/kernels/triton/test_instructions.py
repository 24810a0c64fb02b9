"""Counting compiled instructions: how machine code is read, and what the kernels that decoding waits for may take."""

from pathlib import Path

import pytest

from pymllm.kernels.triton.instructions import read_code, weights_of_step

from ...processes import python

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]


def listing(*lines):
    """A text as nvdisasm prints it: labels as they are, instructions with an address."""
    return [
        line if line.startswith(".") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(lines)
    ]


def test_a_loop_goes_from_its_label_to_the_branch_that_names_it():
    code = read_code(
        listing(
            "S2R R0, SR_TID.X", ".L_x_0:", "LDG.E R2, [R4]", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT"
        )
    )
    assert code.loops == ((1, 3),)
    assert code.main_loop == ("LDG.E R2, [R4]", "FADD R1, R1, R2", "BRA `(.L_x_0)")


def test_the_longest_innermost_loop_is_the_main_one():
    inner = ["FADD R1, R1, R2"] * 5
    code = read_code(
        listing(
            ".L_x_0:",
            "MOV R1, RZ",
            ".L_x_1:",
            *inner,
            "@!P1 BRA `(.L_x_1)",
            ".L_x_2:",
            "FMUL R3, R3, R3",
            "@P2 BRA `(.L_x_2)",
            "@P0 BRA `(.L_x_0)",
            "EXIT",
        )
    )
    assert len(code.loops) == 3
    assert code.main_loop == (*inner, "BRA `(.L_x_1)")


def test_predicates_and_branches_ahead_make_no_loop():
    code = read_code(
        listing("@!UP0 BRA `(.L_x_5)", "@P3 FADD R1, R1, R2", ".L_x_5:", "EXIT", ".L_x_6:", "BRA `(.L_x_6)")
    )
    assert code.loops == ()  # what fills the end of a kernel is none either
    assert code.main_loop == ("BRA `(.L_x_5)", "FADD R1, R1, R2", "EXIT")


def test_the_weights_of_a_step_follow_from_the_tile():
    assert weights_of_step({"BLOCK_O": 64, "BLOCK_W": 32, "N": 8}) == 64 * 32 * 8
    assert weights_of_step({"BLOCK_O": 64, "BLOCK_I": 128}) == 64 * 128
    assert weights_of_step({"BLOCK": 256}) == 0


def test_products_of_int4_by_a_few_rows_take_few_instructions_and_no_stack():
    """In a process of its own: this one may run Triton's interpreter, which compiles nothing."""
    command = [str(ROOT / "benchmarks" / "gpu_instructions.py"), "--arch", "sm90", "sm80", "--dry-run"]
    printed = python(*command, "--only", "int4 in groups of 128, 1", check=True, TRITON_INTERPRET=None).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    tiles = [row for row in rows if row[1] == "multiply_tile"]
    limits = {"1": 4.0, "16": 3.5, "128": 5.0}
    assert len(tiles) == 2 * len(limits)
    for title, _, architecture, _, weights, per_weight, _, stack, _, warps, *_ in tiles:
        tokens = title.split()[-2]
        assert float(per_weight) <= limits[tokens], (title, architecture)
        assert stack == "0", (title, architecture)
        assert warps == "4" or (tokens == "128" and int(weights) >= 128 * 128), (title, architecture)


def test_loads_are_wide_where_16_divides_sizes_in_part():
    """In a process of its own, as above."""
    file = Path(__file__).with_name("compiled_loads.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, check=True, TRITON_INTERPRET="0")
    assert "skipped" not in done.stdout
