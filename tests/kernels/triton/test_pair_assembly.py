"""The PTX that decodes pairs of codes, executed here instruction by instruction, against what each code means."""

import re

import pytest
import torch

from pymllm.kernels.triton.fp4_weights import SIZES, e2m1_assembly
from pymllm.kernels.triton.fp8_weights import e4m3_assembly
from pymllm.kernels.triton.int_weights import eight_bit_assembly, four_bit_assembly

DTYPES = (torch.bfloat16, torch.float16)
LOW = 0xFFFFFFFF
WORD, ADD = 0, 1  # places among the inputs


def execute(text, words, added, outputs):
    """Execute PTX on all words at once.  words: int64 of 32 bits.  Returns the outputs, int64 of 16 bits."""
    values = {f"${outputs + WORD}": words, f"${outputs + ADD}": torch.full_like(words, added & LOW)}

    def value(name):
        return values[name] if name in values else torch.full_like(words, int(name, 0))

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        pair = re.match(r"\{(\$\d+), (\$\d+)\}, (\w+)", rest)
        if pair:
            values[pair[1]], values[pair[2]] = value(pair[3]) & 0xFFFF, value(pair[3]) >> 16
            continue
        to, *names = (name.strip() for name in rest.split(","))
        values[to] = OPERATIONS[operation](*map(value, names)) & LOW
    return [values[f"${n}"] for n in range(outputs)]


def lop3(a, b, c, table):
    result = torch.zeros_like(a)
    for bits in range(8):
        if int(table.flatten()[0]) >> bits & 1:
            one, two, three = (x if bits >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0)))
            result |= one & two & three
    return result


def in_pairs(operation, dtype):
    """Apply an operation to the low and the high floats, rounding once."""

    def floats(pairs, shift):
        return (pairs >> shift & 0xFFFF).to(torch.uint16).view(dtype).double()

    def apply(*pairs):
        halves = [
            operation(*(floats(pair, shift) for pair in pairs)).to(dtype).view(torch.uint16).to(torch.int64)
            for shift in (0, 16)
        ]
        return halves[0] | halves[1] << 16

    return apply


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, by: a << by,
    "shr.b32": lambda a, by: a >> by,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": in_pairs(lambda a, b, c: a * b + c, torch.bfloat16),
    "add.rn.f16x2": in_pairs(lambda a, b: a + b, torch.float16),
}


def decoded(assembly, dtype, words, per_word, zero):
    """Return the numbers of all codes of words, [words, N] float64, in the order of a word's bits."""
    raw = execute(assembly.text, words, assembly.added(zero, dtype), per_word)
    numbers = torch.stack(raw, -1).to(torch.uint16).view(dtype).double() * assembly.factor
    return torch.cat((numbers[:, ::2], numbers[:, 1::2]), dim=1)


def codes_of(words, bits):
    return torch.stack([words >> shift & (2**bits - 1) for shift in range(0, 32, bits)], -1)


def every_half():
    """Words with all 65,536 low halves, each beside another high half."""
    low = torch.arange(1 << 16)
    return low | ((low * 40503 + 12345) & 0xFFFF) << 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", (0.0, 7.0, 8.0, 15.0))
def test_four_bits_are_exact(dtype, zero):
    words = every_half()
    found = decoded(four_bit_assembly(dtype), dtype, words, 8, zero)
    assert torch.equal(found, codes_of(words, 4).double() - zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", (0.0, 1.0, 128.0, 255.0))
def test_eight_bits_are_exact(dtype, zero):
    words = every_half()
    found = decoded(eight_bit_assembly(dtype), dtype, words, 4, zero)
    assert torch.equal(found, codes_of(words, 8).double() - zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e4m3_is_exact_but_for_nans_which_their_row_is_multiplied_by(dtype):
    words = every_half()
    codes = codes_of(words, 8)
    expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
    found = decoded(e4m3_assembly(dtype), dtype, words, 4, 0.0)
    is_nan = codes & 0x7F == 0x7F
    assert torch.equal(found[~is_nan], expected[~is_nan])
    assert expected[is_nan].isnan().all() and (found[is_nan].abs() == 480).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e2m1_is_exact(dtype):
    words = every_half()
    table = torch.tensor((*SIZES, *(-size for size in SIZES)), dtype=torch.float64)
    found = decoded(e2m1_assembly(dtype), dtype, words, 8, 0.0)
    assert torch.equal(found, table[codes_of(words, 4)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("assembly", (four_bit_assembly, eight_bit_assembly))
def test_stored_zero_points_are_added_as_the_kernel_makes_them(dtype, assembly):
    """A kernel makes the pair from bias - zero: it must be a number of this dtype."""
    found = assembly(dtype)
    for zero in range(256 if assembly is eight_bit_assembly else 16):
        assert float(torch.tensor(found.bias - zero, dtype=dtype)) == found.bias - zero
