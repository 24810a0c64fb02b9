"""Make the golden vectors of ModelOpt's NVFP4, FP8 and integers with its quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python -m quantization.modelopt.make_golden

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import torch
from modelopt.torch.export.quant_utils import from_quantized_weight, to_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "nvidia-modelopt 0.47.0"
GROUP = 16
INT4_GROUP = 32
BLOCK = 128
QTENSOR = "modelopt.torch.quantization.qtensor"
# name, quant_algo, whether activations are quantised, whether blocks differ wildly in size
CASES = (
    ("nvfp4-i128-o64", "NVFP4", True, False),
    ("nvfp4-w4a16-i96-o40", "W4A16_NVFP4", False, False),
    ("nvfp4-i64-o24-extreme", "NVFP4", True, True),
    ("modelopt-fp8-i80-o56", "FP8", True, False),
    ("modelopt-w4a16-i96-o40", "W4A16_AWQ", False, False),
    ("modelopt-w8a16-i72-o40", "W8A16", False, False),
    ("modelopt-fp8-blocks-i256-o384", "FP8_PB_WO", False, False),
    ("modelopt-fp8-one-block-i128-o64", "FP8_PB_WO", False, False),
)
INPUT_AMAX = 3.5  # what a calibration might have seen
SCALED_INPUT = "input_scale is that of an input whose largest magnitude is 3.5"


def quantise(weight: torch.Tensor, algo: str) -> tuple[dict, torch.Tensor, str]:
    """Return the stored tensors, their bfloat16 meaning by the writer, and the name of its dequantiser."""
    if algo == "FP8":
        scale = weight.abs().amax() / 448
        stored, scales = FP8QTensor.quantize(weight, scales=scale)
        tensors = {"weight": stored._quantized_data, "weight_scale": scales.float()}
        meant = stored.dequantize(torch.bfloat16, scale=scales)
        return tensors, meant, f"{QTENSOR}.FP8QTensor.dequantize"
    if algo == "W4A16_AWQ":
        scales = weight.unflatten(1, (-1, INT4_GROUP)).abs().amax(-1) / 7
        stored = to_quantized_weight(weight, scales, "int4_awq", block_size=INT4_GROUP)
        codes = (weight / scales.repeat_interleave(INT4_GROUP, 1)).round().clamp(-8, 7)
        meant = codes * scales.repeat_interleave(INT4_GROUP, 1)
        return {"weight": stored, "weight_scale": scales}, meant, "make_golden.py: code * scale"
    if algo == "W8A16":
        scales = weight.abs().amax(1) / 127
        stored = to_quantized_weight(weight, scales, "int8_wo")
        meant = from_quantized_weight(stored, scales, "int8_wo", torch.float32)
        return (
            {"weight": stored, "weight_scale": scales},
            meant,
            "modelopt.torch.export.quant_utils.from_quantized_weight",
        )
    if algo == "FP8_PB_WO":
        height, width = (min(BLOCK, side) for side in weight.shape)
        grid = (
            weight.unfold(0, height, height).unfold(1, width, width).abs().amax((2, 3)) / 448
        )  # [O/128, I/128]
        sides = {-1: width, -2: height}
        stored, _ = FP8QTensor.quantize(weight, scales=grid, block_sizes=sides)
        meant = stored.dequantize(torch.float32, scale=grid, block_sizes=sides)
        # As the exporter has it: an axis of 1 after each axis, and no axes at all for one scale.
        scales = grid[:, None, :, None] if grid.numel() > 1 else grid.squeeze()
        return (
            {"weight": stored._quantized_data, "weight_scale": scales},
            meant,
            f"{QTENSOR}.FP8QTensor.dequantize",
        )
    stored, scales, second = NVFP4QTensor.quantize(weight.clone(), GROUP)
    tensors = {"weight": stored._quantized_data, "weight_scale": scales, "weight_scale_2": second.float()}
    meant = stored.dequantize(torch.bfloat16, scale=scales, double_scale=second, block_sizes={-1: GROUP})
    return tensors, meant, f"{QTENSOR}.NVFP4QTensor.dequantize"


def main() -> None:
    for seed, (name, algo, quantised_inputs, extreme) in enumerate(CASES):
        weight = random_weight(name, seed)
        if extreme:
            weight[0] = 0.0
            weight[1] *= 300.0
            weight[2] *= 1e-6  # below the least scale of its block
        tensors, dequantized, by = quantise(weight, algo)
        if quantised_inputs:
            largest = 448 if algo == "FP8" else 6 * 448
            tensors["input_scale"] = torch.tensor(INPUT_AMAX / largest)
        config = {
            "quant_method": "modelopt",
            "quant_algo": algo,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
        }
        group = GROUP if "NVFP4" in algo else INT4_GROUP if algo == "W4A16_AWQ" else None
        write_vector(
            __file__,
            name,
            tensors,
            dequantized,
            weight,
            format="modelopt",
            quantization_config=config if group is None else config | {"group_size": group},
            group_size=group,
            block_size=[BLOCK, BLOCK] if algo == "FP8_PB_WO" else None,
            dequantized_by=by,
            made_by=WRITER,
            note=SCALED_INPUT if quantised_inputs else None,
            seed=seed,
        )


if __name__ == "__main__":
    main()
