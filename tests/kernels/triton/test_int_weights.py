"""Integer weights on the GPU: every bit width, group length and kind of zero point."""

import itertools
from dataclasses import replace

import pytest
import torch

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import IntWeight
from pymllm.kernels.hardware import ARCHITECTURES, probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import select
from pymllm.kernels.triton import tuning, weight_only
from pymllm.kernels.triton.int2_weights import TritonInt2
from pymllm.kernels.triton.int_weights import TritonInt, int_coding
from pymllm.kernels.triton.tune import tune
from pymllm.kernels.triton.tuning import Tile
from pymllm.kernels.triton.words import Order, pack_words, unpack_words

from .gpu import DEVICE, FLOATS, HERE, UNIT, moved, randn
from .linear_checks import check_products, check_round_trip, problem_for

KINDS = [(4, 32, 96), (4, 128, 256), (4, 48, 144), (4, 544, 544), (8, 64, 192), (8, 320, 320)]


def make(bits, group, in_features, symmetric, out_features=70):
    values = randn(out_features, in_features, seed=bits + group).cpu()
    return IntWeight.from_float(values, bits=bits, group_size=group, symmetric=symmetric)


@pytest.mark.parametrize("bits, group, in_features", KINDS)
@pytest.mark.parametrize("symmetric", (True, False), ids=("sym", "asym"))
def test_products_equal_float64(bits, group, in_features, symmetric):
    weight = make(bits, group, in_features, symmetric)
    for dtype in FLOATS:
        check_round_trip(TritonInt(), weight, dtype)
        check_products(TritonInt(), weight, dtype)


@pytest.mark.parametrize("symmetric", (True, False), ids=("sym", "asym"))
def test_two_bits_equal_float64(symmetric):
    weight = make(2, 64, 192, symmetric)
    check_round_trip(TritonInt2(), weight, torch.float16)
    check_products(TritonInt2(), weight, torch.float16)


def test_long_rows_are_summed_in_float32_in_the_same_order_every_time():
    weight = make(4, 128, 8192, False, out_features=33)
    check_products(TritonInt(), weight, torch.float16, tokens=(1, 2))
    problem = problem_for(weight, torch.float16)
    packed, x = moved(TritonInt().pack(weight, problem)), randn(2, 8192, dtype=torch.float16)
    first = TritonInt().run(packed, problem, x, None)
    assert torch.equal(first, TritonInt().run(packed, problem, x, None))


@pytest.mark.parametrize("device", ("cuda:sm80", "hip:gfx942"))
@pytest.mark.parametrize("bits", (4, 8))
def test_the_order_of_other_matrix_units_gives_the_same_products(device, bits):
    """sm_80's threads hold four neighbours, Hopper's two: words are packed and read in either order."""
    weight = make(bits, 32, 160, False, out_features=40)
    problem = LinearProblem(weight.type, 160, 40, torch.float16, probe_device(device))
    there = problem_for(weight, torch.float16)
    packed, hopper = (TritonInt().pack(weight, each) for each in (problem, there))
    assert not torch.equal(packed["words"], hopper["words"])
    assert torch.equal(TritonInt().unpack(packed, problem).codes, weight.codes)
    x = randn(5, 160, dtype=torch.float16)
    result = TritonInt().run(moved(packed), problem, x, None)
    expected = TritonInt().run(moved(hopper), there, x, None)
    assert torch.allclose(result, expected, rtol=2e-3, atol=2e-3)


def biased(kind, count, inputs, dtype):
    noise = randn(count, inputs, seed=5)
    values = {
        "far from zero": 1000 + noise,
        "constant": torch.full_like(noise, 333.0),
        "one giant": noise.index_fill(1, torch.tensor([7], device=HERE), 3e3),
    }
    return values[kind].to(dtype)


