"""Make the compressed-tensors golden vectors with the package's own arithmetic, compressors and decompressors.

    pip install torch safetensors compressed-tensors==0.20
    python -m quantization.compressed_tensors.make_golden

Float8 has its own folder, quantization/fp8. No case quantises activations: what a weight means does not depend on it.

Legend: I in_features, O out_features, G group_size.
"""

from dataclasses import dataclass

import torch
from compressed_tensors import __version__ as version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from quantization.golden_writer import random_weight, write_vector


@dataclass(frozen=True)
class Case:
    """weights: the settings of `config_groups.*.weights`.  dtype: of the model, and so of scales."""

    name: str
    format: str
    weights: dict
    dtype: torch.dtype = torch.bfloat16


def integers(bits: int, strategy: str, group_size: int | None = None, *, symmetric: bool = True) -> dict:
    """Return the settings of integer weights."""
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "group_size": group_size,
        "symmetric": symmetric,
    }


NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}
MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "scale_dtype": "torch.uint8",
}
PACKED, PLAIN = "pack-quantized", "int-quantized"
CASES = (
    Case("w4-group64-sym-o64-i128", PACKED, integers(4, "group", 64)),
    Case("w4-group32-asym-o40-i96", PACKED, integers(4, "group", 32, symmetric=False)),
    Case("w4-channel-sym-f32-o24-i72", PACKED, integers(4, "channel"), torch.float32),
    Case("w4-tensor-sym-o32-i64", PACKED, integers(4, "tensor")),
    Case("w8-group128-sym-f16-o32-i256", PACKED, integers(8, "group", 128), torch.float16),
    Case("w8-channel-asym-o16-i64", PACKED, integers(8, "channel", symmetric=False)),
    Case("w3-group32-asym-o32-i96", PACKED, integers(3, "group", 32, symmetric=False)),
    Case("w8-channel-sym-plain-o40-i72", PLAIN, integers(8, "channel")),
    Case("w8-tensor-asym-plain-f32-o24-i56", PLAIN, integers(8, "tensor", symmetric=False), torch.float32),
    Case("w8-group64-naive-o32-i128", "naive-quantized", integers(8, "group", 64)),
    Case("nvfp4-o64-i96", "nvfp4-pack-quantized", NVFP4),
    Case("mxfp4-o48-i128", "mxfp4-pack-quantized", MXFP4),
)


def parameters(case: Case, args: QuantizationArgs, weight: Tensor) -> dict[str, Tensor]:
    """Return scales and zero points by the extremes of tensor, channel or group, as the observers have them."""
    strategy, size = case.weights["strategy"], case.weights["group_size"]
    if strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        groups = weight.unflatten(-1, (-1, size or weight.shape[1]))
        low, high = groups.amin(-1), groups.amax(-1)
    made = {}
    global_scale = None
    if strategy == "tensor_group":
        global_scale = made["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero_point = calculate_qparams(low, high, args, global_scale)
    made["weight_scale"] = scale if strategy == "tensor_group" else scale.to(case.dtype)
    if not args.symmetric:
        made["weight_zero_point"] = zero_point
    return made


def make(case: Case, *, seed: int) -> None:
    weight = random_weight(case.name, seed) + 0.005
    weight[1] *= 30.0
    weight = weight.to(case.dtype)
    args = QuantizationArgs(**case.weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=case.format)
    compressor = BaseCompressor.get_value_from_registry(case.format)
    stored = compressor.compress({"weight": weight, **parameters(case, args, weight)}, scheme)
    decoded = compressor.decompress(dict(stored), scheme)["weight"]

    kind = compressor if isinstance(compressor, type) else type(compressor)
    write_vector(
        __file__,
        case.name,
        stored,
        decoded,
        weight,
        format="compressed-tensors",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": case.format,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": case.weights,
                    "input_activations": None,
                    "format": case.format,
                }
            },
            "ignore": ["lm_head"],
        },
        group_size=case.weights["group_size"],
        dequantized_by=f"{kind.__name__}.decompress",
        made_by=f"compressed-tensors {version}",
        note=None,
        seed=seed,
    )


def main() -> None:
    for seed, case in enumerate(CASES):
        make(case, seed=seed)


if __name__ == "__main__":
    main()
