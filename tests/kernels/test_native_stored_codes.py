"""Codes out of words and bytes, in C++: field by field as Python's integers have them, on odd shapes."""

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.kernels.native import extension, stored_codes
from pymllm.kernels.native.stored_codes import split_columns, split_fields, split_rows, splits_here
from pymllm.quantization.formats.awq import NIBBLE_COLUMNS, pack_columns, unpack_columns
from pymllm.quantization.storage.gguf_blocks import BLOCKS
from pymllm.quantization.storage.packing import pack_words, unpack_words

from .integer_cases import needs_native

pytestmark = needs_native

SHAPES = [(1, 1), (3, 16), (64, 17), (65, 15), (130, 33), (200, 16)]  # tiles have 64 rows of 16 words


def words_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**31), 2**31, (rows, columns + 3), generator=generator)
    return wide.to(torch.int32)[:, :columns]  # rows that do not adjoin


def fields_of(number, bits, count):
    return [number >> (bits * index) & ((1 << bits) - 1) for index in range(count)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_words_become_codes_in_either_direction(rows, columns, threads, torch_threads):
    words = words_of(rows, columns)
    torch_threads(threads)
    for bits in (2, 4, 8):
        expected = [
            [f for row in words.tolist() for f in fields_of(row[column] & 0xFFFFFFFF, bits, 32 // bits)]
            for column in range(columns)
        ]
        assert split_rows(words, bits).tolist() == expected
    order = (5, 2, 7, 0, 1, 3, 6, 4)
    expected = [[0] * rows for _ in range(8 * columns)]
    for row, line in enumerate(words.tolist()):
        for column, word in enumerate(line):
            for index, field in enumerate(fields_of(word & 0xFFFFFFFF, 4, 8)):
                expected[8 * column + order[index]][row] = field
    assert split_columns(words, order).tolist() == expected


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_become_fields_side_by_side_or_in_planes(bits, planes):
    stored = torch.randint(0, 256, (5, 37), dtype=torch.uint8)[:, 2:35]
    count = 8 // bits
    expected = []
    for row in stored.tolist():
        fields = [fields_of(byte, bits, count) for byte in row]
        by_plane = [byte[index] for index in range(count) for byte in fields]
        expected.append(by_plane if planes else [field for byte in fields for field in byte])
    assert split_fields(stored, bits, planes=planes).tolist() == expected


@pytest.fixture
def both_ways(monkeypatch):
    """A call's results with native code and without."""

    def run(call):
        with_native = call()
        with monkeypatch.context() as patch:
            patch.setattr(stored_codes, "native_available", lambda: False)
            return with_native, call()

    return run


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_formats_unpack_alike_without_native_code(bits, both_ways):
    words = words_of(33, 24).contiguous()
    for stored in (words, words.t(), words[:, :8]):
        ours, torchs = both_ways(lambda stored=stored: unpack_words(stored, bits))
        assert torch.equal(ours, torchs)
        assert torch.equal(pack_words(ours, bits), stored) or ours.shape[1] * bits % 32
    ours, torchs = both_ways(lambda: unpack_columns(words))
    assert torch.equal(ours, torchs) and torch.equal(pack_columns(ours), words)
    assert sorted(NIBBLE_COLUMNS) == list(range(8))


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_blocks_decode_alike_without_native_code(kind, both_ways):
    block = BLOCKS[kind]
    stored = torch.randint(0, 256, (3, 2, block.size), dtype=torch.uint8)
    ours, torchs = both_ways(lambda: block.decode(stored))
    for mine, theirs in zip(ours, torchs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.shape == theirs.shape and mine.dtype is theirs.dtype
            assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def test_what_lies_otherwise_is_refused():
    words = words_of(8, 8)
    assert not splits_here(words.t()) and not splits_here(words.to("meta")) and not splits_here(words[:0])
    with pytest.raises(ConfigError, match="stored codes"):
        split_rows(words.t(), 4)
    with pytest.raises(ConfigError, match="stored codes"):
        split_rows(words.to(torch.int64), 4)
    short = words_of(8, 8).contiguous()
    short.untyped_storage().resize_(8)
    with pytest.raises(ConfigError):
        split_columns(short, NIBBLE_COLUMNS)
    with pytest.raises(ConfigError, match="bits"):
        extension.native().split_rows(words.data_ptr(), 8, 8, 11, 3, words.data_ptr(), 1)
    with pytest.raises(ConfigError, match="places"):
        extension.native().split_columns(words.data_ptr(), 8, 8, 11, [0] * 8, words.data_ptr(), 1)
    with pytest.raises(ConfigError, match="stride"):
        extension.native().split_fields(words.data_ptr(), 8, 8, 7, 4, False, words.data_ptr(), 1)