@pytest.mark.parametrize("kind", ("far from zero", "constant", "one giant"))
@pytest.mark.parametrize("bits", (4, 8))
def test_inputs_far_from_zero_cancel_nothing(kind, bits):
    """Codes are offsets from their zero point before they are multiplied: sums hold nothing that is subtracted later.

    Beside random rows, one is of zeros, and one of the smallest step either way: their sums are small, or nothing.
    """
    weight = make(bits, 64, 256, False, out_features=20)
    zeros = weight.zeros.repeat_interleave(64, dim=1)
    codes = weight.codes.clone()
    codes[3] = zeros[3]
    codes[4, ::2], codes[4, 1::2] = zeros[4, ::2].clamp(max=2**bits - 2) + 1, zeros[4, 1::2].clamp(min=1) - 1
    weight = replace(weight, codes=codes)
    exact = weight.dequantize(torch.float64).to(HERE)
    for dtype in FLOATS:
        problem = problem_for(weight, dtype)
        packed = moved(TritonInt().pack(weight, problem))
        for count in (1, 3):
            x = biased(kind, count, 256, dtype)
            result, expected = TritonInt().run(packed, problem, x, None).double(), x.double() @ exact.t()
            size = x.double().abs() @ exact.t().abs()
            bound = 2 * UNIT[dtype] * expected.abs() + 256 * 2.0**-24 * size
            assert ((result - expected).abs() <= bound).all()
            assert (result[:, 3] == 0).all()


def test_large_activations_do_not_overflow_before_the_result_does():
    check_products(TritonInt(), make(4, 32, 96, False), torch.bfloat16, magnitude=1e4)


