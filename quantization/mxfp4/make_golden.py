"""Make the MXFP4 golden vectors with ModelOpt's quantiser and dequantiser, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python quantization/mxfp4/make_golden.py

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import json
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
WRITER = "nvidia-modelopt 0.47.0"
GROUP = 32
# name, I, O, whether the file declares its scales as E8M0, whether blocks differ wildly in size
CASES = (
    ("mxfp4-i128-o64", 128, 64, False, False),
    ("mxfp4-i96-o40-e8m0", 96, 40, True, False),
    ("mxfp4-i64-o24-extreme", 64, 24, False, True),
)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, in_features, out_features, e8m0, extreme) in enumerate(CASES):
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
        if extreme:
            weight[0] = 0.0  # the exponent's floor, 2^-127
            weight[1] *= 1e3
            weight[2] *= 1e-6
            weight[3, 0] = 30.0
        packed, scales = MXFP4QTensor.quantize(weight, GROUP)
        dequantized = packed.dequantize(torch.float32, scale=scales, block_sizes={-1: GROUP})
        scales = scales.view(out_features, in_features // GROUP)
        case = {
            "format": "mxfp4",
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
            "in_features": in_features,
            "out_features": out_features,
            "group_size": GROUP,
            "block_size": None,
            "orientation": "weight_float and dequantized are [out_features, in_features]",
            "dequantized_by": "modelopt.torch.quantization.qtensor.MXFP4QTensor.dequantize",
            "dequantized_rounded_to": "float32",
            "made_by": WRITER,
            "note": "the writer's numbers under the names of the page; its scales are viewed as E8M0"
            if e8m0
            else None,
            "seed": seed,
        }
        tensors = {
            "weight": packed._quantized_data,
            "weight_scale": scales.view(torch.float8_e8m0fnu) if e8m0 else scales,
            "weight_float": weight,
            "dequantized": dequantized.float(),
        }
        path = GOLDEN / f"{name}.safetensors"
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)}
        )
        print(path)


if __name__ == "__main__":
    main()
