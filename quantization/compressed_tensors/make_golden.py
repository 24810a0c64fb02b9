"""Make the compressed-tensors golden vectors with the package's own arithmetic, compressors and decompressors.

    pip install torch safetensors compressed-tensors==0.20
    python quantization/compressed_tensors/make_golden.py

Float8 has its own folder, quantization/fp8. No case quantises activations: what a weight means does not depend on it.

Legend: I in_features, O out_features, G group_size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors import __version__ as version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, kw_only=True)
class Case:
    """weights: the settings of `config_groups.*.weights`.  dtype: of the model, and so of scales."""

    name: str
    format: str
    in_features: int
    out_features: int
    weights: dict
    dtype: torch.dtype = torch.bfloat16


def integers(bits: int, strategy: str, *, group_size: int | None = None, symmetric: bool = True) -> dict:
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
    Case(
        name="w4-group64-sym-o64-i128",
        format=PACKED,
        out_features=64,
        in_features=128,
        weights=integers(4, "group", group_size=64),
    ),
    Case(
        name="w4-group32-asym-o40-i96",
        format=PACKED,
        out_features=40,
        in_features=96,
        weights=integers(4, "group", group_size=32, symmetric=False),
    ),
    Case(
        name="w4-channel-sym-f32-o24-i72",
        format=PACKED,
        out_features=24,
        in_features=72,
        weights=integers(4, "channel"),
        dtype=torch.float32,
    ),
    Case(
        name="w4-tensor-sym-o32-i64",
        format=PACKED,
        out_features=32,
        in_features=64,
        weights=integers(4, "tensor"),
    ),
    Case(
        name="w8-group128-sym-f16-o32-i256",
        format=PACKED,
        out_features=32,
        in_features=256,
        weights=integers(8, "group", group_size=128),
        dtype=torch.float16,
    ),
    Case(
        name="w8-channel-asym-o16-i64",
        format=PACKED,
        out_features=16,
        in_features=64,
        weights=integers(8, "channel", symmetric=False),
    ),
    Case(
        name="w3-group32-asym-o32-i96",
        format=PACKED,
        out_features=32,
        in_features=96,
        weights=integers(3, "group", group_size=32, symmetric=False),
    ),
    Case(
        name="w8-channel-sym-plain-o40-i72",
        format=PLAIN,
        out_features=40,
        in_features=72,
        weights=integers(8, "channel"),
    ),
    Case(
        name="w8-tensor-asym-plain-f32-o24-i56",
        format=PLAIN,
        out_features=24,
        in_features=56,
        weights=integers(8, "tensor", symmetric=False),
        dtype=torch.float32,
    ),
    Case(
        name="w8-group64-naive-o32-i128",
        format="naive-quantized",
        out_features=32,
        in_features=128,
        weights=integers(8, "group", group_size=64),
    ),
    Case(name="nvfp4-o64-i96", format="nvfp4-pack-quantized", out_features=64, in_features=96, weights=NVFP4),
    Case(
        name="mxfp4-o48-i128", format="mxfp4-pack-quantized", out_features=48, in_features=128, weights=MXFP4
    ),
)


def parameters(case: Case, args: QuantizationArgs, weight: Tensor) -> dict[str, Tensor]:
    """Scales and zero points by the minimum and maximum of tensor, channel or group, as the observers have them."""
    strategy, size = case.weights["strategy"], case.weights["group_size"]
    if strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        groups = weight.unflatten(-1, (-1, size or case.in_features))
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
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.out_features, case.in_features, generator=generator) * 0.05 + 0.005
    weight[1] *= 30.0
    weight = weight.to(case.dtype)
    args = QuantizationArgs(**case.weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=case.format)
    compressor = BaseCompressor.get_value_from_registry(case.format)
    stored = compressor.compress({"weight": weight, **parameters(case, args, weight)}, scheme)
    decoded = compressor.decompress(dict(stored), scheme)["weight"]

    description = {
        "format": "compressed-tensors",
        "quantization_config": {
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
        "in_features": case.in_features,
        "out_features": case.out_features,
        "group_size": case.weights["group_size"],
        "block_size": None,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "dequantized_by": f"{type(compressor).__name__ if not isinstance(compressor, type) else compressor.__name__}"
        ".decompress",
        "dequantized_rounded_to": str(decoded.dtype).removeprefix("torch."),
        "made_by": f"compressed-tensors {version}",
        "note": None,
        "seed": seed,
    }
    tensors = {**stored, "weight_float": weight, "dequantized": decoded.float()}
    path = GOLDEN / f"{case.name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"case": json.dumps(description)})
    print(path, {k: (str(v.dtype), list(v.shape)) for k, v in stored.items()})


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, case in enumerate(CASES):
        make(case, seed=seed)


if __name__ == "__main__":
    main()
