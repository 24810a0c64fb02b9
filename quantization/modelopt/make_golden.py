"""Make the golden vectors of ModelOpt's NVFP4 and FP8 with its quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python quantization/modelopt/make_golden.py

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import json
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
WRITER = "nvidia-modelopt 0.47.0"
GROUP = 16
# name, I, O, quant_algo, whether activations are quantised, whether blocks differ wildly in size
CASES = (
    ("nvfp4-i128-o64", 128, 64, "NVFP4", True, False),
    ("nvfp4-w4a16-i96-o40", 96, 40, "W4A16_NVFP4", False, False),
    ("nvfp4-i64-o24-extreme", 64, 24, "NVFP4", True, True),
    ("modelopt-fp8-i80-o56", 80, 56, "FP8", True, False),
)
INPUT_AMAX = 3.5  # what a calibration might have seen


def quantise(weight: torch.Tensor, algo: str) -> tuple[dict, torch.Tensor, str]:
    """The stored tensors, and their bfloat16 meaning by the writer and its name."""
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
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, in_features, out_features, algo, quantised_inputs, extreme) in enumerate(CASES):
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
        if extreme:
            weight[0] = 0.0
            weight[1] *= 300.0
            weight[2] *= 1e-6  # below the least scale of its block
        tensors, dequantized, by = quantise(weight, algo)
        if quantised_inputs:
            largest = 448 if algo == "FP8" else 6 * 448
            tensors["input_scale"] = torch.tensor(INPUT_AMAX / largest)
        case = {
            "format": "modelopt",
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": algo,
                "kv_cache_quant_algo": None,
                "exclude_modules": ["lm_head"],
            }
            | ({"group_size": GROUP} if algo != "FP8" else {}),
            "in_features": in_features,
            "out_features": out_features,
            "group_size": None if algo == "FP8" else GROUP,
            "block_size": None,
            "orientation": "weight_float and dequantized are [out_features, in_features]",
            "dequantized_by": f"modelopt.torch.quantization.qtensor.{by}",
            "dequantized_rounded_to": "bfloat16",
            "made_by": WRITER,
            "note": "input_scale is that of an input whose largest magnitude is 3.5"
            if quantised_inputs
            else None,
            "seed": seed,
        }
        tensors |= {"weight_float": weight, "dequantized": dequantized.float()}
        path = GOLDEN / f"{name}.safetensors"
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)}
        )
        print(path)


if __name__ == "__main__":
    main()
