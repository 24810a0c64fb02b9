"""Make the MXFP8 golden vectors with ModelOpt's quantiser and dequantiser, on a CPU.

    pip install torch safetensors && pip install --no-deps nvidia-modelopt==0.47.0
    python -m quantization.mxfp8.make_golden

ModelOpt's import also wants omegaconf, antlr4-python3-runtime, pydantic, requests, scipy, pulp, rich and nvidia-ml-py.

Legend: I in_features, O out_features.
"""

import torch
from modelopt.torch.quantization.qtensor import MXFP8QTensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "nvidia-modelopt 0.47.0"
GROUP = 32
INVERSE = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [1, GROUP],
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "MXFP8", "group_size": GROUP, "ignore": ["lm_head"]}
# name, config, the scale's name, whether the file declares it as E8M0, whether blocks differ wildly in size
CASES = (
    ("mxfp8-i128-o64", MODELOPT, "weight_scale", False, False),
    ("mxfp8-i96-o40-inverse", INVERSE, "weight_scale_inv", False, False),
    ("mxfp8-i160-o24-e8m0", INVERSE, "weight_scale_inv", True, False),
    ("mxfp8-i64-o24-extreme", MODELOPT, "weight_scale", False, True),
)


def main() -> None:
    for seed, (name, config, scale_name, e8m0, extreme) in enumerate(CASES):
        weight = random_weight(name, seed)
        if extreme:
            weight[0] = 0.0
            weight[1] *= 1e6
            weight[2] *= 1e-9
            weight[3, 0] = 30.0
        stored, scales = MXFP8QTensor.quantize(weight)
        dequantized = stored.dequantize(torch.float32, scale=scales)
        write_vector(
            __file__,
            name,
            {
                "weight": stored._quantized_data,
                scale_name: scales.view(torch.float8_e8m0fnu) if e8m0 else scales,
            },
            dequantized,
            weight,
            format="mxfp8",
            quantization_config=config,
            group_size=GROUP,
            dequantized_by="modelopt.torch.quantization.qtensor.MXFP8QTensor.dequantize",
            made_by=WRITER,
            note="the writer's numbers under the names of the page; its scales are viewed as E8M0"
            if e8m0
            else None,
            seed=seed,
        )


if __name__ == "__main__":
    main()
