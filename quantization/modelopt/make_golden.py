"""Make the golden vectors of ModelOpt's NVFP4 and FP8 with its quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python -m quantization.modelopt.make_golden

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "nvidia-modelopt 0.47.0"
GROUP = 16
# name, quant_algo, whether activations are quantised, whether blocks differ wildly in size
CASES = (
    ("nvfp4-i128-o64", "NVFP4", True, False),
    ("nvfp4-w4a16-i96-o40", "W4A16_NVFP4", False, False),
    ("nvfp4-i64-o24-extreme", "NVFP4", True, True),
    ("modelopt-fp8-i80-o56", "FP8", True, False),
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
        return tensors, meant, "FP8QTensor.dequantize"
    stored, scales, second = NVFP4QTensor.quantize(weight.clone(), GROUP)
    tensors = {"weight": stored._quantized_data, "weight_scale": scales, "weight_scale_2": second.float()}
    meant = stored.dequantize(torch.bfloat16, scale=scales, double_scale=second, block_sizes={-1: GROUP})
    return tensors, meant, "NVFP4QTensor.dequantize"


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
        write_vector(
            __file__,
            name,
            tensors,
            dequantized,
            weight,
            format="modelopt",
            quantization_config=config if algo == "FP8" else config | {"group_size": GROUP},
            group_size=None if algo == "FP8" else GROUP,
            dequantized_by=f"modelopt.torch.quantization.qtensor.{by}",
            made_by=WRITER,
            note=SCALED_INPUT if quantised_inputs else None,
            seed=seed,
        )


if __name__ == "__main__":
    main()
