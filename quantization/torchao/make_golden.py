"""Make the torchao golden vectors with its own quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps torchao==0.18.0
    python quantization/torchao/make_golden.py

The tensors and the subclass' description are those of torchao's `flatten_tensor_state_dict`. Its Int4Tensor can only be
made on a GPU (mslk): that vector has the numbers of mslk's formula, computed here, and no writer behind it.

Legend: I in_features, O out_features, G group_size.
"""

import json
from pathlib import Path

import torch
import torchao.quantization as ao
from safetensors.torch import save_file
from torch import Tensor
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

GOLDEN = Path(__file__).parent / "golden"
WRITER = "torchao 0.18.0"
ASYMMETRIC = ao.MappingType.ASYMMETRIC
# name, I, O, config
CASES = (
    ("torchao-int8-i96-o40", 96, 40, ao.Int8WeightOnlyConfig()),
    ("torchao-int8-tensor-i64-o24", 64, 24, ao.Int8WeightOnlyConfig(granularity=PerTensor())),
    ("torchao-int8-dynamic-i64-o40", 64, 40, ao.Int8DynamicActivationInt8WeightConfig()),
    ("torchao-intx4-g32-i128-o40", 128, 40, ao.IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    (
        "torchao-intx4-g32-asym-i128-o24",
        128,
        24,
        ao.IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=ASYMMETRIC),
    ),
    ("torchao-intx8-row-i64-o24", 64, 24, ao.IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
    ("torchao-float8-i80-o56", 80, 56, ao.Float8WeightOnlyConfig()),
)


def save(
    name: str, tensors: dict[str, Tensor], weight: Tensor, meant: Tensor, quant_type: dict, **facts
) -> None:
    out_features, in_features = weight.shape
    case = {
        "format": "torchao",
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": quant_type},
            "modules_to_not_convert": None,
        },
        "in_features": in_features,
        "out_features": out_features,
        "block_size": None,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "dequantized_rounded_to": "float32",
    } | facts
    tensors = tensors | {"weight_float": weight, "dequantized": meant.float()}
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)})
    print(path)


def make_int4(weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """As mslk's int4_row_quantize_zp and pack_int4: w = q * scale + zero, q in -8..7."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp(min=1e-6) / 15
    zeros = low + 8 * scales
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15) - 8
    scales, zeros = scales.bfloat16(), zeros.bfloat16()
    flat = codes.to(torch.int8).flatten(1)
    tensors = {
        "_weight_qdata": (flat[:, ::2] & 15) | (flat[:, 1::2] << 4),
        "_weight_scale": scales.t(),
        "_weight_zero_point": zeros.t(),
    }
    meant = codes.double() * scales.double()[..., None] + zeros.double()[..., None]
    return tensors, meant.flatten(1).bfloat16()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, in_features, out_features, config) in enumerate(CASES):
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
        module = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False))
        module[0].weight.data = weight
        ao.quantize_(module, config)
        tensors, metadata = flatten_tensor_state_dict(module.state_dict())
        tensors = {key.removeprefix("0."): value for key, value in tensors.items()}
        save(
            name,
            tensors,
            weight,
            module[0].weight.dequantize(),
            config_to_dict(config),
            made_by=WRITER,
            seed=seed,
            dequantized_by="the subclass' dequantize()",
            note="metadata: " + metadata["0.weight"],
            group_size=in_features // tensors["_weight_scale"].shape[-1],
        )
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(len(CASES))) * 0.05
    tensors, meant = make_int4(weight, 32)
    save(
        "torchao-int4-g32-i128-o40",
        tensors,
        weight,
        meant,
        config_to_dict(ao.Int4WeightOnlyConfig(group_size=32)),
        made_by="make_golden.py, after mslk's formula",
        seed=len(CASES),
        note="no GPU, no writer",
        group_size=32,
        dequantized_by="make_golden.py in float64, rounded",
        dequantized_rounded_to="bfloat16",
    )


if __name__ == "__main__":
    main()
