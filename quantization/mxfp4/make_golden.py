"""Make the MXFP4 golden vectors with ModelOpt's quantiser and dequantiser, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python -m quantization.mxfp4.make_golden

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "nvidia-modelopt 0.47.0"
GROUP = 32
VIEWED = "the writer's numbers under the names of the page; its scales are viewed as E8M0"
# name, whether the file declares its scales as E8M0, whether blocks differ wildly in size
CASES = (
    ("mxfp4-i128-o64", False, False),
    ("mxfp4-i96-o40-e8m0", True, False),
    ("mxfp4-i64-o24-extreme", False, True),
)


def main() -> None:
    for seed, (name, e8m0, extreme) in enumerate(CASES):
        weight = random_weight(name, seed)
        if extreme:
            weight[0] = 0.0  # the exponent's floor, 2^-127
            weight[1] *= 1e3
            weight[2] *= 1e-6
            weight[3, 0] = 30.0
        packed, scales = MXFP4QTensor.quantize(weight, GROUP)
        dequantized = packed.dequantize(torch.float32, scale=scales, block_sizes={-1: GROUP})
        scales = scales.view(weight.shape[0], weight.shape[1] // GROUP)
        write_vector(
            __file__,
            name,
            {
                "weight": packed._quantized_data,
                "weight_scale": scales.view(torch.float8_e8m0fnu) if e8m0 else scales,
            },
            dequantized,
            weight,
            format="mxfp4",
            quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
            group_size=GROUP,
            dequantized_by="modelopt.torch.quantization.qtensor.MXFP4QTensor.dequantize",
            made_by=WRITER,
            note=VIEWED if e8m0 else None,
            seed=seed,
        )


if __name__ == "__main__":
    main()