@pytest.mark.parametrize("beside", (2, 4))
@pytest.mark.parametrize(
    "bits, span", [(4, 128), (4, 32), (4, 16), (8, 128), (8, 16), (2, 128), (2, 32), (2, 16)]
)
def test_words_hold_inputs_in_the_order_of_a_matrix_unit(bits, span, beside):
    """The formula of `words.py`, word by word, and back."""
    order, per_word = Order(span, beside), 32 // bits
    across = min(4, span // per_word)
    runs = span // per_word // across
    inputs = 3 * span
    codes = randn(2, inputs, seed=span).cpu().view(torch.int32).remainder(2**bits).to(torch.uint8)
    words = pack_words(codes, bits, order)
    assert words.shape == (2, inputs // per_word) and words.dtype is torch.int32
    for place, code in itertools.product(range(inputs // per_word), range(per_word)):
        start, (word, run) = place * per_word // span * span, divmod(place % (span // per_word), runs)
        half, n = divmod(code, per_word // 2)
        high, low = divmod(n, beside // 2)
        at = start + run * across * per_word + high * across * beside + word * beside + low * 2 + half
        assert (int(words[1, place]) >> (bits * code)) % 2**bits == int(codes[1, at])
    assert torch.equal(unpack_words(words, bits, order), codes)


def test_torch_compile_keeps_the_kernel_as_one_operator():
    weight = make(4, 32, 96, False)
    problem = problem_for(weight, torch.float16)
    packed, kernel = moved(TritonInt().pack(weight, problem)), TritonInt()
    x = randn(3, 96, dtype=torch.float16)
    compiled = torch.compile(
        lambda x: kernel.run(packed, problem, x * 2, None) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), kernel.run(packed, problem, x * 2, None) + 1)


def test_a_gpu_gets_it_and_the_others_say_why_not():
    weight = make(4, 32, 96, False)
    out_features, in_features = weight.shape

    def problem(device, dtype=torch.bfloat16, kind=weight.type, compute="auto"):
        return LinearProblem(kind, in_features, out_features, dtype, probe_device(device), compute)

    for name in ("cuda:sm80", "cuda:sm90", "hip:gfx942"):
        assert select("linear", problem(name)).kernel.name == "triton_int"
    why_not = TritonInt().why_not
    assert "GPU" in (why_not(problem("cpu")) or "")
    assert "float32" in (why_not(problem("cuda:sm90", torch.float32)) or "")
    narrow = make(4, 8, 96, False).type
    assert "16 inputs" in (why_not(problem("cuda:sm90", kind=narrow)) or "")


def test_a_tuned_tile_is_found_kept_and_used_without_changing_results(tmp_path, monkeypatch):
    """A clock that likes large tiles stands for a GPU's."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    wanted = Tile(outputs=16, tokens=16, depth=16, splits=2)
    weight = make(4, 128, 512, False)
    problem = problem_for(weight, torch.float16)
    packed, x = moved(TritonInt().pack(weight, problem)), randn(3, 512, dtype=torch.float16)
    before = TritonInt().run(packed, problem, x, None)
    slow = itertools.count(9, -1)
    file = tuning.device_file(DEVICE)
    found = tune(
        TritonInt(),
        TritonInt().examples()[1],
        70,
        512,
        3,
        DEVICE,
        where=HERE,
        clock=lambda calls: float(next(slow)),
        keep=lambda key, tile: tuning.write_tuned(file, {key: tile}, DEVICE),
        tiles=lambda tokens, default: iter((default, wanted)),
    )
    assert found.best == wanted and found.seconds == {found.default: 9.0, wanted: 8.0}
    assert weight_only.choose_tile(DEVICE, 3, 70, 64, int_coding("4", "128", "2", "128")) == wanted
    assert torch.allclose(before, TritonInt().run(packed, problem, x, None), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rows", (64, 128, 192))
def test_weights_are_multiplied_in_pieces_of_any_length(rows, monkeypatch):
    monkeypatch.setattr(weight_only, "piece_rows", lambda *shape: rows)
    check_products(TritonInt(), make(4, 32, 96, False, out_features=150), torch.bfloat16, tokens=(192, 200))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pieces_cover_the_weight_evenly_and_lie_in_half_of_the_cache_where_that_fills_the_gpu(name):
    device = probe_device(ARCHITECTURES[name].spec)
    for out_features, row_bytes in itertools.product(
        (70, 1000, 4096, 14336, 151936), (192, 8192, 28672, 65536)
    ):
        for tokens in (192, 256, 2048, 8192):
            rows = weight_only.piece_rows(device, tokens, out_features, row_bytes)
            pieces = -(-out_features // rows)
            assert rows % 64 == 0 and (pieces - 1) * rows < out_features <= pieces * rows
            assert pieces * rows < out_features + 64 * pieces  # the last is not much shorter
            within = rows * row_bytes <= max(device.cache_bytes // 2, 16 << 20) + 64 * row_bytes
            # Else fewer rows would leave a multiprocessor without a tile of 64 x 64.
            assert within or (rows // 64 - 2) * -(-tokens // 64) < device.processors


def test_from_which_row_on_weights_are_expanded_is_one_number_for_running_and_tuning():
    coding = int_coding("4", "128", "2", "128")
    tiles = [
        weight_only.choose_tile(DEVICE, tokens, 4096, 512, coding) for tokens in (1, 191, 192, 256, 257, 4096)
    ]
    assert [tile is None for tile in tiles] == [False, False, True, True, True, True]
    for tokens in (192, 256, 511):
        with pytest.raises(ValueError, match=f"{tokens} rows are multiplied by torch"):
            tune(
                TritonInt(),
                TritonInt().examples()[1],
                70,
                512,
                tokens,
                DEVICE,
                where=HERE,
                clock=len,
                keep=print,
            )


def test_a_tile_tuned_for_fewer_rows_of_a_bucket_is_not_used_where_torch_multiplies(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    coding, wanted = int_coding("4", "128", "2", "128"), Tile(outputs=16, tokens=64, depth=16)
    tuning.write_tuned(
        tuning.device_file(DEVICE), {weight_only.shape_key(150, 70, 64, coding): wanted}, DEVICE
    )
    assert weight_only.choose_tile(DEVICE, 150, 70, 64, coding) == wanted
    assert weight_only.choose_tile(DEVICE, 200, 70, 64, coding) is None
    tuning._read.cache_clear()


def test_a_file_of_tiles_that_cannot_be_read_is_an_error_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._read.cache_clear()
    tuning.device_file(DEVICE).write_text('{"tiles": {"a": {"outputs": 1}}}')
    with pytest.raises(ConfigError, match=r"\.json"):
        tuning.tuned(DEVICE, "a")
    tuning._read.cache_clear()
