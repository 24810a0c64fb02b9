"""Make the torchao golden vectors with its own quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps torchao==0.18.0
    python -m quantization.torchao.make_golden

The tensors and the subclass' description are those of torchao's `flatten_tensor_state_dict`. Its Int4Tensor can only be
made on a GPU (mslk): that vector has the numbers of mslk's formula, computed here, and no writer behind it.

Legend: I in_features, O out_features, G group_size.
"""

import torch
import torchao.quantization as ao
from torch import Tensor
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "torchao 0.18.0"
INTX_32 = torch.int4, PerGroup(32)
CASES = {
    "torchao-int8-i96-o40": ao.Int8WeightOnlyConfig(),
    "torchao-int8-tensor-i64-o24": ao.Int8WeightOnlyConfig(granularity=PerTensor()),
    "torchao-int8-dynamic-i64-o40": ao.Int8DynamicActivationInt8WeightConfig(),
    "torchao-intx4-g32-i128-o40": ao.IntxWeightOnlyConfig(*INTX_32),
    "torchao-intx4-g32-asym-i128-o24": ao.IntxWeightOnlyConfig(*INTX_32, ao.MappingType.ASYMMETRIC),
    "torchao-intx8-row-i64-o24": ao.IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
    "torchao-float8-i80-o56": ao.Float8WeightOnlyConfig(),
}


def settings(config: ao.Int8WeightOnlyConfig) -> dict:
    """Return the quantization_config of a checkpoint that a torchao config made."""
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(config)},
        "modules_to_not_convert": None,
    }


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
    for seed, (name, config) in enumerate(CASES.items()):
        weight = random_weight(name, seed)
        module = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        module[0].weight.data = weight
        ao.quantize_(module, config)
        tensors, metadata = flatten_tensor_state_dict(module.state_dict())
        tensors = {key.removeprefix("0."): value for key, value in tensors.items()}
        write_vector(
            __file__,
            name,
            tensors,
            module[0].weight.dequantize(),
            weight,
            last=("made_by", "seed", "dequantized_by", "note", "group_size"),
            format="torchao",
            quantization_config=settings(config),
            made_by=WRITER,
            seed=seed,
            dequantized_by="the subclass' dequantize()",
            note="metadata: " + metadata["0.weight"],
            group_size=weight.shape[1] // tensors["_weight_scale"].shape[-1],
        )
    name = "torchao-int4-g32-i128-o40"
    weight = random_weight(name, len(CASES))
    write_vector(
        __file__,
        name,
        *make_int4(weight, 32),
        weight,
        last=("made_by", "seed", "note", "group_size", "dequantized_by"),
        format="torchao",
        quantization_config=settings(ao.Int4WeightOnlyConfig(group_size=32)),
        made_by="make_golden.py, after mslk's formula",
        seed=len(CASES),
        note="no GPU, no writer",
        group_size=32,
        dequantized_by="make_golden.py in float64, rounded",
    )


if __name__ == "__main__":
    main()
