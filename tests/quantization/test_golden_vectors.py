"""The golden vectors decode to what their writers say; the decoders follow quantization/*/README.md alone.

Legend: I in_features, O out_features, G inputs per group.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

QUANTIZATION = Path(__file__).parents[2] / "quantization"
AWQ_FILES = sorted((QUANTIZATION / "awq" / "golden").glob("*.safetensors"))
FP8_FILES = sorted((QUANTIZATION / "fp8" / "golden").glob("*.safetensors"))

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
SEQUENTIAL_COLUMNS = (0, 1, 2, 3, 4, 5, 6, 7)
FP8_SCALE_NAMES = ("weight_scale", "weight_scale_inv")


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["case"]), {
            name: file.get_tensor(name) for name in list(file.keys())
        }


def unpack(words: Tensor, columns: tuple[int, ...] = AWQ_COLUMNS) -> Tensor:
    """[R, O/8] int32 words to [R, O] int64 codes: nibble i from the low end is column columns[i]."""
    rows, num_words = words.shape
    bits = words.to(torch.int64) & 0xFFFFFFFF
    codes = torch.full((rows, num_words, 8), -1)
    for nibble, column in enumerate(columns):
        codes[:, :, column] = (bits // 16**nibble) % 16
    return codes.reshape(rows, num_words * 8)


def decode_awq(tensors: dict[str, Tensor], columns: tuple[int, ...] = AWQ_COLUMNS) -> Tensor:
    """[O, I] float64, exact: (q - z) * s."""
    codes, zeros = unpack(tensors["qweight"], columns), unpack(tensors["qzeros"], columns)
    group_of_input = torch.arange(codes.shape[0]) * zeros.shape[0] // codes.shape[0]
    return ((codes - zeros[group_of_input]) * tensors["scales"].double()[group_of_input]).t()


def e4m3_value(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3_VALUES = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)


def decode_scale(stored: Tensor) -> Tensor:
    if stored.dtype == torch.float8_e8m0fnu:
        return 2.0 ** (stored.view(torch.uint8).double() - 127)
    return stored.double()


def spread_scale(case: dict, tensors: dict[str, Tensor]) -> Tensor:
    """[O, I] float64: the scale of every element."""
    (name,) = (name for name in FP8_SCALE_NAMES if name in tensors)
    scale = decode_scale(tensors[name])
    out_features, in_features = case["out_features"], case["in_features"]
    if case["block_size"] is not None:
        height, width = case["block_size"]
        return scale[torch.arange(out_features) // height][:, torch.arange(in_features) // width]
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out_features, in_features)
    return scale.reshape(out_features, 1).expand(out_features, in_features)


def decode_fp8(case: dict, tensors: dict[str, Tensor]) -> Tensor:
    """[O, I] float64, exact: e4m3 value * scale."""
    stored = E4M3_VALUES[tensors["weight"].view(torch.uint8).long()]
    return stored * spread_scale(case, tensors)


def rounded_like_the_writer(exact: Tensor, case: dict) -> Tensor:
    """Writers multiply in float16, bfloat16 or float32, and that dtype is in the metadata.

    One rounding of the exact product: it has at most 28 significant bits, so float64 holds it, and where the
    target is narrower than float32 it has at most 15, so torch's way there through float32 loses nothing.
    """
    return exact.to(getattr(torch, case["dequantized_rounded_to"])).float()


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_golden_vectors_of_both_formats():
    assert len(AWQ_FILES) >= 10 and len(FP8_FILES) >= 12


@pytest.mark.parametrize("path", AWQ_FILES, ids=name_of)
def test_awq_tensors_have_the_documented_shapes_and_dtypes(path):
    case, tensors = read(path)
    config = case["quantization_config"]
    assert config["quant_method"] == "awq" and config["version"].lower() == "gemm"
    assert config.get("bits", config.get("w_bit")) == 4
    assert config.get("group_size", config.get("q_group_size")) == case["group_size"]
    out_features, in_features = case["out_features"], case["in_features"]
    num_groups = 1 if case["group_size"] == -1 else in_features // case["group_size"]
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert described == {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (num_groups, out_features // 8)),
        "scales": (torch.float16, (num_groups, out_features)),
        "weight_float": (torch.float16, (out_features, in_features)),
        "dequantized": (torch.float32, (out_features, in_features)),
    }


@pytest.mark.parametrize("path", AWQ_FILES, ids=name_of)
def test_awq_decodes_to_the_writers_dequantisation(path):
    case, tensors = read(path)
    exact = decode_awq(tensors)
    # Exact after one rounding: AutoAWQ multiplies (q - z) by s in float16.
    assert torch.equal(rounded_like_the_writer(exact, case), tensors["dequantized"])
    # What a float32 reader computes is the exact product, within half a unit in the last place of float16.
    assert torch.equal(exact.float().double(), exact)
    half_unit = torch.clamp(exact.abs() * 2.0**-11, min=2.0**-25)
    assert ((exact - tensors["dequantized"].double()).abs() <= half_unit).all()


@pytest.mark.parametrize("path", AWQ_FILES, ids=name_of)
def test_awq_vectors_tell_the_nibble_order_from_a_sequential_one(path):
    case, tensors = read(path)
    wrong = rounded_like_the_writer(decode_awq(tensors, SEQUENTIAL_COLUMNS), case)
    assert (wrong != tensors["dequantized"]).float().mean() > 0.3


@pytest.mark.parametrize("path", AWQ_FILES, ids=name_of)
def test_awq_decodes_near_the_float_weights(path):
    _, tensors = read(path)
    zeros, num_inputs = unpack(tensors["qzeros"]), tensors["qweight"].shape[0]
    group_of_input = torch.arange(num_inputs) * zeros.shape[0] // num_inputs
    scale = tensors["scales"].double()[group_of_input].t()
    zero = zeros[group_of_input].t()
    reachable = torch.minimum(
        torch.maximum(tensors["weight_float"].double(), -zero * scale), (15 - zero) * scale
    )
    # Half a step, plus 0.02 for the writer's float16 division (w / s up to 15, relative error 2^-11, twice).
    assert ((decode_awq(tensors) - reachable).abs() <= 0.52 * scale).all()


@pytest.mark.parametrize("path", [path for path in AWQ_FILES if "symmetric" in path.stem], ids=name_of)
def test_symmetric_awq_stores_eight_in_every_zero_point(path):
    case, tensors = read(path)
    assert case["quantization_config"]["zero_point"] is False
    assert (tensors["qzeros"] == 0x88888888 - 2**32).all()


def test_the_awq_pages_worked_example():
    assert unpack(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    _, tensors = read(QUANTIZATION / "awq" / "golden" / "i128-o64-g128.safetensors")
    assert tensors["qweight"][0, 0].item() == 0x89848664 - 2**32
    assert unpack(tensors["qweight"][:1, :1]).tolist() == [[4, 4, 6, 8, 6, 9, 8, 8]]
    assert unpack(tensors["qzeros"][:1, :1]).tolist() == [[7, 7, 6, 7, 7, 7, 7, 7]]


def test_the_fp8_pages_facts_about_e4m3():
    assert e4m3_value(0x5A) == 20.0
    assert e4m3_value(0x7E) == 448.0 == E4M3_VALUES.nan_to_num(0).max()
    assert e4m3_value(0x08) == 2.0**-6 and e4m3_value(0x01) == 2.0**-9
    assert math.isnan(e4m3_value(0x7F)) and math.isnan(e4m3_value(0xFF)) and E4M3_VALUES.isnan().sum() == 2
    assert not E4M3_VALUES.isinf().any()


@pytest.mark.parametrize("path", FP8_FILES, ids=name_of)
def test_fp8_tensors_have_the_documented_shapes_and_dtypes(path):
    case, tensors = read(path)
    config, shape = case["quantization_config"], (case["out_features"], case["in_features"])
    assert tensors["weight"].dtype == torch.float8_e4m3fn and tensors["weight"].shape == shape
    assert tensors["dequantized"].dtype == torch.float32 and tensors["dequantized"].shape == shape
    assert tensors["weight_float"].dtype in (torch.float32, torch.float16)
    assert tensors["weight_float"].shape == shape

    if config["quant_method"] == "fp8":
        block, static = config.get("weight_block_size"), config["activation_scheme"] == "static"
        name = "weight_scale_inv" if "weight_block_size" in config else "weight_scale"
        legal = {(), (1,), (1, 1)}
        dtypes = {torch.float8_e8m0fnu if config.get("scale_fmt") == "ue8m0" else torch.float32}
    else:
        assert config["quant_method"] == "compressed-tensors" and config["format"] == "float-quantized"
        (group,) = config["config_groups"].values()
        assert (group["weights"]["type"], group["weights"]["num_bits"]) == ("float", 8)
        block, static = group["weights"].get("block_structure"), not group["input_activations"]["dynamic"]
        name = "weight_scale"
        legal = {(1,)} if group["weights"]["strategy"] == "tensor" else {(shape[0], 1)}
        dtypes = {torch.float32, torch.bfloat16, torch.float16}
    assert block == case["block_size"]
    if block is not None:
        legal = {(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))}
    expected_names = {"weight", name, "weight_float", "dequantized"} | ({"input_scale"} if static else set())
    assert set(tensors) == expected_names
    assert tuple(tensors[name].shape) in legal and tensors[name].dtype in dtypes
    if static:
        assert tensors["input_scale"].numel() == 1 and tensors["input_scale"].item() > 0


@pytest.mark.parametrize("path", FP8_FILES, ids=name_of)
def test_fp8_decodes_to_the_writers_dequantisation(path):
    case, tensors = read(path)
    assert torch.equal(rounded_like_the_writer(decode_fp8(case, tensors), case), tensors["dequantized"])


@pytest.mark.parametrize("path", FP8_FILES, ids=name_of)
def test_fp8_decodes_near_the_float_weights(path):
    case, tensors = read(path)
    weight, scale = tensors["weight_float"].double(), spread_scale(case, tensors)
    # e4m3 rounds to 2^-4 of a normal value, or half a step of 2^-9 below; 0.07 leaves 2^-7 for writers that
    # divide, and store scales, in bfloat16 or float16.
    bound = torch.maximum(weight.abs() * 0.07, scale * 2.0**-10 * 1.01)
    assert ((decode_fp8(case, tensors) - weight).abs() <= bound).all()


@pytest.mark.parametrize("path", [path for path in FP8_FILES if "ue8m0" not in path.stem], ids=name_of)
def test_fp8_scales_use_the_whole_range_where_a_block_is_not_zero(path):
    case, tensors = read(path)
    stored = E4M3_VALUES[tensors["weight"].view(torch.uint8).long()].abs()
    for scale in spread_scale(case, tensors).unique():
        largest = stored[spread_scale(case, tensors) == scale].max()
        assert largest in (0.0, 448.0)
