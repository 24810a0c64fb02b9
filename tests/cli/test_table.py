"""Tables for people, at every width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import pymllm
from pymllm.api import shipped_model
from pymllm.cli.plan import print_plan
from pymllm.cli.table import Column, fold, table_lines

NAME = "model.layers.11.block_sparse_moe.experts.7.down_proj"
COLUMNS = [
    Column("#", numeric=True),
    Column("layers", name=True),
    Column("method"),
    Column("size", numeric=True),
]
ROWS = [
    ["210", NAME, "compressed-tensors int4 g128", "1073741824 B/token"],
    ["1", "lm_head", "none", "1.5 MB"],
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_nothing_is_wider_than_the_terminal_and_no_word_or_number_is_cut(width):
    lines = table_lines(COLUMNS, ROWS, width)
    assert max(map(len, lines)) <= width
    joined = "".join("".join(lines).split())
    for row in ROWS:
        for piece in re.split(r"[ .-]", " ".join([row[1], row[2]])):
            assert any(piece in line for line in lines), piece
        assert any(row[3] in line for line in lines)  # a number stays in one piece
    assert "lm_head" in joined


def test_a_wide_terminal_has_a_line_a_row_and_a_narrow_one_the_name_below():
    assert len(table_lines(COLUMNS, ROWS, 200)) == 2 + len(ROWS)
    narrow = table_lines(COLUMNS, ROWS, 80)
    assert narrow[0].split() == ["#", "method", "size"] and narrow[3].strip() == NAME


def test_texts_are_folded_at_spaces_and_dots_but_not_within_numbers():
    assert fold("tied to model.embed_tokens", 15) == ["tied to model.", "embed_tokens"]
    assert fold("error of 6e-3, or 1.25", 10) == ["error of", "6e-3, or", "1.25"]
    assert fold("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_plan_fits_the_terminal(width):
    written = io.StringIO()
    print_plan(pymllm.plan(shipped_model()), Console(file=written, width=width, markup=False))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(written.getvalue().split())
    assert "between layers float32; inside, 42 of 44 layers round their inputs" in text
    assert "compute=exact forbids it" in text
    for name in ("model.embed_tokens", "model.layers.*.self_attn.attn", "native_int4"):
        assert name in text
